"""Captured rows of the residual stream on their way to a draft, which reads them where they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pydflash.errors import StateError
from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS
from pydflash.native import Arena, Backend, Tensor
from pydflash.state import SequenceMemory

__all__ = ["Features"]

_WAITING = 2 * EXACT_ROWS  # rows that wait for a draft's next proposal, and those of the step after them


class Features:
    """(rows, layers, hidden) f32 on the device; the last row takes padding.

    A sequence alone has a ring of ``chunk`` rows, that of position p in row p % chunk. Sequences of a pool share this
    ring for steps of more than 16 rows, and have 32 rows each for the others.
    """

    def __init__(self, backend: Backend, layers: int, hidden: int, chunk: int, slots: int) -> None:
        """``slots``: sequences. Raises OutOfMemory."""
        self._chunk, self._shared = chunk, slots > 1
        self.padding = chunk + (slots * _WAITING if self._shared else 0)
        specs = {"features": ((self.padding + 1, layers, hidden), GGMLType.F32)}
        self._arena = Arena(backend, specs, "captured features")
        self._owner: SequenceMemory | None = None

    @property
    def tensor(self) -> Tensor:
        return self._arena["features"]

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    def written(self, positions: npt.NDArray[np.int32], memory: SequenceMemory, wide: bool) -> npt.NDArray[np.int32]:
        """The rows that a step, ``wide`` or not, writes for these positions."""
        if wide:
            self._owner = memory
        return self._rows(positions, memory, wide)

    def found(self, start: int, count: int, memory: SequenceMemory) -> npt.NDArray[np.int32]:
        """The rows of ``count`` positions that the last step, or up to 16 that several, wrote. StateError when those
        of another sequence lie there."""
        wide = count > EXACT_ROWS
        if wide and self._shared and self._owner is not memory:
            raise StateError(
                f"the features of {count} rows were overwritten by a forward of another session of this pool; commit a "
                f"forward of more than {EXACT_ROWS} rows to the draft before another session's"
            )
        return self._rows(np.arange(start, start + count, dtype=np.int32), memory, wide)

    def _rows(self, positions: npt.NDArray[np.int32], memory: SequenceMemory, wide: bool) -> npt.NDArray[np.int32]:
        if wide or not self._shared:
            return positions % self._chunk
        return self._chunk + _WAITING * memory.slot + positions % _WAITING

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        self._arena.close()
