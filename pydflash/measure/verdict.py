"""From paired measurements to a sentence: the interval of a median, the noise floor, and the conclusion that both
support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydflash.errors import ConfigError

__all__ = ["CONFIDENCE", "Estimate", "Verdict", "fewest", "median_interval", "noise_floor", "paired_ratios", "verdict"]

CONFIDENCE = 0.95
"""The least coverage of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A median and an interval that holds the true one with probability ``confidence``."""

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Verdict:
    """``text`` in plain words; ``kind`` for programs."""

    kind: Literal["faster", "slower", "no difference", "within", "undecided"]
    text: str


def paired_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """b / a, repeat by repeat: what changes from one repeat to the next is in both and cancels."""
    return [y / x for x, y in zip(a, b, strict=True)]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The exact sign-test interval of the median: two order statistics, the narrowest that reach ``confidence``.

    Each value lies below the true median with probability 1/2, whatever the distribution of the values, so the k-th
    smallest and the k-th largest of n enclose it with probability 1 - 2 P(Binomial(n, 1/2) < k). No assumption of
    normality, no random resampling. Raises ConfigError when there are too few values for any interval.
    """
    n, ordered = len(values), sorted(values)
    k, coverage = _rank(n, confidence)
    if not k:
        raise ConfigError(
            f"{n} repeats give no interval of {100 * confidence:g} %; use at least {fewest(confidence)} repeats"
        )
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k], coverage)


def fewest(confidence: float = CONFIDENCE) -> int:
    """How many values the interval of a median needs."""
    return next(n for n in range(1, 64) if _rank(n, confidence)[0])


def _rank(n: int, confidence: float) -> tuple[int, float]:
    """The largest k whose order statistics reach ``confidence``, 0 when none does, and what they reach."""
    k, coverage, outside = 0, 1.0, 0
    while k < (n + 1) // 2:
        outside += math.comb(n, k)  # of 2^n equally likely patterns, those with k values below the median
        reached = 1.0 - 2.0 * (outside / (1 << n))  # whole numbers: 2^n may lie beyond any float
        if reached < confidence:
            break
        k, coverage = k + 1, reached
    return k, coverage


def noise_floor(again: Estimate) -> float:
    """How far from 1 the interval of A/A ratios reaches: what the measurement shows where there is nothing to see."""
    return max(abs(again.low - 1.0), abs(again.high - 1.0))


def verdict(ratio: Estimate, floor: float, *, within: float | None = None, lower_is_better: bool = False) -> Verdict:
    """The conclusion about B that ``ratio``, B over A, supports.

    ``floor``: the noise floor, a fraction. ``within``: a margin of equivalence in percent; the interval must lie in it
    as a whole. A difference counts when its interval leaves out 0 and its median is above the floor; a median above the
    floor whose interval holds 0 decides nothing. ``lower_is_better``: the quantity is a time; 1 % faster is then 1 %
    less.
    """
    gain = Estimate(ratio.median - 1.0, ratio.low - 1.0, ratio.high - 1.0, ratio.confidence)
    if lower_is_better:
        gain = Estimate(-gain.median, -gain.high, -gain.low, gain.confidence)
    interval = f"[{_percent(gain.low)}, {_percent(gain.high)}]"
    seen = f"B changes the speed by {_percent(gain.median)} % {interval}"
    if within is not None and max(-gain.low, gain.high) <= within / 100.0:
        return Verdict("within", f"within +-{within:g} %: {seen}")
    missed = "" if within is None else f"not shown to be within +-{within:g} %; "
    if abs(gain.median) <= floor:
        return Verdict("no difference", f"{missed}no difference beyond the noise floor of {_percent(floor)} %: {seen}")
    if gain.low <= 0.0 <= gain.high:
        return Verdict("undecided", f"{missed}undecided: {seen}, but 0 is in the interval; give more repeats")
    if gain.median > 0.0:
        return Verdict("faster", f"{missed}B is faster by {_percent(gain.median)} % {interval}")
    turned = f"[{_percent(-gain.high)}, {_percent(-gain.low)}]"
    return Verdict("slower", f"{missed}B is slower by {_percent(-gain.median)} % {turned}")


def _percent(fraction: float) -> str:
    return f"{round(100.0 * fraction, 2) + 0.0:.2f}"
