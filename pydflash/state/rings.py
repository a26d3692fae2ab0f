"""The context of a DFlash draft's layer: K and V of target features, in a ring as long as the layer can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.limits import SLOT_STEP, TAPE_ROWS
from pydflash.native import Graph, Tensor
from pydflash.ops import NormRope, Rope
from pydflash.state.kv import KVPath, packed_rows
from pydflash.state.layer import Extent, Layout, Part, Room

__all__ = ["Ring", "RingBatch", "RingSpec"]


@dataclass
class RingBatch:
    """The rows of a draft's block, as the tensors of one graph, for layers of one window. T rows.

    positions (T,) int32: the block's own positions. ends (T,) int32: the last of them in every row, up to which a full
    layer's rows see. rows (T,) int32: where block K/V are written. slots: rows of the table to attend over.
    slot_positions: (slots,) int32, or None where slot s holds position s.
    """

    graph: Graph
    positions: Tensor
    ends: Tensor
    rows: Tensor
    slots: int
    slot_positions: Tensor | None


@dataclass(frozen=True)
class RingSpec:
    """A draft's attention layer. ``window``: positions that it sees, 0 for all. ``causal``: rows of a block see only
    earlier rows."""

    window: int
    causal: bool
    rope: Rope
    kv_heads: int
    head_size: int

    def layout(self, length: int, replay: int) -> Layout:
        if replay:
            raise ShapeError(f"a draft session has no rows to replay, found {replay}")
        rows = min(length, self.window) if self.window else length
        array = packed_rows(rows, self.kv_heads * self.head_size, Ring.dtype)
        return {"k": array, "v": array}

    def state(self, room: Room) -> Ring:
        return Ring(self, room)


class Ring:
    """Tables "k" and "v" of ``capacity`` slots, and a last row for padding. Position p lies in slot p % capacity.

    The ring of a full layer is as long as the context, so that slot p is position p.
    """

    dtype = GGMLType.F16
    """Type of K and V."""

    def __init__(self, spec: RingSpec, room: Room) -> None:
        self.spec, self.path = spec, KVPath(room.fused)
        full = -(-room.positions // 256) * 256
        seen = -(-(spec.window + TAPE_ROWS) // SLOT_STEP) * SLOT_STEP
        self.capacity = min(full, seen) if spec.window else full
        self.tensors: Mapping[str, Tensor] = {}

    def parts(self) -> Mapping[str, Part]:
        part = Part((self.capacity + 1, self.spec.kv_heads * self.spec.head_size), self.dtype, "draft cache")
        return {"k": part, "v": part}

    def fill(self, write: Any) -> None:
        pass

    def extents(self, name: str, size: int, length: int, slot: int, pages: Sequence[int]) -> list[Extent]:
        row = self.dtype.nbytes(self.spec.kv_heads * self.spec.head_size)
        first = (length - size // row) % self.capacity
        until_end = min(size, (self.capacity - first) * row)
        found = [Extent(first * row, until_end), Extent(0, size - until_end)]
        return [extent for extent in found if extent.size]

    def store(self, k: Tensor, v: Tensor, k_norm: NormRope, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and turn k, and write k and v, (T, Hkv, D) each, to table rows; returns the tables after it."""
        return self.path.store(k, v, k_norm, positions, rows, self.tensors)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_norm: NormRope, k_norm: NormRope, batch: RingBatch) -> Tensor:
        """Normalise and turn q and k, store the block's k and v and attend over [context | block]: q (T, H, D) to
        (T, H, D)."""
        spec = self.spec
        k_table, v_table = self.store(k, v, k_norm, batch.positions, batch.rows)
        q = self.path.query(q, q_norm, batch.positions)
        k_view, v_view = k_table.slice(0, 0, batch.slots), v_table.slice(0, 0, batch.slots)
        if spec.window:
            return ops.attention(
                q, k_view, v_view, batch.positions, spec.kv_heads,
                causal=spec.causal, window=spec.window, slot_positions=batch.slot_positions,
            )  # fmt: skip
        # A full layer sees the context and the whole block: everything up to the block's last row.
        reach = batch.positions if spec.causal else batch.ends
        return ops.attention(q, k_view, v_view, reach, spec.kv_heads)
