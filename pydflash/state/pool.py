"""The memory of several sequences: K/V in pages, delta-net states and tapes in slots, and what belongs to whom."""

from __future__ import annotations

import heapq
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.errors import DeviceError, OutOfMemory, StateError
from pydflash.ggml_types import GGMLType
from pydflash.limits import PAGE
from pydflash.native import Arena, Backend, Tensor
from pydflash.state.layer import LayerSpec, LayerState, Room
from pydflash.state.sequence import SequenceState

__all__ = ["Pages", "SequenceMemory", "SequencePool", "bytes_of", "pages_for"]


def pages_for(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


def bytes_of(specs: Sequence[LayerSpec], room: Room) -> int:
    """Bytes that the states of all layers take, but for alignment."""
    parts = (part for spec in specs for part in spec.state(room).parts().values())
    return sum(part.dtype.nbytes(part.shape[-1]) * int(np.prod(part.shape[:-1])) for part in parts)


class Pages:
    """The pages of a cache by number, each with a count of the tables that it stands in. The lowest are taken first, so
    that those of one sequence lie in order where they can."""

    def __init__(self, count: int) -> None:
        self._counts = [0] * count
        self._free = list(range(count))

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def free(self) -> int:
        """Pages that stand in no table."""
        return len(self._free)

    def take(self) -> int:
        """A free page, from now on counted once. IndexError when there is none."""
        page = heapq.heappop(self._free)
        self._counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count a page that is taken once more."""
        self._counts[page] += 1

    def release(self, page: int) -> None:
        """Count a page once less; it is free when nothing is left."""
        self._counts[page] -= 1
        if not self._counts[page]:
            heapq.heappush(self._free, page)


class SequenceMemory:
    """What one sequence has of a pool: a slot, and pages for its first positions."""

    def __init__(self, slot: int, longest: int) -> None:
        """``longest``: pages that it can have."""
        self.slot = slot
        self.table: npt.NDArray[np.int32] = np.zeros(longest, np.int32)
        self.held = 0

    @property
    def pages(self) -> list[int]:
        """The page of positions 0 to 255, of those up to 511, and so on."""
        found: list[int] = self.table[: self.held].tolist()
        return found

    def rows(self, start: int, count: int) -> npt.NDArray[np.int32]:
        """The cache rows of ``count`` positions from ``start`` on."""
        first = int(self.table[start // PAGE]) * PAGE + start % PAGE
        if start % PAGE + count <= PAGE:  # as almost always, when a step has few rows
            return np.arange(first, first + count, dtype=np.int32)
        positions = np.arange(start, start + count, dtype=np.int32)
        found: npt.NDArray[np.int32] = self.table[positions // PAGE] * PAGE + positions % PAGE
        return found


class SequencePool:
    """The states of all layers for a number of sequences. ``close()`` frees them.

    ``state``: the states. ``pages``: those of the K/V cache. ``tables``: (slots, N) int32, the page table
    of each slot, where attention is ``paged``; elsewhere there is one sequence, and its pages lie in order.
    """

    def __init__(
        self, backend: Backend, specs: Sequence[LayerSpec], *, slots: int, pages: int, longest: int, fused: bool,
        paged: bool,
    ) -> None:  # fmt: skip
        """``longest``: pages of one sequence at most. Raises ConfigError, OutOfMemory, DeviceError."""
        if not paged and slots > 1:
            raise DeviceError(
                f"a pool of {slots} sequences was asked for, and attention on {backend.name} reads the cache of one; "
                "open a Session for each"
            )
        self._backend, self._longest = backend, longest
        self.pages = Pages(pages)
        self._slots = list(range(slots))
        self.slots = slots
        self._abandoned: deque[SequenceMemory] = deque()
        self._arena: Arena | None = None
        self.state: SequenceState[LayerState] = SequenceState(backend, specs, Room(pages * PAGE, fused, slots))
        try:
            if paged:
                self._arena = Arena(backend, {"pages": ((slots, longest), GGMLType.I32)}, "page tables")
        except BaseException:
            self.close()
            raise

    @property
    def tables(self) -> Tensor | None:
        return None if self._arena is None else self._arena["pages"]

    @property
    def positions(self) -> int:
        """Positions of all sequences together; the cache row of this number takes padding."""
        return len(self.pages) * PAGE

    @property
    def free_slots(self) -> int:
        """Sequences that can still be opened."""
        self._reclaim()
        return len(self._slots)

    def open(self, owner: Any) -> SequenceMemory:
        """Memory of an empty sequence, given back by ``release`` or when ``owner`` is collected. StateError when all
        slots are taken."""
        self._reclaim()
        if not self._slots:
            raise StateError(
                f"all {self.slots} sequences of this pool are open; close one, or open the pool with a larger "
                "max_sequences"
            )
        memory = SequenceMemory(heapq.heappop(self._slots), self._longest)
        weakref.finalize(owner, self._abandoned.append, memory).atexit = False
        self.state.clear(memory.slot)
        return memory

    def grow(self, needs: Sequence[tuple[SequenceMemory, int]]) -> None:
        """Give each sequence the pages that it lacks for so many positions. OutOfMemory when they are not free, and
        then nothing has changed."""
        if all(length <= memory.held * PAGE for memory, length in needs):
            return
        self._reclaim()
        missing = [(memory, pages_for(length) - memory.held) for memory, length in needs]
        count = sum(max(more, 0) for _, more in missing)
        if count > self.pages.free:
            raise OutOfMemory(
                f"the K/V cache of this pool has {self.pages.free:,} of {len(self.pages):,} pages free and {count:,} "
                f"more were asked for, of {PAGE} positions each; close or reset a session, or open the pool with "
                f"cache_tokens >= {(len(self.pages) - self.pages.free + count) * PAGE:,}"
            )
        for memory, more in missing:
            if more > 0:
                self._extend(memory, more)

    def shrink(self, memory: SequenceMemory, length: int) -> None:
        """Take back the pages that so many positions do not need."""
        needed = pages_for(length)
        for page in memory.pages[needed:]:
            self.pages.release(page)
        memory.held = min(memory.held, needed)

    def clear(self, memory: SequenceMemory) -> None:
        """Forget the sequence; its slot stays its own."""
        self.shrink(memory, 0)
        self.state.clear(memory.slot)

    def release(self, memory: SequenceMemory) -> None:
        """Take back everything that the sequence has. Harmless when that was done."""
        if memory.slot >= 0:
            self.shrink(memory, 0)
            heapq.heappush(self._slots, memory.slot)
            memory.slot = -1

    def sizes(self) -> Mapping[str, int]:
        """Bytes on the device, by what they are for."""
        tables = {} if self._arena is None else {"page tables": self._arena.nbytes}
        return self.state.sizes() | tables

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        self.state.close()
        if self._arena is not None:
            self._arena.close()

    def _extend(self, memory: SequenceMemory, more: int) -> None:
        first = memory.held
        memory.table[first : first + more] = [self.pages.take() for _ in range(more)]
        memory.held += more
        if self.tables is not None:
            offset = memory.table.itemsize * (memory.slot * self._longest + first)
            self._backend.write(self.tables, memory.table[first : memory.held], offset)

    def _reclaim(self) -> None:
        """Take back what the collector's sequences had."""
        while self._abandoned:
            self.release(self._abandoned.popleft())
