"""Element-wise operations and norms."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.native import Tensor
from pydflash.ops.node import check_rows, custom, require

__all__ = ["gated_rms_norm", "rms_norm", "sigmoid", "sigmoid_gate", "silu", "swiglu"]


def _own_norms(x: Tensor) -> bool:
    """Whether norms and gates are custom nodes, which they are on the CPU.

    There ggml runs each node alone, some of them value by value. On CUDA ggml and fuse.cu fuse ggml's nodes.
    """
    return x.home.traits.own_norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; GGUF norm weights already hold Qwen's +1."""
    check_rows("rms_norm", x)
    _check_norm_weight("rms_norm", x, weight)
    if _own_norms(x):
        return custom(lib.PYDFLASH_OP_RMS_NORM, [x, weight], x.shape, [float(eps)])
    return x.derive(lib.ggml_rms_norm(x.context, x.c, eps), x.shape) * weight


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm(x, weight, eps) * silu(z)``, x and z of the same shape (rms_norm.h)."""
    check_rows("gated_rms_norm", x)
    check_rows("gated_rms_norm", z, x.shape)
    _check_norm_weight("gated_rms_norm", x, weight)
    if _own_norms(x):
        return custom(lib.PYDFLASH_OP_RMS_NORM, [x, weight, z], x.shape, [float(eps)])
    return rms_norm(x, weight, eps) * silu(z)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """``x * sigmoid(gate)``, both of the same shape (sigmoid_gate.h)."""
    check_rows("sigmoid_gate", x)
    check_rows("sigmoid_gate", gate, x.shape)
    if _own_norms(x):
        return custom(lib.PYDFLASH_OP_SIGMOID_GATE, [x, gate], x.shape)
    return x * sigmoid(gate)


def _check_norm_weight(op: str, x: Tensor, weight: Tensor) -> None:
    require(
        weight.shape == x.shape[-1:] and weight.dtype == GGMLType.F32, f"{op}: weight {weight!r} does not fit {x!r}"
    )


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return x.derive(lib.ggml_silu(x.context, x.contiguous().c), x.shape)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    return x.derive(lib.ggml_sigmoid(x.context, x.contiguous().c), x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, GLU Variants Improve Transformer)."""
    require(gate.shape == up.shape, f"swiglu: {gate!r} and {up!r} differ")
    return gate.derive(lib.ggml_swiglu_split(gate.context, gate.c, up.c), gate.shape)
