"""The configuration of a session and of an engine: every setting, and where each value came from.

A value given in the program wins over one in the environment (``PYDFLASH_<NAME>``), which wins over the default.
``EngineConfig.resolve`` alone reads these variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from pydflash.arguments import an_instance, shown
from pydflash.errors import ConfigError
from pydflash.kv_format import CACHE_TYPES, K_BASES, V_BASES
from pydflash.limits import CHUNKS, EXACT_ROWS, MOST_POSITIONS
from pydflash.settings import Choice, Declaration, Flag, Pattern, Range, Texts, check, declarations, setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EngineConfig", "SessionConfig", "Setting", "Settings", "table"]

_PREFIX = "PYDFLASH_"
# Read by the build, and harmless where they stay exported.
_BUILD_NAMES = frozenset({"PYDFLASH_CUDA", "PYDFLASH_GGML_SOURCE"})
_ALIAS = "DFLASH_SKIP_WHT"


class Settings(TypedDict, total=False):
    """The settings of EngineConfig as keyword arguments; None leaves one to the environment or its default."""

    max_context: int | None
    cache_k: str | None
    cache_v: str | None
    k_rotation: str | None
    v_rotation: str | None
    fused: bool | None
    chunk: int | None
    device: str | None
    threads: int | None
    draft_max: int | None
    adaptive: bool | None
    draft_causal: bool | None
    ignore: tuple[str, ...] | None


@dataclass(frozen=True)
class SessionConfig:
    """The settings of a session. Raises ConfigError, listing what is allowed."""

    max_context: int = setting(4096, Range(1, MOST_POSITIONS), help="Most positions of prompt and output together.")
    cache_k: str = setting("f16", Choice(tuple(CACHE_TYPES)), help="Type of the K cache.")
    cache_v: str = setting("f16", Choice(tuple(CACHE_TYPES)), help="Type of the V cache.")
    k_rotation: str = setting("auto", Choice(("auto", *K_BASES)), help="Basis of the K cache.")
    v_rotation: str = setting("none", Choice(tuple(V_BASES)), help="Basis of the V cache.")
    fused: bool = setting(
        True, Flag(), help="Take Q, K and V to attention in one kernel each; the results are the same."
    )
    chunk: int = setting(512, Choice(CHUNKS), help="Rows of a prefill step.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EngineConfig(SessionConfig):
    """All settings of an engine, except its files. ``sources``: where each value that is not a default came
    from. Raises ConfigError, listing what is allowed.
    """

    device: str = setting(
        "auto", Pattern(r"auto|cpu|cuda(:[0-9]{1,4})?", "auto, cpu, cuda or cuda:N"), help="Device that runs the model."
    )
    threads: int | None = setting(None, Range(1, 512), help="CPU threads.", unset="all that the process may use")
    draft_max: int | None = setting(
        None, Range(1, EXACT_ROWS - 1), help="Most tokens to propose at once.", unset="the draft's block less one"
    )
    # Every row that is verified costs time on a CPU; on a GPU 16 rows cost little more than one.
    adaptive: bool | None = setting(
        None,
        Flag(),
        help="Choose the length of each proposal from measured acceptance and cost.",
        unset="on the CPU only",
    )
    draft_causal: bool | None = setting(
        None, Flag(), help="Let rows of a block see only earlier rows.", unset="as the draft file says"
    )
    ignore: tuple[str, ...] = setting(
        (), Texts(), help="Tensors and metadata keys of the files that may stay unused, such as blk.*.attn_sinks.*."
    )
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        an_instance(self.sources, Mapping, "sources")

    @classmethod
    def resolve(cls, environment: Mapping[str, str] | None = None, **settings: Unpack[Settings]) -> EngineConfig:
        """Arguments over environment (``os.environ`` unless given) over defaults; an argument of None is not given.

        Raises ConfigError for an unknown name, in either place, or a value that is not allowed.
        """
        environment = os.environ if environment is None else an_instance(environment, Mapping, "environment")
        known = declarations(cls)
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; valid ones are {', '.join(known)}")
        values = _from_environment(environment, known)
        sources = {name: f"environment ({_PREFIX}{name.upper()})" for name in values}
        given = {name: known[name].check(value, name) for name, value in settings.items() if value is not None}
        values |= given
        sources |= dict.fromkeys(given, "argument")
        unrotated = _skips_rotation(environment) and values.get("cache_k") == "q4_0"
        if unrotated and values.get("k_rotation", "auto") == "auto":
            values["k_rotation"], sources["k_rotation"] = "none", f"environment ({_ALIAS})"
        return cls(**values, sources=sources)

    def settings(self) -> tuple[Setting, ...]:
        """Every value with its source, in the order of the fields."""
        return tuple(
            Setting(name, getattr(self, name), self.sources.get(name, "default")) for name in declarations(type(self))
        )

    def of_session(self) -> dict[str, Any]:
        """The settings of the engine's sessions."""
        return {name: getattr(self, name) for name in declarations(SessionConfig)}


class Setting(NamedTuple):
    """One effective value. ``source``: 'default', 'argument' or 'environment (NAME)'."""

    name: str
    value: Any
    source: str


def table(settings: Sequence[Setting]) -> str:
    """Name, value and source of each setting, in columns."""
    rows = [(s.name, _shown(s.value), s.source) for s in settings]
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{wide[0]}}  {value:<{wide[1]}}  {source}" for name, value, source in rows)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _from_environment(environment: Mapping[str, str], known: Mapping[str, Declaration]) -> dict[str, Any]:
    """The values of all ``PYDFLASH_*`` variables that are set and not empty."""
    names = {_PREFIX + name.upper(): name for name in known}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not isinstance(variable, str) or not isinstance(text, str):
            raise ConfigError(f"environment has {shown(variable)}: {shown(text)}; expected texts, as in os.environ")
        if not variable.startswith(_PREFIX) or variable in _BUILD_NAMES:
            continue
        if variable not in names:
            valid = ", ".join((*names, _ALIAS))
            raise ConfigError(f"the environment variable {variable} is unknown; valid ones are {valid}")
        if text:
            name = names[variable]
            values[name] = known[name].read(text, variable)
    return values


def _skips_rotation(environment: Mapping[str, str]) -> bool:
    """``DFLASH_SKIP_WHT``: leave a q4_0 K cache unrotated, as other engines of this family read it."""
    value = environment.get(_ALIAS, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{_ALIAS} is {value!r}; valid values are 0, 1")
    return value == "1"
