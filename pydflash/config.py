"""The one configuration of an engine: validated values, and where each of them came from.

A value given in the program wins over one in the environment (``PYDFLASH_<NAME>``), which wins over the default.
Nothing else in the engine reads these variables.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydflash.errors import ConfigError
from pydflash.ops import EXACT_ROWS
from pydflash.session import CHUNKS
from pydflash.state import CACHE_TYPES, K_BASES, MOST_POSITIONS, V_BASES

__all__ = ["EngineConfig", "Setting", "parsed", "table", "truth"]

_PREFIX = "PYDFLASH_"
# Read by the build, and harmless where they stay exported.
_BUILD_NAMES = frozenset({"PYDFLASH_CUDA", "PYDFLASH_GGML_SOURCE"})
_ALIAS = "DFLASH_SKIP_WHT"
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Setting(NamedTuple):
    """One effective value. ``source``: 'default', 'argument' or 'environment (NAME)'."""

    name: str
    value: Any
    source: str


def table(settings: Sequence[Setting]) -> str:
    """Name, value and source of each setting, in columns."""
    rows = [(s.name, "none" if s.value is None else str(s.value), s.source) for s in settings]
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{wide[0]}}  {value:<{wide[1]}}  {source}" for name, value, source in rows)


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine can be told, besides its files.

    max_context: most positions of prompt and output together.
    cache_k, cache_v: types of the K and V cache: f32, f16, bf16, q8_0 or q4_0.
    k_rotation: basis of the K cache: auto, none, hadamard-256, hadamard-128, hadamard-64 or signed-128.
    v_rotation: basis of the V cache: none, hadamard-256, hadamard-128 or hadamard-64.
    fused: take Q, K and V to attention in one kernel each; the results are the same.
    device: auto, cpu, cuda or cuda:N.
    threads: of the CPU; None takes all the process may use.
    chunk: rows of a prefill step.
    draft_max: most tokens to propose at once; None is the draft's block less one.
    adaptive: choose the length of each proposal from measured acceptance and cost; None does on the CPU, where every
        row that is verified costs time. On a GPU 16 rows cost little more than one.
    draft_causal: whether rows of a block see only earlier rows; None follows the draft file.
    sources: where each value came from.

    Raises ConfigError, listing what is allowed.
    """

    max_context: int = 4096
    cache_k: str = "f16"
    cache_v: str = "f16"
    k_rotation: str = "auto"
    v_rotation: str = "none"
    fused: bool = True
    device: str = "auto"
    threads: int | None = None
    chunk: int = 512
    draft_max: int | None = None
    adaptive: bool | None = None
    draft_causal: bool | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_int("max_context", 1, MOST_POSITIONS)
        self._check_choice("cache_k", tuple(CACHE_TYPES))
        self._check_choice("cache_v", tuple(CACHE_TYPES))
        self._check_choice("k_rotation", ("auto", *K_BASES))
        self._check_choice("v_rotation", tuple(V_BASES))
        self._check_choice("fused", (True, False))
        if not isinstance(self.device, str):
            raise ConfigError(f"device is {self.device!r}; valid values are 'auto', 'cpu', 'cuda', 'cuda:0', ...")
        if self.threads is not None:
            self._check_int("threads", 1, 512)
        self._check_choice("chunk", CHUNKS)
        if self.draft_max is not None:
            self._check_int("draft_max", 1, EXACT_ROWS - 1)
        self._check_choice("adaptive", (True, False, None))
        self._check_choice("draft_causal", (True, False, None))

    @classmethod
    def resolve(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> EngineConfig:
        """Arguments over environment (``os.environ`` unless given) over defaults; an argument of None is not given.

        Raises ConfigError for an unknown name, in either place, or a value that does not fit.
        """
        environment = os.environ if environment is None else environment
        names = [f.name for f in dataclasses.fields(cls) if f.name != "sources"]
        for name in arguments:
            if name not in names:
                raise ConfigError(f"unknown option {name!r}; valid ones are {', '.join(names)}")
        values = _from_environment(environment, names)
        sources = {name: f"environment ({_PREFIX}{name.upper()})" for name in values}
        given = {name: value for name, value in arguments.items() if value is not None}
        values |= given
        sources |= dict.fromkeys(given, "argument")
        unrotated = _skips_rotation(environment) and values.get("cache_k") == "q4_0"
        if unrotated and values.get("k_rotation", "auto") == "auto":
            values["k_rotation"], sources["k_rotation"] = "none", f"environment ({_ALIAS})"
        return cls(**values, sources=sources)

    def settings(self) -> tuple[Setting, ...]:
        """Every value with its source, in the order of the fields."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "sources"]
        return tuple(Setting(name, getattr(self, name), self.sources.get(name, "default")) for name in names)

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}; allowed: an integer, {low} to {high}")

    def _check_choice(self, name: str, valid: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(value == choice and type(value) is type(choice) for choice in valid):
            raise ConfigError(f"{name} is {value!r}; valid values are {', '.join(map(str, valid))}")


def _from_environment(environment: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    """The values of all ``PYDFLASH_*`` variables that are set and not empty."""
    known = {_PREFIX + name.upper(): name for name in names}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(_PREFIX) or variable in _BUILD_NAMES:
            continue
        if variable not in known:
            valid = ", ".join((*known, _ALIAS))
            raise ConfigError(f"the environment variable {variable} is unknown; valid ones are {valid}")
        if text:
            values[known[variable]] = parsed(known[variable], variable, text)
    return values


def parsed(name: str, variable: str, text: str) -> int | bool | str:
    """``text`` as the type of the setting ``name``. ``variable`` is where it stood, for the ConfigError that a number
    or a truth value that is none raises; EngineConfig itself checks the value.
    """
    if name in ("max_context", "threads", "chunk", "draft_max"):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{variable} is {text!r}; an integer is needed") from None
    return truth(variable, text) if name in ("fused", "adaptive", "draft_causal") else text


def truth(variable: str, text: str) -> bool:
    """A truth value; ConfigError lists its spellings."""
    if text.lower() not in _TRUTH:
        raise ConfigError(f"{variable} is {text!r}; valid values are {', '.join(_TRUTH)}")
    return _TRUTH[text.lower()]


def _skips_rotation(environment: Mapping[str, str]) -> bool:
    """``DFLASH_SKIP_WHT``: leave a q4_0 K cache unrotated, as other engines of this family read it."""
    value = environment.get(_ALIAS, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{_ALIAS} is {value!r}; valid values are 0 and 1")
    return value == "1"
