"""The gated delta-net."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.limits import CHANNEL_STEP, MAX_HEAD, MAX_TAPS, TAPE_ROWS
from pydflash.native import Tensor
from pydflash.ops.node import custom, require

__all__ = ["delta_inputs", "delta_rule"]


def delta_inputs(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    conv_weight: Tensor,
    ssm_a: Tensor,
    dt_bias: Tensor,
    window: Tensor,
    counts: Tensor,
    *,
    keep: bool,
) -> Tensor:
    """Convolution, gates and tape of a gated delta-net layer (delta_inputs.h).

    x (T, C) raw q|k|v, alpha and beta (T, Hv), counts (2,) int32 = rows to replay, real rows; result
    (16 + T, C + 2 Hv). ``keep``: the rows stay pending (T <= 16); otherwise they are committed at once.
    """
    rows, channels = x.shape
    heads = alpha.shape[1]
    history = conv_weight.shape[1] - 1
    require(alpha.shape == beta.shape == (rows, heads), f"delta_inputs: alpha {alpha!r}, beta {beta!r} for {rows} rows")
    require(conv_weight.shape[0] == channels, f"delta_inputs: conv weight {conv_weight!r} for {channels} channels")
    require(
        channels % CHANNEL_STEP == 0 and history < MAX_TAPS,
        f"delta_inputs: {channels} channels are not a multiple of {CHANNEL_STEP}, or {history + 1} taps "
        f"more than {MAX_TAPS}",
    )
    require(
        ssm_a.shape == dt_bias.shape == (heads,), f"delta_inputs: ssm_a {ssm_a!r}, dt {dt_bias!r} for {heads} heads"
    )
    require(
        window.shape == (history + TAPE_ROWS, channels + 2 * heads) and counts.shape == (2,),
        f"delta_inputs: window {window!r} or counts {counts!r}",
    )
    require(not keep or rows <= TAPE_ROWS, f"delta_inputs: {rows} rows cannot stay pending, the tape holds {TAPE_ROWS}")
    operands = [x, alpha, beta, conv_weight, ssm_a, dt_bias, window, counts]
    return custom(lib.PYDFLASH_OP_DELTA_INPUTS, operands, (TAPE_ROWS + rows, channels + 2 * heads), [int(keep)])


def delta_rule(inputs: Tensor, state: Tensor, counts: Tensor, *, k_heads: int, eps: float, keep: bool) -> Tensor:
    """The gated delta rule over replayed and new rows (delta_rule.h): state (Hv, D+1, D) to o (T, Hv*D)."""
    heads, _, size = state.shape
    rows = inputs.shape[0] - TAPE_ROWS
    require(
        state.shape == (heads, size + 1, size) and inputs.shape[1] == (2 * k_heads + heads) * size + 2 * heads,
        f"delta_rule: inputs {inputs!r} do not fit state {state!r} and {k_heads} k-heads",
    )
    require(
        heads % k_heads == 0 and counts.shape == (2,),
        f"delta_rule: {k_heads} k-heads for {heads} heads, or counts {counts!r}",
    )
    require(
        size % 32 == 0 and size <= MAX_HEAD,
        f"delta_rule: head size {size} is not a multiple of 32 up to {MAX_HEAD}",
    )
    return custom(
        lib.PYDFLASH_OP_DELTA_RULE, [inputs, state, counts], (rows, heads * size), [int(keep), k_heads, size, eps]
    )
