"""Values that cross to another process as JSON, unchanged: what has no exact form there is refused by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydflash.errors import ConfigError

__all__ = ["to_json"]

MAX_SIZE = 32 << 20  # characters and items; far above a context of a million tokens
MAX_DEPTH = 100  # of lists and dicts in one another
MAX_BITS = 2048  # of an integer; Python prints those under any of its own limits


def to_json(values: Mapping[str, Any]) -> str:
    """Write ``values`` as JSON, with NaN and infinities; a tuple becomes a list, another mapping a dict.

    Raises ConfigError with the path, such as ``messages[1].x``, of anything but text, numbers, booleans, None, lists
    and tuples of these, and dicts with text keys; and where one of this module's limits is passed.
    """
    copy = _Copy()
    plain = {name: copy.of(value, name, 1) for name, value in values.items()}
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), check_circular=False)


class _Copy:
    """Copies with plain lists and dicts. Counts, because lists that share their items are larger than they look."""

    def __init__(self) -> None:
        self._left = MAX_SIZE

    def of(self, value: object, where: str, depth: int) -> Any:
        self._count(1, where)
        if isinstance(value, str):
            self._count(len(value), where)
            return value
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise ConfigError(f"{where} is an integer of {value.bit_length():,} bits; the most is {MAX_BITS:,}")
            return value
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where[:80]}... is nested more than {MAX_DEPTH} levels deep, or holds itself")
        if isinstance(value, Mapping):
            return {
                self._key(key, where): self.of(item, f"{where}.{key[:80]}", depth + 1) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.of(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        raise ConfigError(
            f"{where} is a {type(value).__name__}; a chat template takes text, numbers, booleans, None, and dicts and "
            "lists of these"
        )

    def _key(self, key: object, where: str) -> str:
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {key!r}, a {type(key).__name__}; keys are texts here, as in JSON")
        self._count(len(key), where)
        return key

    def _count(self, size: int, where: str) -> None:
        self._left -= size
        if self._left < 0:
            raise ConfigError(f"{where[:80]}: the messages and variables have more than {MAX_SIZE:,} characters")
