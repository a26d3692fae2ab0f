"""What a session remembers: the K/V cache of the attention layers and the state of the delta-net layers.

Both follow one protocol. A step writes the rows it is given and leaves them pending; how many of them become part of
the sequence is told by the next step's inputs. K/V rows need nothing for that: a row beyond the committed length is
never seen and is overwritten. A delta-net layer replays the rows that were kept (ggml_ext/delta_inputs.h,
delta_rule.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pydflash import ops
from pydflash.backend import Arena, Backend
from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.graph import Graph
from pydflash.kv_format import CACHE_TYPES, K_BASES, V_BASES, Basis
from pydflash.limits import SLOT_STEP, TAPE_ROWS
from pydflash.ops import NormRope
from pydflash.tensor import Shape, Tensor

__all__ = [
    "DeltaState",
    "KVCache",
    "KVPath",
    "StepInputs",
    "check_pair",
    "state_shape",
    "tape_shape",
]


def check_pair(k_type: GGMLType, v_type: GGMLType, cuda: bool) -> None:
    """ConfigError unless the device's attention, exact and prefill, takes a cache of these types; the CPU takes any.

    ggml's CUDA prefill converts every type to f16, built in as a pair or not; our CUDA kernel reads all but f32.
    """
    valid = [name for name, dtype in CACHE_TYPES.items() if dtype != GGMLType.F32]
    if cuda and GGMLType.F32 in (k_type, v_type):
        raise ConfigError(
            f"cache_k {k_type.name.lower()} with cache_v {v_type.name.lower()}: attention on CUDA reads no f32 cache; "
            f"valid for either are {', '.join(valid)}"
        )


def rotation_signs(group: int) -> np.ndarray:
    """The fixed sign vectors D1 and D2 of a signed basis: (2, group) f32 of +1 and -1, from PCG64 seed 0x70796466."""
    generator = np.random.Generator(np.random.PCG64(0x70796466))
    return np.where(generator.integers(0, 2, (2, group)) == 1, 1.0, -1.0).astype(np.float32)


# --- how Q, K and V reach the cache -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KVPath:
    """How raw Q, K and V get from a model's projections to attention and its tables, and how the output gets back.

    ``fused``: one kernel each; else operation by operation, with the same bits. ``signs``: of a signed basis of K.
    """

    fused: bool
    k: Basis = K_BASES["none"]
    v: Basis = V_BASES["none"]
    signs: Tensor | None = None

    def query(self, q: Tensor, norm: NormRope, positions: Tensor) -> Tensor:
        """(T, H, D) through ``norm``, into K's basis."""
        if self.fused:
            return ops.norm_rope(q, norm, positions, self.k.group, self.signs)
        return self._rotated(norm(q, positions), self.k, self.signs)

    def store(
        self, k: Tensor, v: Tensor, norm: NormRope, positions: Tensor, rows: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """k, (T, Hkv, D), through ``norm`` and v into rows of the tables of K and V; returns the tables after it."""
        graph, width = k.graph, k.shape[1] * k.shape[2]
        assert graph is not None
        if self.fused:
            k_table, v_table = ops.store_kv(
                k, v, norm, positions, rows, *tables, k_group=self.k.group, signs=self.signs, v_group=self.v.group
            )
            return graph.effect(k_table), v_table
        k, v = self._rotated(norm(k, positions), self.k, self.signs), self._rotated(v, self.v)
        k_table = graph.effect(ops.set_rows(tables[0], rows, k.reshape(k.shape[0], width)))
        return k_table, graph.effect(ops.set_rows(tables[1], rows, v.reshape(v.shape[0], width)))

    def output(self, o: Tensor) -> Tensor:
        """What attention read from the table of V, (T, H, D), out of V's basis."""
        return self._rotated(o, self.v)

    @staticmethod
    def _rotated(x: Tensor, basis: Basis, signs: Tensor | None = None) -> Tensor:
        return ops.turbo_wht(x, basis.group, signs) if basis.group else x


# --- one step's inputs ------------------------------------------------------------------------------------------------


@dataclass
class StepInputs:
    """The tensors of one graph that say which rows a step holds. T rows, of which some may be padding.

    positions (T,) int32: absolute positions, -1 for padding. rows (T,) int32: cache rows to write. counts (2,) int32:
    rows to replay, real rows. slots: cache rows that this graph's attention spans. mask: (T, slots) f16 for steps wider
    than 16 rows.
    keep: the rows stay pending until a commit.
    """

    graph: Graph
    positions: Tensor
    rows: Tensor
    counts: Tensor
    slots: int
    keep: bool
    mask: Tensor | None = None


class CacheGeometry(Protocol):
    """What a cache needs to know of a model."""

    @property
    def attention_layers(self) -> Sequence[int]: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...


class KVCache:
    """K and V of every attention layer: one row per position, quantised as chosen, and a last row for padding to fall
    into.

    ``capacity``: positions, a multiple of 256. ``nbytes``: what it takes on the device.
    """

    def __init__(
        self,
        backend: Backend,
        geometry: CacheGeometry,
        capacity: int,
        k_type: GGMLType,
        v_type: GGMLType,
        basis: Basis,
        v_basis: Basis = V_BASES["none"],
        *,
        fused: bool = True,
    ) -> None:
        self.capacity, self.basis, self.v_basis, self.kv_heads = capacity, basis, v_basis, geometry.kv_heads
        self.k_type, self.v_type = k_type, v_type
        width = geometry.kv_heads * geometry.head_size
        for option, dtype in (("cache_k", k_type), ("cache_v", v_type)):
            if geometry.head_size % dtype.block_size:
                raise ConfigError(
                    f"{option} {dtype.name.lower()} packs {dtype.block_size} values, heads hold {geometry.head_size}"
                )
        specs: dict[str, tuple[Shape, GGMLType]] = {}
        for layer in geometry.attention_layers:
            specs[f"k.{layer}"] = ((capacity + 1, width), k_type)
            specs[f"v.{layer}"] = ((capacity + 1, width), v_type)
        if basis.signed:
            specs["signs"] = ((2, basis.group), GGMLType.F32)
        self.arena = Arena(backend, specs, f"a K/V cache of {capacity:,} positions")
        if basis.signed:
            backend.write(self.arena["signs"], rotation_signs(basis.group))
        self.path = KVPath(fused, basis, v_basis, self.arena["signs"] if basis.signed else None)

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    @property
    def padding_row(self) -> int:
        """The row that padding is written to and nothing reads."""
        return self.capacity

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_norm: NormRope, k_norm: NormRope, step: StepInputs
    ) -> Tensor:
        """Normalise and turn q and k, store the rows' k and v, and attend: q (T, H, D), k and v (T, Hkv, D) to
        (T, H, D)."""
        tables = (self.arena[f"k.{layer}"].within(step.graph), self.arena[f"v.{layer}"].within(step.graph))
        k_table, v_table = self.path.store(k, v, k_norm, step.positions, step.rows, tables)
        k_view, v_view = k_table.slice(0, 0, step.slots), v_table.slice(0, 0, step.slots)
        q = self.path.query(q, q_norm, step.positions)
        if step.mask is None:
            return self.path.output(ops.attention(q, k_view, v_view, step.positions, self.kv_heads))
        return self.path.output(ops.attention_prefill(q, k_view, v_view, step.mask, self.kv_heads))

    def close(self) -> None:
        self.arena.close()


class DeltaGeometry(Protocol):
    """What the delta-net state needs to know of a model."""

    @property
    def delta_layers(self) -> Sequence[int]: ...
    @property
    def k_heads(self) -> int: ...
    @property
    def v_heads(self) -> int: ...
    @property
    def state_size(self) -> int: ...
    @property
    def conv_kernel(self) -> int: ...


def tape_shape(geometry: DeltaGeometry) -> tuple[int, int]:
    """Rows and f32 columns of a layer's window: committed history and the tape, all that rolling back costs."""
    columns = (2 * geometry.k_heads + geometry.v_heads) * geometry.state_size + 2 * geometry.v_heads
    return geometry.conv_kernel - 1 + TAPE_ROWS, columns


def state_shape(geometry: DeltaGeometry) -> Shape:
    """(Hv, D + 1, D) of a layer's state: S transposed, [head][value column][key row], and a row of its scale."""
    return geometry.v_heads, geometry.state_size + 1, geometry.state_size


class DeltaState:
    """State of the gated delta-net layers: S of the last committed token, and the window of raw columns (the tape).

    Rolling back costs the window, not copies of S: ``tape_nbytes`` against ``state_nbytes`` per copy.
    """

    def __init__(self, backend: Backend, geometry: DeltaGeometry) -> None:
        state, window = state_shape(geometry), tape_shape(geometry)
        specs: dict[str, tuple[Shape, GGMLType]] = {}
        for layer in geometry.delta_layers:
            specs[f"state.{layer}"] = (state, GGMLType.F32)
            specs[f"window.{layer}"] = (window, GGMLType.F32)
        self.arena = Arena(backend, specs, "the delta-net state")
        self.tape_nbytes = len(geometry.delta_layers) * math.prod(window) * 4
        self.state_nbytes = len(geometry.delta_layers) * math.prod(state) * 4

    def state(self, layer: int) -> Tensor:
        """f32 of :func:`state_shape`, of one layer."""
        return self.arena[f"state.{layer}"]

    def window(self, layer: int) -> Tensor:
        """(kernel - 1 + 16, C + 2 Hv) f32 of a layer: committed history, then pending rows."""
        return self.arena[f"window.{layer}"]

    def close(self) -> None:
        self.arena.close()


# --- the draft's context ----------------------------------------------------------------------------------------------


@dataclass
class DraftInputs:
    """The tensors of one draft graph. T rows of the block; ``rings`` says, per layer, which entry of the lists is its
    own.

    positions (T,) int32: the block's own positions. ends (T,) int32: the last of them in every row, which is how far a
    full layer's rows see. rows: per ring, (T,) int32, where block K/V are written. slots: per ring, rows of the table
    to attend over.
    slot_positions: per ring, (slots,) int32 or None where slot s holds position s.
    """

    graph: Graph
    positions: Tensor
    ends: Tensor
    rings: Sequence[int]
    rows: Sequence[Tensor]
    slots: Sequence[int]
    slot_positions: Sequence[Tensor | None]


class DraftGeometry(Protocol):
    """What the draft's cache needs to know of a draft."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def windows(self) -> Sequence[int]: ...
    @property
    def causal(self) -> Sequence[bool]: ...


class DraftCache:
    """K and V that target features inject, one ring per distinct window: sliding layers remember no more than they can
    see.

    ``windows``: the distinct windows, 0 for full attention; ``capacities``: slots of each ring. A ring holds position p
    in slot p % capacity; the ring of full layers is as long as the context, so that slot p is position p. Padding falls
    into a last row.
    """

    dtype = GGMLType.F16
    """Of K and V."""

    def __init__(self, backend: Backend, geometry: DraftGeometry, context: int, *, fused: bool = True) -> None:
        """``context``: positions that a full layer must hold, the block included."""
        self.geometry, self.path = geometry, KVPath(fused)
        self.windows = sorted(set(geometry.windows))
        self.ring_of = [self.windows.index(w) for w in geometry.windows]
        full = -(-context // 256) * 256
        step = SLOT_STEP
        self.capacities = [min(full, -(-(w + TAPE_ROWS) // step) * step) if w else full for w in self.windows]
        width = geometry.kv_heads * geometry.head_size
        specs: dict[str, tuple[Shape, GGMLType]] = {}
        for layer in range(geometry.layers):
            for side in "kv":
                specs[f"{side}.{layer}"] = ((self.capacities[self.ring_of[layer]] + 1, width), self.dtype)
        self.arena = Arena(backend, specs, f"the draft's cache of {context:,} positions")

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def store(
        self, layer: int, k: Tensor, v: Tensor, k_norm: NormRope, positions: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalise and turn k, and write k and v, (T, Hkv, D) each, to table rows; returns the layer's tables after
        it."""
        graph = k.graph
        assert graph is not None
        tables = (self.arena[f"k.{layer}"].within(graph), self.arena[f"v.{layer}"].within(graph))
        return self.path.store(k, v, k_norm, positions, rows, tables)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_norm: NormRope, k_norm: NormRope, inputs: DraftInputs
    ) -> Tensor:
        """Normalise and turn q and k, store the block's k and v and attend over [context | block]: q (T, H, D) to
        (T, H, D)."""
        ring, window, causal = self.ring_of[layer], self.geometry.windows[layer], self.geometry.causal[layer]
        k_table, v_table = self.store(layer, k, v, k_norm, inputs.positions, inputs.rows[ring])
        q = self.path.query(q, q_norm, inputs.positions)
        slots = inputs.slots[ring]
        k_view, v_view = k_table.slice(0, 0, slots), v_table.slice(0, 0, slots)
        if window:
            return ops.attention(
                q, k_view, v_view, inputs.positions, self.geometry.kv_heads,
                causal=causal, window=window, slot_positions=inputs.slot_positions[ring],
            )  # fmt: skip
        # A full layer sees the context and the whole block: everything up to the block's last row.
        reach = inputs.positions if causal else inputs.ends
        return ops.attention(q, k_view, v_view, reach, self.geometry.kv_heads)

    def close(self) -> None:
        self.arena.close()
