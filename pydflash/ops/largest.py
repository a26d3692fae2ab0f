"""Where the largest values of a row lie."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.native import Tensor
from pydflash.ops.node import check_rows, custom, require

__all__ = ["argmax", "top_k"]


def argmax(x: Tensor, *, report: bool = True) -> Tensor:
    """Index of the largest value of each row, the first if several are equal: (T, C) f32 to (T,) int32
    (argmax.h).

    A row with a NaN, or whose largest value is infinite, gives -1; without ``report`` any index of the row.
    """
    require(len(x.shape) == 2 and x.dtype == GGMLType.F32, f"argmax: {x!r} is not a matrix of f32")
    return custom(lib.PYDFLASH_OP_ARGMAX, [x], x.shape[:1], [int(report)], dtype=GGMLType.I32)


def top_k(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of each row, the largest first, of equal ones the first (top_k.h).

    (T, C) f32 to (T, k) int32.
    """
    require(len(x.shape) == 2, f"top_k: {x!r} is not a matrix")
    check_rows("top_k", x)
    require(1 <= k <= x.shape[1], f"top_k: {k} of the {x.shape[1]} values of a row of {x!r}")
    return custom(lib.PYDFLASH_OP_TOP_K, [x], (x.shape[0], k), [k], dtype=GGMLType.I32)
