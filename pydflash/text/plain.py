"""Copies of a caller's values as plain data: what JSON can hold, so that it can go to another process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

from pydflash.errors import ConfigError

__all__ = ["plain_copy"]

# Far above what conversations and schemas have.
MAX_DEPTH = 64
MAX_VALUES = 1_000_000
MAX_BITS = 4096  # of an integer
SHOWN_KEY = 40  # characters of a key in an error message


def plain_copy(value: object, where: str) -> Any:
    """A copy of ``value`` made of dict, list, str, int, float, bool and None.

    Mappings and objects with ``model_dump`` become dicts, sequences and arrays lists, numpy's numbers and subclasses of
    the plain types plain. Raises ConfigError, naming the place below ``where``, for anything else, for text that has no
    UTF-8 form, and for what is too much or nested too deeply, as a value that holds itself is.
    """
    return _Copy(where).of(value)


@runtime_checkable
class _Model(Protocol):
    """An object of pydantic's kind, as clients of OpenAI's API return them."""

    def model_dump(self) -> Mapping[str, Any]: ...


@runtime_checkable
class _Array(Protocol):
    """An array or number of numpy's kind; numpy itself is slow to import."""

    def tolist(self) -> Any: ...


class _Copy:
    def __init__(self, where: str) -> None:
        self._where = where
        self._path: list[str | int] = []
        self._left = MAX_VALUES

    def of(self, value: object) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self._where} holds more than {MAX_VALUES:,} values")
        match value:
            case None | bool():
                return value
            case str():
                return self._text(value)
            case int():
                return self._integer(value)
            case float():
                return float.__float__(value)
            case Mapping():
                return self._dict(value)
            case bytes() | bytearray() | memoryview():
                self._refuse(f"is a {type(value).__name__}; decode it to text first")
            case Sequence():
                return [self._below(i, item) for i, item in enumerate(value)]
            case _Array() if not isinstance(value, type):
                return self._of_array(value)
            case _Model() if not isinstance(value, type):
                return self._dict(value.model_dump())
        self._refuse(f"is a {type(value).__name__}; expected text, numbers, lists and dicts")

    def _dict(self, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self._refuse(f"has a model_dump that returns a {type(value).__name__}; expected a dict")
        items: Iterable[tuple[object, object]] = value.items()
        return {self._key(key): self._below(str(key), item) for key, item in items}

    def _below(self, key: str | int, value: object) -> Any:
        if len(self._path) >= MAX_DEPTH:
            self._refuse(f"is nested deeper than {MAX_DEPTH} levels, or holds itself")
        self._path.append(key)
        copy = self.of(value)
        self._path.pop()
        return copy

    def _of_array(self, value: _Array) -> Any:
        plain = value.tolist()
        if isinstance(plain, _Array):  # of a type that Python lacks; or an object that holds itself
            self._refuse(f"is a {type(value).__name__}; expected text, numbers, lists and dicts")
        return self.of(plain)

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            self._refuse(f"has a key that is a {type(key).__name__}; keys are texts")
        return self._text(key)

    def _text(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            self._refuse(
                f"has the lone surrogate U+{ord(error.object[error.start]):04X} as character {error.start}, which has"
                " no UTF-8 form; decode the source with errors='replace'"
            )
        return str.__str__(text)

    def _integer(self, number: int) -> int:
        if number.bit_length() > MAX_BITS:
            self._refuse(f"is an integer of {number.bit_length():,} bits; the most allowed is {MAX_BITS:,}")
        return int.__int__(number)

    def _refuse(self, problem: str) -> NoReturn:
        steps = [f"[{key}]" if isinstance(key, int) else f".{key[:SHOWN_KEY]}" for key in self._path]
        shown = steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]]
        raise ConfigError(f"{self._where}{''.join(shown)} {problem}")
