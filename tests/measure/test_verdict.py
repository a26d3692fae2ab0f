"""The statistics of `pydflash ab` against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.measure.ab_report import Protocol
from pydflash.measure.verdict import Estimate, fewest, median_interval, noise_floor, paired_ratios, verdict


def test_ratios_are_paired_by_repeat() -> None:
    assert paired_ratios([1.0, 2.0, 4.0], [2.0, 2.0, 1.0]) == [2.0, 1.0, 0.25]


@pytest.mark.parametrize(
    ("n", "rank", "coverage"), [(6, 1, 0.96875), (7, 1, 0.984375), (9, 2, 0.9609375), (15, 4, 0.96484375)]
)
def test_the_interval_is_that_of_the_sign_test(n: int, rank: int, coverage: float) -> None:
    """Ranks and coverages as tables of the sign test give them."""
    values = [float(value) for value in np.random.default_rng(n).permutation(np.arange(1, n + 1))]
    assert median_interval(values) == Estimate((n + 1) / 2, float(rank), float(n + 1 - rank), coverage)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, 9))
    found = [median_interval(row.tolist()) for row in draws]
    share = np.mean([estimate.low <= math.log(2) <= estimate.high for estimate in found])
    sigma = math.sqrt(0.9609375 * (1 - 0.9609375) / len(draws))
    assert abs(share - 0.9609375) < 4 * sigma


def test_too_few_repeats_give_no_interval() -> None:
    assert fewest() == 6
    with pytest.raises(ConfigError, match="at least 6"):
        median_interval([1.0] * 5)
    with pytest.raises(ConfigError, match="6 or more"):
        Protocol(repeats=5)


def test_the_noise_floor_is_the_end_of_the_interval_that_is_farther_from_1() -> None:
    assert noise_floor(Estimate(1.001, 0.997, 1.002, 0.95)) == pytest.approx(0.003)
    assert noise_floor(Estimate(1.001, 1.0005, 1.004, 0.95)) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("ratio", "floor", "options", "kind", "said"),
    [
        ((1.012, 1.008, 1.016), 0.003, {}, "faster", "B is faster by 1.20 % [0.80, 1.60]"),
        ((0.988, 0.984, 0.992), 0.003, {}, "slower", "B is slower by 1.20 % [0.80, 1.60]"),
        ((0.988, 0.984, 0.992), 0.003, {"lower_is_better": True}, "faster", "B is faster by 1.20 % [0.80, 1.60]"),
        ((1.002, 1.001, 1.003), 0.003, {}, "no difference", "no difference beyond the noise floor of 0.30 %"),
        ((1.0, 1.0, 1.0), 0.0, {}, "no difference", "no difference beyond the noise floor of 0.00 %"),
        ((1.04, 0.99, 1.09), 0.003, {}, "undecided", "0 is in the interval"),
        ((1.002, 0.998, 1.003), 0.003, {"within": 0.3}, "within", "within +-0.3 %"),
        ((1.002, 1.001, 1.004), 0.003, {"within": 0.3}, "no difference", "not shown to be within +-0.3 %; no diff"),
        ((0.95, 0.94, 0.96), 0.003, {"within": 1.0}, "slower", "not shown to be within +-1 %; B is slower by 5.00 %"),
    ],
)
def test_the_verdict(
    ratio: tuple[float, float, float], floor: float, options: dict[str, float], kind: str, said: str
) -> None:
    found = verdict(Estimate(*ratio, 0.95), floor, **options)  # type: ignore[arg-type]
    assert found.kind == kind
    assert said in found.text
