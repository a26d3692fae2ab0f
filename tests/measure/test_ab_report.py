"""What `pydflash ab` concludes from the pieces of prompts that its arms have read in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pydflash.measure import ab_report
from pydflash.measure.ab_report import Outcome, Sample
from pydflash.measure.verdict import median_interval, noise_floor


def sample(arm: str, repeat: int, *chunk_seconds: float, chunk: int = 32, prompt_tokens: int | None = None) -> Sample:
    """A run whose chunks took ``chunk_seconds``, the last one full unless ``prompt_tokens`` says otherwise."""
    tokens = prompt_tokens or chunk * len(chunk_seconds)
    return Sample(
        arm, repeat, 0, tokens, sum(chunk_seconds), chunk, chunk_seconds, 8, 8.0, (0,) * 9, 8, 0, 0, (), (), (0,) * 8
    )


def prefill(samples: Sequence[Sample], within: float | None = None, *, lockstep: bool = True) -> Outcome:
    return ab_report.outcomes(samples, within, cycles=False, lockstep=lockstep)[0]


def test_pieces_are_paired_and_the_fastest_of_each_are_summed_up() -> None:
    """B takes 1 1/4 times as long; in every other repeat one of its two pieces takes twice that."""
    slow = ((2.5, 2.5), (1.25, 5.0))
    samples = [
        of
        for repeat in range(6)
        for of in (
            sample("A", repeat, 1.0, 2.0 + repeat),
            sample("B", repeat, *slow[repeat % 2]),
            sample("A'", repeat, 1.0 + repeat, 2.0),
        )
    ]
    chunks = prefill(samples).chunks
    assert chunks is not None
    assert chunks.ratios[:6] == pytest.approx([1 / 2.5, 2 / 2.5, 1 / 1.25, 3 / 5.0, 1 / 2.5, 4 / 2.5])
    assert chunks.again_ratios[:4] == [1.0, 1.0, 1 / 2, 3 / 2]
    assert chunks.ratio == median_interval(chunks.ratios)
    assert chunks.again == median_interval(chunks.again_ratios)
    assert chunks.noise_floor == noise_floor(chunks.again)
    assert chunks.tokens == 32
    assert chunks.fastest == ab_report.Fastest(64 / 3.0, 64 / 3.75, 64 / 3.0, pytest.approx(0.8), 1.0)


def test_a_slow_piece_in_most_runs_does_not_hide_that_arms_are_equal() -> None:
    """One of four pieces of each run takes up to a third longer: sums differ by percents, most pieces by nothing."""
    rng = np.random.default_rng(3)
    samples = []
    for repeat in range(9):
        drift = 1.0 + repeat  # of the machine, the same for all arms
        for arm, slower in (("A", 1.0), ("B", 1.001), ("A'", 1.0)):
            seconds = np.full(4, drift * slower)
            seconds[rng.integers(4)] *= 1.0 + rng.random() / 3
            samples.append(sample(arm, repeat, *seconds.tolist()))
    by_chunk, by_run = prefill(samples, 0.3), prefill(samples, 0.3, lockstep=False)
    assert by_chunk.verdict.kind == "within"
    assert by_run.verdict.kind != "within"
    assert by_run.chunks is None
    assert by_chunk.chunks is not None
    assert by_chunk.chunks.ratio.median == pytest.approx(1 / 1.001)
    assert by_chunk.chunks.ratio.confidence > 0.95
    assert by_chunk.ratio == by_run.ratio


def test_the_interval_by_chunk_holds_the_ratio_as_often_as_it_says() -> None:
    """Noise of either kind, of a repeat and of a piece, neither of which makes anything faster; B takes 1 % longer."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(400):
        seconds = 1.0 + rng.exponential(0.05, (1, 9, 1)) + rng.exponential(0.004, (3, 9, 4))
        seconds[1] *= 1.01
        runs = zip(ab_report.ARMS, seconds.tolist())
        samples = [sample(arm, repeat, *run) for arm, rows in runs for repeat, run in enumerate(rows)]
        chunks = prefill(samples).chunks
        assert chunks is not None
        found.append(chunks.ratio)
    share = np.mean([estimate.low <= 1 / 1.01 <= estimate.high for estimate in found])
    claimed = found[0].confidence
    assert abs(share - claimed) < 4 * math.sqrt(claimed * (1 - claimed) / len(found))


def test_only_arms_in_lockstep_with_prompts_of_several_pieces_are_compared_by_chunk() -> None:
    def of(tokens: Sequence[int], chunks: Sequence[int], *, lockstep: bool = True) -> ab_report.Chunks | None:
        return prefill(
            [
                sample(arm, repeat, *[1.0] * -(-count // chunk), chunk=chunk, prompt_tokens=count)
                for arm, chunk in zip(ab_report.ARMS, chunks)
                for repeat, count in enumerate(tokens)
            ],
            lockstep=lockstep,
        ).chunks

    assert of([64] * 6, (32, 32, 32), lockstep=False) is None
    assert of([64] * 6, (32, 64, 32)) is None
    mixed = of([96] * 6, (32, 64, 32))
    assert mixed is not None
    assert mixed.ratios == [2.0, 1.0] * 6
    assert mixed.fastest == ab_report.Fastest(32.0, 48.0, 32.0, 1.5, 1.0)
    unequal = of([64, 96, 64, 20, 64, 64], (32, 32, 32))
    assert unequal is not None
    assert (len(unequal.ratios), unequal.fastest) == (12, None)


def test_many_pieces_have_an_interval_too() -> None:
    """2^n is no float for so many; the ranks are those of the normal law then."""
    found = median_interval([float(i) for i in range(1, 4097)])
    assert found.median == 2048.5
    assert found.low == pytest.approx(2048.5 - 1.96 * 32, abs=1.0)
    assert found.low + found.high == 4097.0
    assert 0.95 <= found.confidence < 0.953
