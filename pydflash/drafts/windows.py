"""Where a draft's rows lie: what its graphs are told of rings and blocks, by the windows of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pydflash.native import Shape
from pydflash.state import Ring

__all__ = ["Windows"]

T = TypeVar("T")


class Windows:
    """The distinct windows of a draft's layers: layers of one window share the numbers of their rows and slots.

    A field "context ..." has a value for each injected row, the other fields one for each row of a block; "rows" have a
    line a window. "held N": the position that each slot of the ring of window N holds.
    """

    def __init__(self, rings: Sequence[Ring]) -> None:
        self.windows = sorted({ring.spec.window for ring in rings})
        self._of_layer = [self.windows.index(ring.spec.window) for ring in rings]
        self.capacities = [rings[self._of_layer.index(i)].capacity for i in range(len(self.windows))]

    def parallel(self, by_window: Sequence[T]) -> list[T]:
        """For each layer, the entry of its window."""
        return [by_window[i] for i in self._of_layer]

    def injection_fields(self, width: int) -> dict[str, Shape]:
        rows = (len(self.windows), width)
        return {"context positions": (width,), "context features": (width,), "context rows": rows}

    def block_fields(self, T: int) -> dict[str, Shape]:
        held = {f"held {window}": (capacity,) for window, capacity in zip(self.windows, self.capacities) if window}
        return {"tokens": (T,), "positions": (T,), "ends": (T,), "rows": (len(self.windows), T), **held}

    def write_injection(
        self, values: Mapping[str, npt.NDArray[np.int32]], start: int, found: npt.NDArray[np.int32]
    ) -> None:
        """Inject the positions from ``start`` on whose features lie in the rows ``found``.

        Padding falls into padding rows, and so do positions that later ones of the injection overwrite.
        """
        positions, features, count = values["context positions"], values["context features"], len(found)
        positions[:count] = np.arange(start, start + count)
        positions[count:] = -1
        features[:count] = found
        features[count:] = 0
        for rows, capacity in zip(values["context rows"], self.capacities):
            np.remainder(positions, capacity, out=rows)
            rows[count:] = rows[: max(count - capacity, 0)] = capacity

    def write_block(self, values: Mapping[str, npt.NDArray[np.int32]], anchor: int, start: int) -> None:
        """The block [anchor, MASK, ...] that begins at position ``start``."""
        positions = values["positions"]
        last = start + len(positions) - 1
        values["tokens"][0] = anchor
        positions[:] = np.arange(start, last + 1)
        values["ends"].fill(last)
        for window, capacity, rows in zip(self.windows, self.capacities, values["rows"]):
            np.remainder(positions, capacity, out=rows)
            if window:
                # A slot holds the last position up to the block's end that falls into it; negative: none yet.
                held = values[f"held {window}"]
                np.subtract(last, np.arange(capacity), out=held)
                held %= capacity
                np.subtract(last, held, out=held)
