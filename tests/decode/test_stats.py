"""Stats are values: each step has its own, and what follows from the counts follows exactly."""

from __future__ import annotations

import dataclasses

import pytest

from pydflash.decode import Stats, Step, collect

TIMES = (10.0, 10.25, 10.75, 11.0)  # a quarter to propose, half to verify, a quarter to accept


def test_a_step_adds_what_it_proposed_and_kept() -> None:
    first = Stats(prompt_tokens=5, tokens=1, prefill_seconds=2.0)
    second = first.after(4, 2, TIMES)
    third = second.after(7, 7, TIMES, "a reason")
    assert (second.tokens, second.steps, second.drafted, second.accepted) == (4, 1, 4, 2)
    assert (third.tokens, third.steps, third.drafted, third.accepted) == (12, 2, 11, 9)
    assert second.accepted_per_position == (1, 1, 0, 0)
    assert third.accepted_per_position == (2, 2, 1, 1, 1, 1, 1)
    assert third.drafted_per_position == (2, 2, 2, 2, 1, 1, 1)
    assert (third.draft_seconds, third.verify_seconds, third.accept_seconds, third.decode_seconds) == (0.5, 1, 0.5, 2)
    assert (second.fallback, third.fallback) == (None, "a reason")
    assert third.after(0, 0, TIMES).fallback == "a reason"
    assert (third.prompt_tokens, third.prefill_seconds) == (5, 2.0)


def test_earlier_stats_do_not_change() -> None:
    stats = [Stats(tokens=1)]
    for accepted in (3, 0, 5):
        stats.append(stats[-1].after(5, accepted, TIMES))
    assert [s.trace for s in stats] == [(), (3,), (3, 0), (3, 0, 5)]
    assert [s.steps for s in stats] == [0, 1, 2, 3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats[0].tokens = 2  # type: ignore[misc]


def test_rates_follow_from_the_counts() -> None:
    stats = Stats(prompt_tokens=30, tokens=1, prefill_seconds=2.0).after(15, 5, TIMES).after(15, 10, TIMES)
    assert stats.acceptance_length == (15 + 2) / 2
    assert stats.acceptance_rate == 0.5
    assert stats.tokens_per_second == 17 / 2
    assert stats.prefill_tokens_per_second == 15


def test_before_anything_was_done_the_rates_are_zero() -> None:
    stats = Stats()
    assert (stats.acceptance_length, stats.acceptance_rate) == (0, 0)
    assert (stats.tokens_per_second, stats.prefill_tokens_per_second) == (0, 0)


def test_single_steps_accept_nothing_and_make_no_positions() -> None:
    stats = Stats(tokens=1).after(0, 0, TIMES).after(0, 0, TIMES)
    assert (stats.tokens, stats.trace, stats.accepted_per_position) == (3, (0, 0), ())
    assert stats.acceptance_length == 1


def test_collecting_joins_tokens_and_keeps_the_last_stats() -> None:
    last = Stats(tokens=3)
    steps = [Step((5,), stats=Stats(tokens=1)), Step((6, 7), 1, 4, "length", last)]
    assert collect(steps) == ([5, 6, 7], last)
    assert collect([]) == ([], Stats())
