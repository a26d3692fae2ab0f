"""Arguments of public calls: one that is not of the type asked for is refused at the call, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any, TypeVar

from pydflash.errors import ConfigError

__all__ = ["a_function", "a_path", "an_instance", "an_integer", "an_iterable", "shown"]

T = TypeVar("T")

_SHOWN = 200  # characters of a value in a message


def shown(value: object) -> str:
    """``value`` as a message quotes it: its repr, cut to a line, or its type where it has none."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, lists nested too deeply, a class that fails
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def an_instance(value: T, kind: type, name: str) -> T:
    """``value``, the argument ``name``; ConfigError unless it is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {shown(value)}; expected an instance of {kind.__name__}")
    return value


def an_integer(value: object, name: str, low: int, high: int) -> int:
    """The argument ``name`` as an int, numpy's integers included; ConfigError unless it lies in ``low..high``."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ConfigError(f"{name} is {shown(value)}; allowed: an integer, {low} to {high:,}")
    return number


def a_path(value: object, name: str) -> Path:
    """The argument ``name``, a text or a path; ConfigError where the file system can have no such name."""
    try:
        if not isinstance(value, str | os.PathLike):
            raise TypeError
        path = Path(value)
        if b"\0" in os.fsencode(path):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {shown(value)}; expected the path of a file or folder") from None
    return path


def an_iterable(value: Iterable[T], name: str) -> Iterator[T]:
    """An iterator over the argument ``name``; ConfigError where there is none."""
    try:
        return iter(value)
    except TypeError:  # an array without dimensions says that it is iterable
        raise ConfigError(f"{name} is {shown(value)}; expected a sequence or a set") from None


def a_function(value: object, name: str) -> Callable[..., Any] | None:
    """The argument ``name``; ConfigError unless it can be called or is None."""
    if value is not None and not callable(value):
        raise ConfigError(f"{name} is {shown(value)}; expected a function, or None")
    return value
