"""The state of a gated delta-net layer: S of the last committed token, and the window of raw rows (the tape).

Rolling back costs the window, not copies of S: the rows that were kept are replayed at the start of the next step
(ggml_ext/delta/delta_inputs.h, delta_rule.h).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydflash.ggml_types import GGMLType
from pydflash.limits import TAPE_ROWS
from pydflash.native import Shape, Tensor
from pydflash.state.layer import Extent, Layout, Part, Room

__all__ = ["DeltaSpec", "DeltaState"]


@dataclass(frozen=True)
class DeltaSpec:
    """A gated delta-net layer with a convolution before it."""

    k_heads: int
    v_heads: int
    state_size: int
    conv_kernel: int

    @property
    def state_shape(self) -> Shape:
        """(Hv, D + 1, D): S transposed, [head][value column][key row], and a row of its scale."""
        return self.v_heads, self.state_size + 1, self.state_size

    def window_shape(self, rows: int) -> Shape:
        """(kernel - 1 + rows, C + 2 Hv): committed history, then ``rows`` pending rows."""
        columns = (2 * self.k_heads + self.v_heads) * self.state_size + 2 * self.v_heads
        return self.conv_kernel - 1 + rows, columns

    def layout(self, length: int, replay: int) -> Layout:
        return {"state": (self.state_shape, "F32"), "window": (self.window_shape(replay), "F32")}

    def state(self, room: Room) -> DeltaState:
        return DeltaState(self, room.slots)


class DeltaState:
    """Tensors "state" and "window", f32, with a slot for each sequence."""

    def __init__(self, spec: DeltaSpec, slots: int) -> None:
        self.spec, self.slots = spec, slots
        self.tensors: Mapping[str, Tensor] = {}

    def parts(self) -> Mapping[str, Part]:
        return {
            "state": Part((self.slots, *self.spec.state_shape), GGMLType.F32, "delta-net state", cleared=True),
            "window": Part(
                (self.slots, *self.spec.window_shape(TAPE_ROWS)), GGMLType.F32, "rollback tape", cleared=True
            ),
        }

    def fill(self, write: Any) -> None:
        pass

    def extents(self, name: str, size: int, length: int, slot: int, pages: Sequence[int]) -> list[Extent]:
        return [Extent(slot * self.tensors[name].nbytes // self.slots, size)]
