"""A draft's ring is as long as its layer can see, and holds the last positions of any text."""

from __future__ import annotations

import pytest

from pydflash.limits import TAPE_ROWS
from pydflash.ops import Rope
from pydflash.state import RingSpec, Room


def ring_of(window: int, positions: int) -> int:
    return RingSpec(window, True, Rope(64, 1e7), 1, 64).state(Room(positions, True)).capacity


@pytest.mark.parametrize("positions", [1, 255, 256, 257, 5000])
def test_the_ring_of_a_full_layer_holds_every_position(positions: int) -> None:
    assert positions <= ring_of(0, positions) < positions + 256


@pytest.mark.parametrize("window", [1, 24, 2048])
def test_the_ring_of_a_sliding_layer_holds_its_window_and_a_block(window: int) -> None:
    assert window + TAPE_ROWS <= ring_of(window, 1 << 20) < window + TAPE_ROWS + 256


def test_no_ring_is_longer_than_the_context() -> None:
    assert ring_of(2048, 300) == ring_of(0, 300) == 512


def test_a_last_row_is_for_padding() -> None:
    ring = RingSpec(24, True, Rope(64, 1e7), 2, 64).state(Room(4096, True))
    assert {part.shape for part in ring.parts().values()} == {(ring.capacity + 1, 128)}
