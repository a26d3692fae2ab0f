"""Heads of Q, K and V on their way to attention and its tables: norm, RoPE, rotation, and all of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.limits import MAX_HEAD
from pydflash.native import Tensor
from pydflash.ops.node import custom, require
from pydflash.ops.norms import rms_norm

__all__ = ["NormRope", "Rope", "norm_rope", "rope", "store_kv", "turbo_wht"]


@dataclass(frozen=True)
class Rope:
    """A rotary embedding of the first ``dims`` values of a head; ``base`` is the frequencies' (rope.h).

    With scaling, pairs from ``high`` on turn ``factor`` times slower, those before ``low`` as without, those between in
    a linear mixture; low and high are 0 for linear scaling. What has turned is multiplied by ``magnitude``.
    """

    dims: int
    base: float
    factor: float = 1.0
    low: int = 0
    high: int = 0
    magnitude: float = 1.0

    def params(self) -> list[int | float]:
        """Of a node."""
        return [self.dims, float(self.base), float(self.factor), self.low | self.high << 16, float(self.magnitude)]


def rope(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of the first ``rope.dims`` values of each head, by the reference's angles (rope.h).

    (T, H, D), strided or not, D at most 256, and positions (T,) int32 to (T, H, D); NEOX pairs (i, i + dims/2). For
    text, Qwen's interleaved multi-axis RoPE has the same position on every axis and equals this.
    """
    require(
        len(x.shape) == 3 and x.shape[2] <= MAX_HEAD and x.dtype == GGMLType.F32 and x.c.nb[0] == 4,
        f"rope: {x!r} is not (T, H, D) f32 with D at most {MAX_HEAD} and contiguous heads",
    )
    _check_rope("rope", x, positions, rope)
    return custom(lib.PYDFLASH_OP_ROPE, [x, positions], x.shape, rope.params())


def turbo_wht(x: Tensor, group: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Walsh-Hadamard rotation of each group of ``group`` values of the last axis (turbo_wht.h).

    ``signs`` (2, group) f32 holds the sign vectors D1 and D2 of the signed form. Orthonormal; ``inverse`` undoes it.
    """
    require(group in (64, 128, 256), f"turbo_wht: group {group} is not one of 64, 128, 256")
    require(x.shape[-1] % group == 0, f"turbo_wht: group {group} does not divide the last axis of {x!r}")
    require(signs is None or signs.shape == (2, group), f"turbo_wht: signs {signs!r} are not (2, {group})")
    require(x.dtype == GGMLType.F32, f"turbo_wht: {x!r} is not f32")
    operands = [x] if signs is None else [x, signs]
    return custom(lib.PYDFLASH_OP_TURBO_WHT, operands, x.shape, [group, int(inverse)])


@dataclass(frozen=True)
class NormRope:
    """What a head of Q or of K goes through: RMS norm by ``weight`` (D,), then ``rope``."""

    weight: Tensor
    eps: float
    rope: Rope

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T, H, D) and (T,) int32 positions to (T, H, D), one operation after the other."""
        return rope(rms_norm(x, self.weight, self.eps), positions, self.rope)


def norm_rope(x: Tensor, norm: NormRope, positions: Tensor, group: int = 0, signs: Tensor | None = None) -> Tensor:
    """``norm``, then ``turbo_wht`` unless ``group`` is 0, in one kernel with the same bits (norm_rope.h).

    (T, H, D), strided or not, to (T, H, D). D is 64, 128 or 256; the rest as in ``rope`` and ``turbo_wht``.
    """
    _check_heads("norm_rope", x, norm, positions, group, signs)
    operands = [x, norm.weight, positions] if signs is None else [x, norm.weight, positions, signs]
    return custom(lib.PYDFLASH_OP_NORM_ROPE, operands, x.shape, [*norm.rope.params(), float(norm.eps), group])


def store_kv(
    k: Tensor,
    v: Tensor,
    norm: NormRope,
    positions: Tensor,
    rows: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    *,
    k_group: int = 0,
    signs: Tensor | None = None,
    v_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """K through ``norm`` and rotated, and V rotated, into rows of their tables, in one kernel (store_kv.h).

    k and v (T, Hkv, D), strided or not; rows (T,) int32; tables (P, Hkv*D), each of any cache type.
    ``signs`` are K's; a group of 0 does not rotate. Returns both tables after it, with ``set_rows``'s bytes.
    """
    _check_heads("store_kv", k, norm, positions, k_group, signs)
    _check_group("store_kv", v, v_group, None)
    require(v.shape == k.shape and v.dtype == GGMLType.F32, f"store_kv: v {v!r} does not fit k {k!r}")
    require(
        rows.dtype == GGMLType.I32 and rows.shape == k.shape[:1], f"store_kv: {rows!r} are not a row for each of {k!r}"
    )
    width = k.shape[1] * k.shape[2]
    for table in (k_table, v_table):
        require(
            len(table.shape) == 2 and table.shape[1] == width and table.dtype in CACHE_TYPES.values(),
            f"store_kv: table {table!r} is not (P, {width}) of {', '.join(CACHE_TYPES)}",
        )
    operands = [k, v, norm.weight, positions, rows, k_table, v_table, *(() if signs is None else (signs,))]
    params = [*norm.rope.params(), float(norm.eps), k_group, v_group]
    # The node is a view of K's table. V's table stays the same tensor, and what reads it comes later in program order.
    return custom(lib.PYDFLASH_OP_STORE_KV, operands, k_table.shape, params, inplace=k_table), v_table


def _check_heads(op: str, x: Tensor, norm: NormRope, positions: Tensor, group: int, signs: Tensor | None) -> None:
    """Check heads (T, H, D) of Q or K for the fused operations."""
    require(
        len(x.shape) == 3 and x.shape[2] in (64, 128, 256) and x.dtype == GGMLType.F32 and x.c.nb[0] == 4,
        f"{op}: {x!r} is not (T, H, D) f32 with D 64, 128 or 256 and contiguous heads",
    )
    require(
        norm.weight.shape == x.shape[2:] and norm.weight.dtype == GGMLType.F32,
        f"{op}: weight {norm.weight!r} does not fit {x!r}",
    )
    _check_rope(op, x, positions, norm.rope)
    _check_group(op, x, group, signs)


def _check_rope(op: str, x: Tensor, positions: Tensor, rope: Rope) -> None:
    require(
        positions.shape == x.shape[:1] and positions.dtype == GGMLType.I32,
        f"{op}: positions {positions!r} are not an i32 for each row of {x!r}",
    )
    require(0 < rope.dims <= x.shape[2] and rope.dims % 2 == 0, f"{op}: RoPE of {rope.dims} dims of {x!r}")
    require(
        rope.factor >= 1 and 0 <= rope.low <= rope.high < 1 << 15 and rope.magnitude > 0,
        f"{op}: {rope!r} does not scale positions",
    )


def _check_group(op: str, x: Tensor, group: int, signs: Tensor | None) -> None:
    require(group in (0, 64, 128, 256), f"{op}: group {group} is not one of 0, 64, 128, 256")
    require(not group or x.shape[-1] % group == 0, f"{op}: group {group} does not divide the last axis of {x!r}")
    require(
        signs is None or (group > 0 and signs.shape == (2, group) and signs.dtype == GGMLType.F32),
        f"{op}: signs {signs!r} are not (2, {group}) f32",
    )
