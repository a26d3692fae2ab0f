"""Products with a weight matrix."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.limits import STEP_ROWS
from pydflash.native import Tensor
from pydflash.ops.node import custom, require

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: (T, K) f32 and (M, K) of any dtype to (T, M) f32."""
    require(
        len(x.shape) == 2 and len(weight.shape) == 2 and x.shape[1] == weight.shape[1],
        f"linear: {x!r} and weight {weight!r} do not fit",
    )
    require(x.dtype == GGMLType.F32 and weight.dtype.is_weight, f"linear: no product of {x!r} with weight {weight!r}")
    shape = (x.shape[0], weight.shape[0])
    if x.shape[0] <= x.home.exact_rows:
        require(x.shape[0] <= STEP_ROWS, f"linear: {x!r} has more than the {STEP_ROWS} rows of an exact product")
        product = custom(lib.PYDFLASH_OP_LINEAR, [x.contiguous(), weight], shape)
        # In program order, so that projections of one input stand side by side and CUDA launches them as one.
        return product.home.effect(product)
    return x.derive(lib.ggml_mul_mat(x.context, weight.c, x.c), shape)
