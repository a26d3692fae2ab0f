"""Settings as dataclass fields: ``name: type = setting(default, rule, help=...)``.

The declaration is the only place for a default, for what is allowed and for the help text. Checks, environment
variables and command-line options are derived from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from operator import index
from typing import Any, ClassVar, Protocol, TypeVar

from pydflash.arguments import shown
from pydflash.errors import ConfigError

__all__ = [
    "Choice",
    "Declaration",
    "Flag",
    "Integers",
    "Pattern",
    "Range",
    "Rule",
    "Texts",
    "check",
    "declarations",
    "setting",
]

T = TypeVar("T")

_KEY = "setting"
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Rule(Protocol):
    """What a setting may be."""

    @property
    def metavar(self) -> str:
        """What stands for the value in a command's help."""

    @property
    def allowed(self) -> str:
        """What is allowed, as the end of an error message."""

    @property
    def spellings(self) -> str:
        """The same for a value that is read from text."""

    @property
    def listed(self) -> str:
        """All values, for a help text; empty where there are too many."""

    def checked(self, value: Any) -> Any:
        """``value`` in its canonical form. Raises ValueError or TypeError when it is not allowed."""

    def parsed(self, text: str) -> Any:
        """The value that ``text`` spells, yet to be checked. Raises ValueError for a text that spells none."""


@dataclass(frozen=True)
class Declaration:
    """A setting's default, rule and help text. ``unset``: what a default of None stands for."""

    default: Any
    rule: Rule
    help: str
    unset: str = ""

    def check(self, value: Any, where: str) -> Any:
        """``value`` in its canonical form; ConfigError, which calls the setting ``where``, when it is not allowed."""
        optional = self.default is None
        if optional and value is None:
            return None
        try:
            return self.rule.checked(value)
        except (TypeError, ValueError, OverflowError):
            also = ", or None" if optional else ""
            raise ConfigError(f"{where} is {shown(value)}; {self.rule.allowed}{also}") from None

    def read(self, text: str, where: str) -> Any:
        """The value that ``text`` spells; ConfigError, which calls the setting ``where``, when it is not allowed."""
        try:
            return self.rule.checked(self.rule.parsed(text))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{where} is {shown(text)}; {self.rule.spellings}") from None


def setting(default: T, rule: Rule, *, help: str, unset: str = "") -> T:
    """A dataclass field that is a setting; None is allowed where it is the default."""
    return field(default=default, metadata={_KEY: Declaration(default, rule, help, unset)})


def declarations(config: type) -> dict[str, Declaration]:
    """The settings of a dataclass by name, in the order of its fields."""
    return {f.name: f.metadata[_KEY] for f in fields(config) if _KEY in f.metadata}


def check(config: Any) -> None:
    """Bring every setting of a new dataclass instance, frozen or not, into its canonical form, or raise ConfigError."""
    for name, declaration in declarations(type(config)).items():
        object.__setattr__(config, name, declaration.check(getattr(config, name), name))


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One of several words, or of several integers."""

    values: tuple[str, ...] | tuple[int, ...]

    @property
    def metavar(self) -> str:
        return "TEXT" if isinstance(self.values[0], str) else "INTEGER"

    @property
    def listed(self) -> str:
        *others, last = map(str, self.values)
        return f"{', '.join(others)} or {last}"

    @property
    def allowed(self) -> str:
        return f"valid values are {', '.join(map(str, self.values))}"

    spellings = allowed

    def checked(self, value: Any) -> str | int:
        plain = value if isinstance(value, str) else _integer(value)
        return self.values[self.values.index(plain)]

    def parsed(self, text: str) -> str | int:
        return type(self.values[0])(text)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    metavar: ClassVar[str] = "BOOLEAN"
    listed: ClassVar[str] = ""
    allowed: ClassVar[str] = "valid values are True, False"
    spellings: ClassVar[str] = f"valid values are {', '.join(_TRUTH)}"

    def checked(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    def parsed(self, text: str) -> bool:
        if text.lower() not in _TRUTH:
            raise ValueError
        return _TRUTH[text.lower()]


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``, which is an integer where ``low`` is one and finite otherwise.

    ``high`` None: there is no upper bound. ``above``: ``low`` itself is not allowed.
    """

    low: int | float
    high: int | float | None = None
    above: bool = False
    listed: ClassVar[str] = ""

    @property
    def metavar(self) -> str:
        return "INTEGER" if isinstance(self.low, int) else "NUMBER"

    @property
    def allowed(self) -> str:
        if isinstance(self.low, int):
            return f"allowed: an integer, {self.low} " + ("or more" if self.high is None else f"to {self.high}")
        least = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"allowed: a finite number, {least}" + ("" if self.high is None else f", at most {self.high:g}")

    spellings = allowed

    def checked(self, value: Any) -> int | float:
        number = _integer(value) if isinstance(self.low, int) else _finite(value)
        inside = number > self.low if self.above else number >= self.low
        if not inside or (self.high is not None and number > self.high):
            raise ValueError
        return number

    def parsed(self, text: str) -> int | float:
        return type(self.low)(text)


@dataclass(frozen=True)
class Pattern:
    """A text that a regular expression matches as a whole. ``listed``: its forms, for people."""

    pattern: str
    listed: str
    metavar: ClassVar[str] = "TEXT"

    @property
    def allowed(self) -> str:
        return f"valid values are {self.listed}"

    spellings = allowed

    def checked(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value):
            raise ValueError
        return str(value)

    def parsed(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Texts:
    """Any number of non-empty texts; a single string is one text."""

    metavar: ClassVar[str] = "TEXT"
    listed: ClassVar[str] = ""
    allowed: ClassVar[str] = "allowed: a non-empty text, or a sequence of them"
    spellings: ClassVar[str] = "allowed: a non-empty text"

    def checked(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, Sequence):
            raise TypeError
        texts = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError
        return texts

    def parsed(self, text: str) -> tuple[str, ...]:
        return (text,)


@dataclass(frozen=True)
class Integers:
    """Any number of integers, 0 or more; a single integer is one."""

    metavar: ClassVar[str] = "INTEGER"
    listed: ClassVar[str] = ""
    allowed: ClassVar[str] = "allowed: an integer, 0 or more, or a sequence of them"
    spellings: ClassVar[str] = "allowed: an integer, 0 or more"

    def checked(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str | bytes):
            raise TypeError
        numbers = tuple(_integer(item) for item in (value if isinstance(value, Iterable) else (value,)))
        if any(number < 0 for number in numbers):
            raise ValueError
        return numbers

    def parsed(self, text: str) -> tuple[int, ...]:
        return (int(text),)


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError
    return float(value)
