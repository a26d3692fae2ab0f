"""What a delta-net layer keeps: one state, and rows to roll back to."""

from __future__ import annotations

import math

import pytest

from pydflash.limits import TAPE_ROWS
from pydflash.state import DeltaSpec, Room

# The delta-net geometry of the 27B model, of which 48 of 64 layers are.
FULL, LAYERS = DeltaSpec(k_heads=16, v_heads=48, state_size=128, conv_kernel=4), 48


def test_rolling_back_the_27b_model_takes_at_most_40_mib(capsys: pytest.CaptureFixture[str]) -> None:
    tape, states = (LAYERS * 4 * math.prod(shape) for shape in (FULL.window_shape(TAPE_ROWS), FULL.state_shape))
    with capsys.disabled():
        print(f"\nrollback of the 27B geometry: {tape / 2**20:.1f} MiB; a copy of its states: {states / 2**20:.0f} MiB")
    assert tape <= 40 * 2**20


def test_a_layer_allocates_one_state_and_a_whole_tape_whatever_the_context() -> None:
    for positions in (1, 1 << 20):
        parts = FULL.state(Room(positions, True)).parts()
        assert {name: part.shape for name, part in parts.items()} == {
            "state": (1, *FULL.state_shape), "window": (1, *FULL.window_shape(TAPE_ROWS)),
        }  # fmt: skip
        assert all(part.cleared for part in parts.values())


@pytest.mark.parametrize("replay", [0, 1, TAPE_ROWS])
def test_a_snapshot_keeps_the_rows_to_be_replayed_only(replay: int) -> None:
    layout = FULL.layout(1000, replay)
    assert layout["state"] == (FULL.state_shape, "F32")
    assert layout["window"] == ((3 + replay, FULL.window_shape(0)[1]), "F32")
