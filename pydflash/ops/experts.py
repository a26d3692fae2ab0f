"""The routed part of a mixture-of-experts feed-forward."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.native import Tensor
from pydflash.ops.node import check_rows, custom, require

__all__ = ["experts", "mix_experts"]


def experts(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Products with the matrices of the experts that each row selected (experts.h), exact at every width.

    x (T, K), or (T, k, K) with a row for each selected expert; weight (E, M, K) of any dtype; ids (T, k) int32 below E;
    (T, k, M) f32.
    """
    x = _expert_rows("experts", x, weight, ids)
    return custom(lib.PYDFLASH_OP_EXPERTS, [x, weight, ids], (*ids.shape, weight.shape[1]))


def mix_experts(x: Tensor, weight: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    """The products of :func:`experts`, added up with the softmax of the router's logits over the selected experts.

    x, weight and ids as there, logits (T, E) f32; (T, M) f32.
    """
    x = _expert_rows("mix_experts", x, weight, ids)
    check_rows("mix_experts", logits, (ids.shape[0], weight.shape[0]))
    return custom(lib.PYDFLASH_OP_EXPERTS, [x, weight, ids, logits], (ids.shape[0], weight.shape[1]))


def _expert_rows(op: str, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """x as (T, 1 or k, K), once it and its operands are known to fit."""
    require(
        len(ids.shape) == 2 and ids.dtype == GGMLType.I32 and ids.is_contiguous,
        f"{op}: {ids!r} do not list the experts of each row as int32",
    )
    require(
        len(weight.shape) == 3 and weight.dtype.is_weight and ids.shape[1] <= weight.shape[0],
        f"{op}: {weight!r} does not hold a matrix for each of at least {ids.shape[1]} experts",
    )
    rows, size = ids.shape[0], weight.shape[2]
    require(
        x.dtype == GGMLType.F32 and x.shape in ((rows, size), (*ids.shape, size)),
        f"{op}: {x!r} does not fit weight {weight!r} and ids {ids!r}",
    )
    return x.reshape(rows, 1, size) if len(x.shape) == 2 else x.contiguous()
