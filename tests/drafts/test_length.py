"""The length of a proposal: what is known of costs and acceptance, and the choice that follows from it."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash.drafts import CycleCosts, ProposalLength

LENGTHS = {1: 0, 2: 1, 4: 3, 8: 7, 16: 15}  # width of a graph to the proposal that fills it


def measured(seconds: dict[int, float]) -> CycleCosts:
    """``seconds`` by proposed tokens; the first cycle of each, which builds a graph, takes forever."""
    costs = CycleCosts()
    for proposed, value in seconds.items():
        for measured_seconds in (1e9, value, value):
            costs.add(proposed, measured_seconds)
    return costs


def after(seconds: dict[int, float], accepted: list[int]) -> ProposalLength:
    """The state after whole proposals of which so many were accepted."""
    width = ProposalLength(measured(seconds))
    for count in accepted:
        width.record(15, count, seconds[15])
    return width


# --- costs ------------------------------------------------------------------------------------------------------------


def test_the_first_cycle_of_a_width_does_not_count() -> None:
    costs = CycleCosts()
    for seconds in (0.5, 2.0, 3.0):
        assert costs.seconds(15) is None
        costs.add(15, seconds)
    assert costs.seconds(15) == 2.0


def test_a_cycle_that_was_interrupted_keeps_no_width_away() -> None:
    costs = measured({0: 0.5})
    costs.add(15, 9.0)
    costs.add(15, 40.0)
    assert ProposalLength(costs).choose(15) == 15
    costs.add(15, 3.0)
    assert costs.seconds(15) == 3.0


def test_the_fastest_of_late_counts_and_what_is_old_is_forgotten() -> None:
    costs = measured({15: 1.0})
    costs.add(15, 5.0)
    assert costs.seconds(15) == 1.0
    for _ in range(8):
        costs.add(15, 3.0)
    assert costs.seconds(15) == 3.0


def test_a_width_that_was_slow_once_is_tried_again() -> None:
    """A single step that something interrupted must not keep single steps away for good."""
    costs = measured({15: 3.0, 0: 9.0})
    width, tried = ProposalLength(costs), 0
    while width.choose(15) != 0:
        width.record(15, 0, 3.0)
        tried += 1
        assert tried < 200
    for seconds in (0.4, 0.5):
        width.record(0, 0, seconds)
    assert costs.seconds(0) == 0.4


def test_proposals_that_share_a_graph_share_their_cost() -> None:
    costs = measured({15: 1.6, 7: 1.0})
    assert {n: costs.seconds(n) for n in (4, 7, 8, 15)} == {4: 1.0, 7: 1.0, 8: 1.6, 15: 1.6}


def test_a_width_never_measured_is_taken_to_be_as_cheap_as_it_can_be() -> None:
    costs = measured({15: 1.6})
    assert {n: costs.seconds(n) for n in (0, 1, 3, 7)} == pytest.approx({0: 0.25, 1: 0.34, 3: 0.52, 7: 0.88})


def test_a_narrow_width_never_costs_more_than_a_wide_one() -> None:
    assert measured({15: 1.0, 7: 1.5}).seconds(7) == 1.0


# --- the choice -------------------------------------------------------------------------------------------------------


def test_without_a_measurement_the_whole_block_is_proposed() -> None:
    assert {n: ProposalLength(CycleCosts()).choose(n) for n in range(1, 16)} == {n: n for n in range(1, 16)}


def test_every_width_is_tried_once_it_might_pay() -> None:
    """All cost the same here, which is known only after they were tried."""
    width, tried = ProposalLength(measured({15: 1.0})), []
    for accepts in (True, False, True):
        for _ in range(40):
            tried.append(width.choose(15))
            width.record(tried[-1], tried[-1] if accepts else 0, 1.0)
    assert set(tried[:40]) < set(tried) == set(LENGTHS.values())
    assert tried[39] == tried[-1] == 15


GPU = {0: 11.7, 1: 13.8, 3: 14.1, 7: 14.5, 15: 16.4}  # ms of an H100 and a 27B model: rows are nearly free
CPU = {0: 0.47, 1: 1.45, 3: 1.9, 7: 2.3, 15: 3.25}  # of two cores and the shipped pair


STEEP = {0: 1.0, 1: 1.2, 3: 1.6, 7: 2.4, 15: 4.5}


@pytest.mark.parametrize(
    ("costs", "accepted", "chosen"),
    [
        (GPU, 15, 15), (GPU, 5, 15), (GPU, 2, 7), (GPU, 0, 3),
        (CPU, 15, 15), (CPU, 12, 15), (CPU, 2, 0), (CPU, 0, 0),
        (STEEP, 15, 15), (STEEP, 7, 7), (STEEP, 2, 3),
    ],
)  # fmt: skip
def test_the_choice_follows_what_pays(costs: dict[int, float], accepted: int, chosen: int) -> None:
    assert after(costs, [accepted] * 20).choose(15) == chosen


def test_a_proposal_is_never_longer_than_asked() -> None:
    width = after(GPU, [15] * 20)
    assert [width.choose(n) for n in (1, 2, 3, 4, 7, 12, 15)] == [1, 2, 3, 4, 7, 12, 15]


def test_a_token_that_needs_a_wider_graph_is_left_out_when_it_does_not_pay() -> None:
    assert [after(CPU, [15] * 20).choose(n) for n in (8, 14)] == [7, 14]


def test_after_plain_steps_a_proposal_is_tried_again() -> None:
    width = after(CPU, [0] * 20)
    assert width.choose(15) == 0
    steps = 0
    while width.choose(15) == 0:
        width.record(0, 0, CPU[0])
        steps += 1
    assert 10 <= steps <= 60


def test_a_passage_that_is_hard_to_guess_is_left_quickly_and_found_again() -> None:
    """Texts change: 30 cycles in which everything is accepted, 60 tokens in which nothing is, and on."""
    width = after(CPU, [15] * 30)
    hard = []
    while len(hard) < 60:
        proposed = width.choose(15)
        hard.append(proposed)
        width.record(proposed, 0, CPU[proposed])
    assert hard[0] == 15
    assert np.count_nonzero(hard[:15]) <= 10
    assert np.count_nonzero(hard[15:]) <= 6
    easy = [width.choose(15)]
    while len(easy) < 30:
        width.record(easy[-1], easy[-1], CPU[easy[-1]])
        easy.append(width.choose(15))
    assert easy[-10:] == [15] * 10
