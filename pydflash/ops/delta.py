"""The gated delta-net."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
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
    windows: Tensor,
    counts: Tensor,
    slots: Tensor,
    *,
    keep: bool,
) -> Tensor:
    """Convolution, gates and tape of a gated delta-net layer, for rows of S sequences (delta_inputs.h).

    x (T, C) raw q|k|v, alpha and beta (T, Hv), windows (slots, K - 1 + 16, C + 2 Hv), counts (S, 2) int32 = rows to
    replay, real rows of each sequence, slots (S,) int32; result (16 S + T, C + 2 Hv). ``keep``: the rows stay pending
    (at most 16 of a sequence); otherwise they are committed at once.
    """
    rows, channels = x.shape
    heads = alpha.shape[1]
    sequences = slots.shape[0]
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
        windows.shape == (windows.shape[0], history + TAPE_ROWS, channels + 2 * heads),
        f"delta_inputs: windows {windows!r} are not (slots, {history + TAPE_ROWS}, {channels + 2 * heads})",
    )
    _check_sequences("delta_inputs", counts, slots, windows)
    require(
        not keep or rows <= TAPE_ROWS * sequences,
        f"delta_inputs: {rows} rows of {sequences} sequences cannot stay pending, a tape holds {TAPE_ROWS}",
    )
    operands = [x, alpha, beta, conv_weight, ssm_a, dt_bias, windows, counts, slots]
    shape = (TAPE_ROWS * sequences + rows, channels + 2 * heads)
    return custom(lib.PYDFLASH_OP_DELTA_INPUTS, operands, shape, [int(keep)])


def delta_rule(
    inputs: Tensor, states: Tensor, counts: Tensor, slots: Tensor, *, k_heads: int, eps: float, keep: bool
) -> Tensor:
    """The gated delta rule over replayed and new rows of S sequences (delta_rule.h).

    inputs (16 S + T, ...) of ``delta_inputs``, with its ``counts`` and ``slots``; states (slots, Hv, D + 1, D);
    result (T, Hv * D).
    """
    require(len(states.shape) == 4, f"delta_rule: states {states!r} are not (slots, Hv, D + 1, D)")
    _, heads, _, size = states.shape
    rows = inputs.shape[0] - TAPE_ROWS * slots.shape[0]
    require(
        states.shape[2] == size + 1 and rows > 0 and inputs.shape[1] == (2 * k_heads + heads) * size + 2 * heads,
        f"delta_rule: inputs {inputs!r} do not fit states {states!r}, {slots.shape[0]} sequences and {k_heads} k-heads",
    )
    require(heads % k_heads == 0, f"delta_rule: {k_heads} k-heads for {heads} heads")
    _check_sequences("delta_rule", counts, slots, states)
    require(
        size % 32 == 0 and size <= MAX_HEAD,
        f"delta_rule: head size {size} is not a multiple of 32 up to {MAX_HEAD}",
    )
    params = [int(keep), k_heads, size, eps]
    return custom(lib.PYDFLASH_OP_DELTA_RULE, [inputs, states, counts, slots], (rows, heads * size), params)


def _check_sequences(op: str, counts: Tensor, slots: Tensor, table: Tensor) -> None:
    require(
        counts.dtype == slots.dtype == GGMLType.I32
        and len(slots.shape) == 1
        and counts.shape == (slots.shape[0], 2)
        and slots.shape[0] <= table.shape[0],
        f"{op}: counts {counts!r} and slots {slots!r} are not (S, 2) and (S,) of {table!r}",
    )
