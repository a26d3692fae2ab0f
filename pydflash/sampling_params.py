"""How tokens are chosen and when generation ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

from pydflash.arguments import shown
from pydflash.errors import ConfigError
from pydflash.settings import Flag, Integers, Range, Texts, check, declarations, setting

__all__ = ["Recommendation", "SamplingParams", "recommendations"]

_LARGEST_ID = 2**31 - 1
_LARGEST_BIAS = 3e38  # float32, in which logits are, reaches a little further


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. The defaults are greedy.

    ``logit_bias``: token id to a value added to its logit; -inf bans the token.
    Raises ConfigError for a value that is not allowed.
    """

    temperature: float = setting(
        0.0, Range(0.0), help="Divide logits by this before the draw; 0 takes the most likely token."
    )
    top_k: int = setting(0, Range(0), help="Keep this many of the most likely tokens; 0 keeps all.")
    top_p: float = setting(
        1.0,
        Range(0.0, 1.0, above=True),
        help="Keep the fewest tokens whose probabilities sum to at least this; 1 keeps all.",
    )
    min_p: float = setting(
        0.0, Range(0.0, 1.0), help="Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."
    )
    repetition_penalty: float = setting(
        1.0,
        Range(0.0, above=True),
        help="Divide positive and multiply negative logits of tokens seen by this; 1 is off.",
    )
    frequency_penalty: float = setting(
        0.0, Range(-2.0, 2.0), help="Subtract this from a token's logit for each time it was seen."
    )
    presence_penalty: float = setting(
        0.0, Range(-2.0, 2.0), help="Subtract this once from the logit of every token seen."
    )
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = setting(
        None, Range(0, 2**64 - 1), help="Random seed.", unset="a different one for every generation"
    )
    max_tokens: int = setting(256, Range(1), help="Most tokens to generate.")
    stop: tuple[str, ...] = setting((), Texts(), help="Text that ends generation, control tokens' texts included.")
    stop_token_ids: tuple[int, ...] = setting((), Integers(), help="Id of a token that ends generation.")
    ignore_eos: bool = setting(False, Flag(), help="Generate past the model's end-of-turn tokens.")
    penalty_window: int = setting(
        64,
        Range(-1),
        help="Number of last tokens, prompt included, that the penalties look at; -1 for all, 0 for none.",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        off = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
        return not off and self.penalty_window != 0


def _checked_bias(bias: object) -> dict[int, float]:
    allowed = f"allowed: a mapping of token id (0 to 2**31 - 1) to -inf or a number up to {_LARGEST_BIAS:g}"
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias is {shown(bias)}; {allowed}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        try:
            number, amount = index(token), float(value)
        except (TypeError, ValueError, OverflowError):
            number, amount = -1, math.nan
        if not 0 <= number <= _LARGEST_ID or not (abs(amount) <= _LARGEST_BIAS or amount == -math.inf):
            raise ConfigError(f"logit_bias has {shown(token)}: {shown(value)}; {allowed}")
        checked[number] = amount
    return checked


# --- what a model file recommends -------------------------------------------------------------------------------------

PREFIX = "general.sampling."
# Keys of GGUF files, with the meaning that llama.cpp gives them, and the parameters that have the same.
NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "penalty_window",
}
# Samplers that there are not here: what switches each on, and keys that say nothing while it is off.
OTHERS = {"sequence": (), "xtc_probability": ("xtc_threshold",), "mirostat": ("mirostat_tau", "mirostat_eta")}
SHOWN = 40  # characters of a text from a file


class Recommendation(NamedTuple):
    """What a model file says of sampling under the metadata key ``key``.

    ``name`` is a parameter of SamplingParams and ``value`` its value. Where ``problem`` says why the key is not used,
    ``name`` is empty and ``value`` is the file's.
    """

    key: str
    name: str
    value: Any
    problem: str = ""

    @property
    def label(self) -> str:
        """The parameter's name, or the key's where there is none."""
        return f"recommended {self.name or self.key.removeprefix(PREFIX)}"

    @property
    def shown(self) -> str:
        """The value, and why it is not used."""
        return f"{self.value}, not used: {self.problem}" if self.problem else str(self.value)


def recommendations(metadata: Mapping[str, Any]) -> Iterator[Recommendation]:
    """What the GGUF keys ``general.sampling.*`` recommend, with the reason where a key cannot be used."""
    for short, name in NAMES.items():
        key = PREFIX + short
        if (found := _scalar(metadata.get(key))) is not None:
            try:
                yield Recommendation(key, name, _usable(name, found))
            except ConfigError as error:
                yield Recommendation(key, "", found, str(error))
    for switch, more in OTHERS.items():
        if _scalar(metadata.get(PREFIX + switch)) not in (None, 0, ""):
            for key in (PREFIX + short for short in (switch, *more)):
                if (found := _scalar(metadata.get(key))) is not None:
                    yield Recommendation(key, "", found, "there is no such sampler")


def _scalar(found: object) -> bool | int | float | str | None:
    """A metadata value, an array by the name of its type and a text cut to what can be shown."""
    if found is None or isinstance(found, bool | int | float):
        return found
    return found[:SHOWN] if isinstance(found, str) else f"({type(found).__name__})"


def _usable(name: str, found: bool | int | float | str) -> Any:
    """``found`` as the value of a parameter, by llama.cpp's reading; ConfigError where it is none."""
    declaration = declarations(SamplingParams)[name]
    if isinstance(found, str):
        return declaration.read(found, name)
    if isinstance(found, float) and math.isfinite(found):
        found = round(found, 6)  # 0.95 is stored as the nearest float32
        found = int(found) if isinstance(declaration.default, int) and found.is_integer() else found
    if name == "top_k" and found is not True and found < 0:
        found = 0  # all tokens
    return declaration.check(found, name)
