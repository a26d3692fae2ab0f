"""Arguments of wrong types and values to every public call."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.calls import CALLS, Parts, good_arguments, read
from tests.fuzz.drivers.edits import INTEGERS, REALS, TEXTS
from tests.fuzz.junk import choose, revive

__all__ = ["Arguments"]

CHEAP = 20
"""Calls that load a file are tried once for so many others."""


class Arguments:
    def __init__(self, folder: Path) -> None:
        self._parts = Parts(folder)
        self._work = tempfile.TemporaryDirectory()
        loading = ("Engine.load", "load_model", "load_draft", "convert_draft")
        self._names = [name for name in CALLS for _ in range(1 if name in loading else CHEAP)]

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        name = rng.choice(self._names)
        changed = rng.sample(list(CALLS[name].good), k=min(len(CALLS[name].good), rng.choice((1, 1, 1, 2))))
        return {"call": name, "arguments": {argument: _value(rng) for argument in changed}}

    def run(self, recipe: dict[str, Any]) -> None:
        self._parts.begin()
        call = CALLS[recipe["call"]]
        arguments = good_arguments(call, self._parts) | {k: revive(v) for k, v in recipe["arguments"].items()}
        if recipe["call"] in ("Snapshot.save", "convert_draft"):
            arguments = {name: _harmless(value, Path(self._work.name)) for name, value in arguments.items()}
        read(call.run(self._parts, **arguments))


def _value(rng: random.Random) -> Any:
    return choose(rng) if rng.random() < 0.7 else rng.choice((*INTEGERS, *REALS, *TEXTS))


def _harmless(value: Any, folder: Path) -> Any:
    """A name without a folder is one in ``folder``."""
    named = isinstance(value, str | Path) and str(value) not in ("", ".") and "\0" not in str(value)
    return folder / value if named else value
