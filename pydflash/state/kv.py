"""The K/V cache of an attention layer: a row a position, quantised and rotated as chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pydflash import ops
from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES, K_BASES, V_BASES, Basis
from pydflash.limits import PAGE
from pydflash.native import Tensor
from pydflash.ops import NormRope, Rope
from pydflash.state.layer import Batch, Extent, Layout, Part, Room

__all__ = ["CacheFormat", "KVCache", "KVPath", "KVSpec", "check_pair", "packed_rows", "rotation_signs"]


class CacheFormat(NamedTuple):
    """How a session keeps K and V: names of ``kv_format.CACHE_TYPES`` and ``K_BASES``."""

    cache_k: str
    cache_v: str
    k_basis: str
    v_basis: str


def check_pair(k_type: GGMLType, v_type: GGMLType, valid: Sequence[GGMLType]) -> None:
    """ConfigError unless the device's attention, exact and prefill, takes a cache of these types; ``valid`` are those.

    ggml's CUDA prefill converts every type to f16, built in as a pair or not; our CUDA kernel reads all but f32.
    """
    if k_type not in valid or v_type not in valid:
        raise ConfigError(
            f"cache_k {k_type.name.lower()} with cache_v {v_type.name.lower()}: attention on this device reads "
            f"{', '.join(t.name.lower() for t in valid)} only"
        )


def packed_rows(count: int, columns: int, dtype: GGMLType) -> tuple[tuple[int, int], str]:
    """``count`` rows of ``columns`` values as a snapshot keeps them."""
    return (count, dtype.nbytes(columns)), "U8"


def rotation_signs(group: int) -> npt.NDArray[np.float32]:
    """The fixed sign vectors D1 and D2 of a signed basis: (2, group) f32 of +1 and -1, from PCG64 seed 0x70796466."""
    generator = np.random.Generator(np.random.PCG64(0x70796466))
    return np.where(generator.integers(0, 2, (2, group)) == 1, 1.0, -1.0).astype(np.float32)


@dataclass(frozen=True)
class KVPath:
    """How raw Q, K and V get from a model's projections to attention and its tables, and the output back.

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
        self, k: Tensor, v: Tensor, norm: NormRope, positions: Tensor, rows: Tensor, tables: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """k, (T, Hkv, D), through ``norm`` and v into rows of the tables "k" and "v"; returns both after it."""
        graph, width = k.home, k.shape[1] * k.shape[2]
        k_table, v_table = tables["k"].within(graph), tables["v"].within(graph)
        if self.fused:
            k_table, v_table = ops.store_kv(
                k, v, norm, positions, rows, k_table, v_table,
                k_group=self.k.group, signs=self.signs, v_group=self.v.group,
            )  # fmt: skip
            return graph.effect(k_table), v_table
        k, v = self._rotated(norm(k, positions), self.k, self.signs), self._rotated(v, self.v)
        k_table = graph.effect(ops.set_rows(k_table, rows, k.reshape(k.shape[0], width)))
        return k_table, graph.effect(ops.set_rows(v_table, rows, v.reshape(v.shape[0], width)))

    def output(self, o: Tensor) -> Tensor:
        """Rotate the output of attention, (T, H, D), back from V's basis."""
        return self._rotated(o, self.v)

    @staticmethod
    def _rotated(x: Tensor, basis: Basis, signs: Tensor | None = None) -> Tensor:
        return ops.turbo_wht(x, basis.group, signs) if basis.group else x


@dataclass(frozen=True)
class KVSpec:
    """K and V of a full-attention layer; K is stored after RoPE."""

    cache_k: str
    cache_v: str
    k_basis: str
    v_basis: str
    rope: Rope
    kv_heads: int
    head_size: int

    def layout(self, length: int, replay: int) -> Layout:
        columns = self.kv_heads * self.head_size
        return {
            "k": packed_rows(length, columns, CACHE_TYPES[self.cache_k]),
            "v": packed_rows(length, columns, CACHE_TYPES[self.cache_v]),
        }

    def state(self, room: Room) -> KVCache:
        """Raises ConfigError for a type whose blocks do not fit the heads."""
        for setting, name in (("cache_k", self.cache_k), ("cache_v", self.cache_v)):
            if self.head_size % CACHE_TYPES[name].block_size:
                raise ConfigError(
                    f"{setting} {name} packs {CACHE_TYPES[name].block_size} values, heads hold {self.head_size}"
                )
        return KVCache(self, room)


class KVCache:
    """Tables "k" and "v": a row a position, page after page, and a last row for padding to fall into."""

    def __init__(self, spec: KVSpec, room: Room) -> None:
        self.spec, self.room = spec, room
        self.tensors: Mapping[str, Tensor] = {}

    def parts(self) -> Mapping[str, Part]:
        spec, k_basis = self.spec, K_BASES[self.spec.k_basis]
        shape = (self.room.positions + 1, spec.kv_heads * spec.head_size)
        parts = {
            "k": Part(shape, CACHE_TYPES[spec.cache_k], "K/V cache"),
            "v": Part(shape, CACHE_TYPES[spec.cache_v], "K/V cache"),
        }
        if k_basis.signed:
            parts["signs"] = Part((2, k_basis.group), GGMLType.F32, "K/V cache")
        return parts

    def fill(self, write: Callable[[Tensor, npt.NDArray[Any]], None]) -> None:
        if "signs" in self.tensors:
            write(self.tensors["signs"], rotation_signs(K_BASES[self.spec.k_basis].group))

    @property
    def path(self) -> KVPath:
        spec = self.spec
        return KVPath(self.room.fused, K_BASES[spec.k_basis], V_BASES[spec.v_basis], self.tensors.get("signs"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_norm: NormRope, k_norm: NormRope, batch: Batch) -> Tensor:
        """Normalise and turn q and k, store the rows' k and v, and attend: q (T, H, D), k and v (T, Hkv, D) to
        (T, H, D)."""
        path, kv_heads = self.path, self.spec.kv_heads
        span = batch.span if batch.pages is None else self.room.positions
        k_table, v_table = path.store(k, v, k_norm, batch.positions, batch.rows, self.tensors)
        k_view, v_view = k_table.slice(0, 0, span), v_table.slice(0, 0, span)
        q = path.query(q, q_norm, batch.positions)
        if batch.mask is not None:
            return path.output(ops.attention_prefill(q, k_view, v_view, batch.mask, kv_heads))
        o = ops.attention(
            q, k_view, v_view, batch.positions, kv_heads, pages=batch.pages, sequences=batch.sequences
        )  # fmt: skip
        return path.output(o)

    def extents(self, name: str, size: int, length: int, slot: int, pages: Sequence[int]) -> list[Extent]:
        row = self.tensors[name].dtype.nbytes(self.tensors[name].shape[1])
        found: list[Extent] = []
        for page, done in zip(pages, range(0, size, PAGE * row)):
            start, piece = page * PAGE * row, min(PAGE * row, size - done)
            if found and sum(found[-1]) == start:
                found[-1] = Extent(found[-1].offset, found[-1].size + piece)
            else:
                found.append(Extent(start, piece))
        return found
