"""Pages and slots: what is taken comes back, to whoever opened, shared or dropped it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from pydflash.errors import DeviceError, OutOfMemory, StateError
from pydflash.limits import PAGE
from pydflash.native import Backend
from pydflash.ops import Rope
from pydflash.state import DeltaSpec, KVSpec, Pages, Room, SequenceMemory, SequencePool, bytes_of, pages_for

DELTA = DeltaSpec(k_heads=2, v_heads=4, state_size=32, conv_kernel=4)
ATTENTION = KVSpec("q8_0", "f16", "none", "none", Rope(16, 1e7), kv_heads=2, head_size=64)
SPECS = (DELTA, ATTENTION)


class Owner:
    pass


@pytest.fixture
def pool(cpu: Backend) -> Iterator[SequencePool]:
    pool = SequencePool(cpu, SPECS, slots=3, pages=8, longest=4, fused=True, paged=True)
    yield pool
    pool.close()


def tables(cpu: Backend, pool: SequencePool) -> np.ndarray:
    assert pool.tables is not None
    out = np.empty(pool.tables.shape, np.int32)
    cpu.read(pool.tables, out)
    return out


def test_pages_are_counted_by_the_tables_that_they_stand_in() -> None:
    pages = Pages(3)
    assert (len(pages), pages.free) == (3, 3)
    first, second = pages.take(), pages.take()
    assert (first, second, pages.free) == (0, 1, 1)
    pages.share(first)
    pages.release(first)
    assert pages.free == 1  # one table is left
    pages.release(first)
    assert pages.free == 2
    assert pages.take() == first  # the lowest is taken first
    pages.take()
    with pytest.raises(IndexError):
        pages.take()


@pytest.mark.parametrize(("positions", "count"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2)])
def test_a_page_is_taken_for_its_first_position(positions: int, count: int) -> None:
    assert pages_for(positions) == count


def test_a_sequence_finds_its_rows_through_its_pages(cpu: Backend, pool: SequencePool) -> None:
    owners = Owner(), Owner()
    one, other = (pool.open(owner) for owner in owners)
    pool.grow([(one, 1)])
    pool.grow([(other, 300)])
    pool.grow([(one, 2 * PAGE)])
    assert (one.pages, other.pages) == ([0, 3], [1, 2])
    assert one.rows(0, 2 * PAGE).tolist() == [*range(PAGE), *range(3 * PAGE, 4 * PAGE)]
    for start, count, rows in ((7, 2, [7, 8]), (PAGE + 7, 1, [3 * PAGE + 7]), (PAGE - 1, 2, [PAGE - 1, 3 * PAGE])):
        assert one.rows(start, count).tolist() == rows
    found = tables(cpu, pool)
    assert (found[one.slot, :2].tolist(), found[other.slot, :2].tolist()) == ([0, 3], [1, 2])


def test_pages_that_are_not_there_change_nothing_and_say_what_would_do(pool: SequencePool) -> None:
    owners = Owner(), Owner()
    one, other = (pool.open(owner) for owner in owners)
    pool.grow([(one, 4 * PAGE), (other, 2 * PAGE + 1)])
    assert pool.pages.free == 1
    with pytest.raises(OutOfMemory, match=r"1 of 8 pages free and 2 more .* cache_tokens >= 2,304$"):
        pool.grow([(other, 3 * PAGE), (pool.open(Owner()), 257)])
    assert (pool.pages.free, len(other.pages)) == (1, 3)
    pool.shrink(one, 1)
    assert (one.pages, pool.pages.free) == ([0], 4)


def test_a_slot_is_zero_for_whoever_opens_it_and_others_keep_theirs(cpu: Backend, pool: SequencePool) -> None:
    owners = [Owner() for _ in range(3)]
    memories = [pool.open(owner) for owner in owners]
    for name in ("state.0", "window.0"):
        tensor = pool.state.tensor(name)
        cpu.write(tensor, np.full(tensor.nbytes, 7, np.uint8))
    with pytest.raises(StateError, match="all 3 sequences of this pool are open; close one"):
        pool.open(Owner())
    pool.release(memories[1])
    pool.release(memories[1])  # harmless
    again = pool.open(owners[1])
    assert again.slot == 1
    for name in ("state.0", "window.0"):
        tensor = pool.state.tensor(name)
        found = np.empty((3, tensor.nbytes // 3), np.uint8)
        cpu.read(tensor, found)
        assert [set(np.unique(slot).tolist()) for slot in found] == [{7}, {0}, {7}]


def test_what_nobody_refers_to_any_more_is_taken_back(pool: SequencePool) -> None:
    owners = [Owner() for _ in range(3)]
    for owner in owners:
        pool.grow([(pool.open(owner), 500)])
    assert (pool.free_slots, pool.pages.free) == (0, 2)
    del owner
    owners.clear()
    gc.collect()
    assert (pool.free_slots, pool.pages.free) == (3, 8)


def test_arrays_lie_where_the_pages_and_the_slot_say_and_neighbours_are_one_piece(pool: SequencePool) -> None:
    memory = SequenceMemory(slot=2, longest=4)
    memory.table[:], memory.held = [2, 3, 7, 1], 4
    k, state = pool.state.layers[1], pool.state.layers[0]
    row = k.tensors["k"].nbytes // (pool.positions + 1)
    assert k.extents("k", 600 * row, 600, 2, memory.pages) == [
        (2 * PAGE * row, 2 * PAGE * row), (7 * PAGE * row, 88 * row),
    ]  # fmt: skip
    assert k.extents("k", 0, 0, 2, memory.pages) == []
    whole = state.tensors["state"].nbytes // 3
    assert state.extents("state", whole, 600, 2, memory.pages) == [(2 * whole, whole)]


def test_what_a_pool_will_take_is_known_before(cpu: Backend, pool: SequencePool) -> None:
    needed, taken = bytes_of(SPECS, Room(pool.positions, True, 3)), sum(pool.state.sizes().values())
    assert 0 <= taken - needed <= 64 * 4  # alignment
    assert pool.sizes().keys() - pool.state.sizes().keys() == {"page tables"}


def test_without_pages_there_is_one_sequence(cpu: Backend) -> None:
    with pytest.raises(DeviceError, match=r"a pool of 2 sequences was asked for, .* open a Session for each"):
        SequencePool(cpu, SPECS, slots=2, pages=2, longest=1, fused=True, paged=False)
    pool = SequencePool(cpu, SPECS, slots=1, pages=2, longest=2, fused=True, paged=False)
    assert pool.tables is None
    pool.close()
