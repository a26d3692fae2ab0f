"""Values of wrong types, by names that a recipe can hold."""

from __future__ import annotations

import decimal
import random
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["JUNK", "choose", "revive"]


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(50_000):
        found = [found]
    return found


def _cyclic() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


JUNK: dict[str, Callable[[], Any]] = {
    "none": lambda: None, "true": lambda: True, "false": lambda: False, "ellipsis": lambda: ..., "object": object,
    # numbers
    "zero": lambda: 0, "one": lambda: 1, "minus one": lambda: -1, "2**31": lambda: 2**31, "2**63": lambda: 2**63,
    "2**64": lambda: 2**64, "10**400": lambda: 10**400, "10**5000": lambda: 10**5000, "-10**400": lambda: -(10**400),
    "half": lambda: 0.5, "nan": lambda: float("nan"), "inf": lambda: float("inf"), "-inf": lambda: float("-inf"),
    "1e39": lambda: 1e39, "1e308": lambda: 1e308, "-1e308": lambda: -1e308, "5e-324": lambda: 5e-324,
    "complex": lambda: 1j, "fraction": lambda: Fraction(1, 3), "decimal": lambda: decimal.Decimal("NaN"),
    "huge decimal": lambda: decimal.Decimal("1e9999"),
    # text and bytes
    "empty text": lambda: "", "text": lambda: "text", "control": lambda: "<|im_end|>", "surrogate": lambda: "\ud800",
    "null": lambda: "a\0b", "long": lambda: "x" * 5000, "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"), "memoryview": lambda: memoryview(b"abc"),
    # collections
    "empty list": list, "list": lambda: [1, 2], "texts": lambda: ["a", "b"], "nones": lambda: [None],
    "pair": lambda: (1, 2), "ragged": lambda: [[1], [1, 2]], "deep": _deep, "cyclic": _cyclic,
    "floats": lambda: [0.5, 1.5], "big integers": lambda: [2**70, 1], "empty dict": dict, "dict": lambda: {"a": 1},
    "dict of 1": lambda: {1: 2}, "set": lambda: {1, 2}, "range": lambda: range(3),
    "generator": lambda: (i for i in range(3)),
    # numpy
    "array": lambda: np.arange(3), "floats array": lambda: np.ones(3), "matrix": lambda: np.ones((2, 2), np.int64),
    "empty array": lambda: np.zeros(0), "scalar array": lambda: np.array(1), "nan array": lambda: np.full(3, np.nan),
    "texts array": lambda: np.array(["a", "b"]), "objects array": lambda: np.array([None, "a"], object),
    "int64": lambda: np.int64(1), "float32": lambda: np.float32(0.5), "bool_": lambda: np.bool_(True),
    "structured": lambda: np.zeros(2, "i4,f4"), "dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    # others
    "type": lambda: int, "function": lambda: len, "path": lambda: Path("/nowhere/at/all"),
    "folder": lambda: Path("/"), "null path": lambda: Path("a\0b"), "long path": lambda: Path("x" * 5000),
    "lock": threading.Lock, "error": lambda: ValueError("x"), "unprintable": _Unprintable,
}  # fmt: skip
NAMES = tuple(JUNK)


def choose(rng: random.Random) -> dict[str, str]:
    """A value for a recipe, which ``revive`` turns into what it names."""
    return {"$": rng.choice(NAMES)}


def revive(recipe: Any) -> Any:
    """The value that a recipe describes."""
    if isinstance(recipe, dict):
        if set(recipe) == {"$"}:
            return JUNK[recipe["$"]]()
        return {name: revive(value) for name, value in recipe.items()}
    return [revive(item) for item in recipe] if isinstance(recipe, list) else recipe
