"""The operations of the models, under the names their papers use. Shapes are checked here, before ggml sees them.

T is the number of rows (tokens) of a step, H query heads, Hkv key/value heads, D a head's size, C hidden or channel
columns. A step of at most ``EXACT_ROWS`` rows takes the kernels whose rows do not depend on one another (D8 in
docs/architecture.md); wider steps (prefill) take ggml's faster ones.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydflash._ffi import ffi, lib
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.limits import CHANNEL_STEP, EXACT_ROWS, MAX_HEAD, MAX_PARAMS, MAX_TAPS, SLOT_STEP, TAPE_ROWS
from pydflash.tensor import Shape, Tensor, ggml_shape

__all__ = [
    "EXACT_ROWS",
    "TAPE_ROWS",
    "NormRope",
    "argmax",
    "attention",
    "attention_prefill",
    "copy_into",
    "delta_inputs",
    "delta_rule",
    "experts",
    "gated_rms_norm",
    "get_rows",
    "linear",
    "mix_experts",
    "norm_rope",
    "rms_norm",
    "rope",
    "set_rows",
    "sigmoid",
    "sigmoid_gate",
    "silu",
    "store_kv",
    "swiglu",
    "top_k",
    "turbo_wht",
]

_PRECISION_F32 = 10


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def _custom(
    op: int,
    operands: Sequence[Tensor],
    shape: Shape,
    params: Sequence[int | float] = (),
    inplace: Tensor | None = None,
    dtype: GGMLType = GGMLType.F32,
) -> Tensor:
    """One of our own nodes (ggml_ext/ext.h). Float parameters travel as their bits.

    The result is new, of ``shape`` and ``dtype``; or a view of ``inplace``, an operand that the node writes.
    """
    words = [p if isinstance(p, int) else struct.unpack("<i", struct.pack("<f", p))[0] for p in params]
    node = lib.pydflash_op_new(
        operands[0].context,
        op,
        int(dtype),
        ffi.new("int64_t[4]", ggml_shape(shape)),
        ffi.new("struct ggml_tensor *[]", [t.c for t in operands]),
        len(operands),
        ffi.new(f"int32_t[{MAX_PARAMS}]", words),
        ffi.NULL if inplace is None else inplace.c,
    )
    return operands[0].derive(node, shape, dtype if inplace is None else inplace.dtype)


# --- rows of tables and caches ----------------------------------------------------------------------------------------


def get_rows(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]`` as f32: (N, C) of any dtype and (T,) int32 to (T, C)."""
    _require(rows.dtype == GGMLType.I32, f"get_rows: {rows!r} are not i32")
    _require(
        len(table.shape) == 2 and len(rows.shape) == 1, f"get_rows: {table!r} is not a matrix or {rows!r} not a vector"
    )
    shape = (rows.shape[0], table.shape[1])
    return rows.derive(lib.ggml_get_rows(rows.context, table.c, rows.c), shape, GGMLType.F32)


def set_rows(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``table[rows] = values`` in place, converted or quantised to the table's dtype; returns the table after it.

    (N, C), (T,) int32 and (T, C) f32.
    """
    _require(
        rows.dtype == GGMLType.I32 and values.dtype == GGMLType.F32,
        f"set_rows: {rows!r} are not i32 or {values!r} not f32",
    )
    _require(
        len(table.shape) == 2 and values.shape == (*rows.shape, table.shape[1]),
        f"set_rows: {values!r} does not fill {rows!r} rows of {table!r}",
    )
    node = lib.ggml_set_rows(values.context, table.c, values.c, rows.c)
    return values.derive(node, table.shape, table.dtype)


def copy_into(target: Tensor, source: Tensor) -> Tensor:
    """``target[...] = source``, both of the same shape; ``target`` may be a strided view of state."""
    _require(target.shape == source.shape, f"copy_into: {source!r} does not fit {target!r}")
    return source.derive(lib.ggml_cpy(source.context, source.c, target.c), target.shape, target.dtype)


# --- element-wise and norms -------------------------------------------------------------------------------------------


def _own_norms(x: Tensor) -> bool:
    """Whether norms and gates are nodes of ours: on the CPU.

    There ggml runs each node alone, some of them value by value. On CUDA ggml and ggml_ext/fuse.cu fuse ggml's nodes.
    """
    return x.graph is not None and not x.graph.backend.is_cuda


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; GGUF norm weights already hold Qwen's +1."""
    _check_rows("rms_norm", x)
    _check_norm_weight("rms_norm", x, weight)
    if _own_norms(x):
        return _custom(lib.PYDFLASH_OP_RMS_NORM, [x, weight], x.shape, [float(eps)])
    return x.derive(lib.ggml_rms_norm(x.context, x.c, eps), x.shape) * weight


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm(x, weight, eps) * silu(z)``, x and z of the same shape (ggml_ext/rms_norm.h)."""
    _check_rows("gated_rms_norm", x)
    _check_rows("gated_rms_norm", z, x.shape)
    _check_norm_weight("gated_rms_norm", x, weight)
    if _own_norms(x):
        return _custom(lib.PYDFLASH_OP_RMS_NORM, [x, weight, z], x.shape, [float(eps)])
    return rms_norm(x, weight, eps) * silu(z)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """``x * sigmoid(gate)``, both of the same shape (ggml_ext/sigmoid_gate.h)."""
    _check_rows("sigmoid_gate", x)
    _check_rows("sigmoid_gate", gate, x.shape)
    if _own_norms(x):
        return _custom(lib.PYDFLASH_OP_SIGMOID_GATE, [x, gate], x.shape)
    return x * sigmoid(gate)


def _check_rows(op: str, x: Tensor, shape: Shape | None = None) -> None:
    _require(
        x.dtype == GGMLType.F32 and x.c.nb[0] == 4 and x.shape == (shape or x.shape),
        f"{op}: {x!r} is not f32 of shape {shape or x.shape} with contiguous rows",
    )


def _check_norm_weight(op: str, x: Tensor, weight: Tensor) -> None:
    _require(
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
    _require(gate.shape == up.shape, f"swiglu: {gate!r} and {up!r} differ")
    return gate.derive(lib.ggml_swiglu_split(gate.context, gate.c, up.c), gate.shape)


def argmax(x: Tensor, *, report: bool = True) -> Tensor:
    """Index of the largest value of each row, the first of equal ones: (T, C) f32 to (T,) int32 (ggml_ext/argmax.h).

    A row with a NaN, or whose largest value is infinite, gives -1; without ``report`` any index of the row.
    """
    _require(len(x.shape) == 2 and x.dtype == GGMLType.F32, f"argmax: {x!r} is not a matrix of f32")
    return _custom(lib.PYDFLASH_OP_ARGMAX, [x], x.shape[:1], [int(report)], dtype=GGMLType.I32)


def top_k(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of each row, the largest first, of equal ones the first (ggml_ext/top_k.h).

    (T, C) f32 to (T, k) int32.
    """
    _require(len(x.shape) == 2, f"top_k: {x!r} is not a matrix")
    _check_rows("top_k", x)
    _require(1 <= k <= x.shape[1], f"top_k: {k} of the {x.shape[1]} values of a row of {x!r}")
    return _custom(lib.PYDFLASH_OP_TOP_K, [x], (x.shape[0], k), [k], dtype=GGMLType.I32)


# --- products ---------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: (T, K) f32 and (M, K) of any dtype to (T, M) f32."""
    _require(
        len(x.shape) == 2 and len(weight.shape) == 2 and x.shape[1] == weight.shape[1],
        f"linear: {x!r} and weight {weight!r} do not fit",
    )
    _require(x.dtype == GGMLType.F32 and weight.dtype.is_weight, f"linear: no product of {x!r} with weight {weight!r}")
    shape = (x.shape[0], weight.shape[0])
    if x.shape[0] <= EXACT_ROWS:
        product = _custom(lib.PYDFLASH_OP_LINEAR, [x.contiguous(), weight], shape)
        # In program order, so that projections of one input stand side by side and CUDA launches them as one.
        return product if product.graph is None else product.graph.effect(product)
    return x.derive(lib.ggml_mul_mat(x.context, weight.c, x.c), shape)


def experts(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Products with the matrices of the experts that each row selected (ggml_ext/experts.h), exact at every width.

    x (T, K), or (T, k, K) with a row for each selected expert; weight (E, M, K) of any dtype; ids (T, k) int32 below E;
    (T, k, M) f32.
    """
    x = _expert_rows("experts", x, weight, ids)
    return _custom(lib.PYDFLASH_OP_EXPERTS, [x, weight, ids], (*ids.shape, weight.shape[1]))


def mix_experts(x: Tensor, weight: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    """The products of :func:`experts`, added up with the softmax of the router's logits over the selected experts.

    x, weight and ids as there, logits (T, E) f32; (T, M) f32.
    """
    x = _expert_rows("mix_experts", x, weight, ids)
    _check_rows("mix_experts", logits, (ids.shape[0], weight.shape[0]))
    return _custom(lib.PYDFLASH_OP_EXPERTS, [x, weight, ids, logits], (ids.shape[0], weight.shape[1]))


def _expert_rows(op: str, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """x as (T, 1 or k, K), once it and its operands are known to fit."""
    _require(
        len(ids.shape) == 2 and ids.dtype == GGMLType.I32 and ids.is_contiguous,
        f"{op}: {ids!r} do not list the experts of each row as int32",
    )
    _require(
        len(weight.shape) == 3 and weight.dtype.is_weight and ids.shape[1] <= weight.shape[0],
        f"{op}: {weight!r} does not hold a matrix for each of at least {ids.shape[1]} experts",
    )
    rows, size = ids.shape[0], weight.shape[2]
    _require(
        x.dtype == GGMLType.F32 and x.shape in ((rows, size), (*ids.shape, size)),
        f"{op}: {x!r} does not fit weight {weight!r} and ids {ids!r}",
    )
    return x.reshape(rows, 1, size) if len(x.shape) == 2 else x.contiguous()


# --- positions --------------------------------------------------------------------------------------------------------


def rope(x: Tensor, positions: Tensor, dims: int, base: float) -> Tensor:
    """Rotary embedding of the first ``dims`` values of each head, by the reference's angles (ggml_ext/rope.h).

    (T, H, D), strided or not, D at most 256, and positions (T,) int32 to (T, H, D); NEOX pairs (i, i + dims/2). For
    text, Qwen's interleaved multi-axis RoPE has the same position on every axis and equals this.
    """
    _require(
        len(x.shape) == 3 and x.shape[2] <= MAX_HEAD and x.dtype == GGMLType.F32 and x.c.nb[0] == 4,
        f"rope: {x!r} is not (T, H, D) f32 with D at most {MAX_HEAD} and contiguous heads",
    )
    _check_rope("rope", x, positions, dims)
    return _custom(lib.PYDFLASH_OP_ROPE, [x, positions], x.shape, [dims, float(base)])


def turbo_wht(x: Tensor, group: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Walsh-Hadamard rotation of each group of ``group`` values of the last axis (ggml_ext/turbo_wht.h).

    ``signs`` (2, group) f32 holds the sign vectors D1 and D2 of the signed form. Orthonormal; ``inverse`` undoes it.
    """
    _require(group in (64, 128, 256), f"turbo_wht: group {group} is not one of 64, 128, 256")
    _require(x.shape[-1] % group == 0, f"turbo_wht: group {group} does not divide the last axis of {x!r}")
    _require(signs is None or signs.shape == (2, group), f"turbo_wht: signs {signs!r} are not (2, {group})")
    _require(x.dtype == GGMLType.F32, f"turbo_wht: {x!r} is not f32")
    operands = [x] if signs is None else [x, signs]
    return _custom(lib.PYDFLASH_OP_TURBO_WHT, operands, x.shape, [group, int(inverse)])


# --- the ways of Q, K and V to attention ------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormRope:
    """What a head of Q or of K goes through: RMS norm by ``weight`` (D,), then RoPE of its first ``dims`` values."""

    weight: Tensor
    eps: float
    dims: int
    base: float

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T, H, D) and (T,) int32 positions to (T, H, D), one operation after the other."""
        return rope(rms_norm(x, self.weight, self.eps), positions, self.dims, self.base)


def norm_rope(x: Tensor, norm: NormRope, positions: Tensor, group: int = 0, signs: Tensor | None = None) -> Tensor:
    """``norm``, then ``turbo_wht`` unless ``group`` is 0, in one kernel with the same bits (ggml_ext/norm_rope.h).

    (T, H, D), strided or not, to (T, H, D). D is 64, 128 or 256; the rest as in ``rope`` and ``turbo_wht``.
    """
    _check_heads("norm_rope", x, norm, positions, group, signs)
    operands = [x, norm.weight, positions] if signs is None else [x, norm.weight, positions, signs]
    return _custom(lib.PYDFLASH_OP_NORM_ROPE, operands, x.shape, [norm.dims, float(norm.base), float(norm.eps), group])


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
    """K through ``norm`` and rotated, and V rotated, into rows of their tables, in one kernel (ggml_ext/store_kv.h).

    k and v (T, Hkv, D), strided or not; rows (T,) int32; tables (P, Hkv*D) of f32, f16, bf16, q8_0 or q4_0 each.
    ``signs`` are K's; a group of 0 does not rotate. Returns both tables after it, with ``set_rows``'s bytes.
    """
    _check_heads("store_kv", k, norm, positions, k_group, signs)
    _check_group("store_kv", v, v_group, None)
    _require(v.shape == k.shape and v.dtype == GGMLType.F32, f"store_kv: v {v!r} does not fit k {k!r}")
    _require(
        rows.dtype == GGMLType.I32 and rows.shape == k.shape[:1], f"store_kv: {rows!r} are not a row for each of {k!r}"
    )
    width = k.shape[1] * k.shape[2]
    for table in (k_table, v_table):
        _require(
            len(table.shape) == 2 and table.shape[1] == width and table.dtype in _TABLE_TYPES,
            f"store_kv: table {table!r} is not (P, {width}) of {', '.join(t.name for t in _TABLE_TYPES)}",
        )
    operands = [k, v, norm.weight, positions, rows, k_table, v_table, *(() if signs is None else (signs,))]
    params = [norm.dims, float(norm.base), float(norm.eps), k_group, v_group]
    # The node is K's table; V's is the tensor it was, and what reads it comes later in program order.
    return _custom(lib.PYDFLASH_OP_STORE_KV, operands, k_table.shape, params, inplace=k_table), v_table


_TABLE_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0)


def _check_heads(op: str, x: Tensor, norm: NormRope, positions: Tensor, group: int, signs: Tensor | None) -> None:
    """What the fused ways ask of heads (T, H, D) of Q or K."""
    _require(
        len(x.shape) == 3 and x.shape[2] in (64, 128, 256) and x.dtype == GGMLType.F32 and x.c.nb[0] == 4,
        f"{op}: {x!r} is not (T, H, D) f32 with D 64, 128 or 256 and contiguous heads",
    )
    _require(
        norm.weight.shape == x.shape[2:] and norm.weight.dtype == GGMLType.F32,
        f"{op}: weight {norm.weight!r} does not fit {x!r}",
    )
    _check_rope(op, x, positions, norm.dims)
    _check_group(op, x, group, signs)


def _check_rope(op: str, x: Tensor, positions: Tensor, dims: int) -> None:
    _require(
        positions.shape == x.shape[:1] and positions.dtype == GGMLType.I32,
        f"{op}: positions {positions!r} are not an i32 for each row of {x!r}",
    )
    _require(0 < dims <= x.shape[2] and dims % 2 == 0, f"{op}: RoPE of {dims} dims of {x!r}")


def _check_group(op: str, x: Tensor, group: int, signs: Tensor | None) -> None:
    _require(group in (0, 64, 128, 256), f"{op}: group {group} is not one of 0, 64, 128, 256")
    _require(not group or x.shape[-1] % group == 0, f"{op}: group {group} does not divide the last axis of {x!r}")
    _require(
        signs is None or (group > 0 and signs.shape == (2, group) and signs.dtype == GGMLType.F32),
        f"{op}: signs {signs!r} are not (2, {group}) f32",
    )


# --- attention --------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    kv_heads: int,
    *,
    causal: bool = True,
    window: int = 0,
    slot_positions: Tensor | None = None,
) -> Tensor:
    """Softmax attention of at most 16 rows over a cache (ggml_ext/attention.h): q (T, H, D) to (T, H, D).

    ``k_cache``, ``v_cache``: (P, Hkv*D), each of its own dtype. A row at position p sees slots with position <= p (all
    when not
    ``causal``), within ``window`` positions unless 0. Slot s holds position s, or ``slot_positions[s]`` (negative:
    empty).
    """
    _check_attention("attention", q, k_cache, v_cache, kv_heads)
    rows, _, size = q.shape
    _require(rows <= EXACT_ROWS, f"attention: {rows} rows; at most {EXACT_ROWS}")
    _require(
        k_cache.shape[0] % SLOT_STEP == 0,
        f"attention: {k_cache.shape[0]} cache slots are not a multiple of {SLOT_STEP}",
    )
    _require(
        positions.shape == (rows,) and window >= 0,
        f"attention: positions {positions!r} for {rows} rows, window {window}",
    )
    operands = [q.contiguous(), k_cache, v_cache, positions]
    if slot_positions is not None:
        _require(slot_positions.shape == k_cache.shape[:1], f"attention: {slot_positions!r} does not cover {k_cache!r}")
        operands.append(slot_positions)
    return _custom(lib.PYDFLASH_OP_ATTENTION, operands, q.shape, [float(size**-0.5), int(causal), window, kv_heads])


def attention_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, kv_heads: int) -> Tensor:
    """Softmax attention of any number of rows by ggml's flash attention: q (T, H, D), mask (T, P) f16 added to the
    scores."""
    _check_attention("attention_prefill", q, k_cache, v_cache, kv_heads)
    rows, heads, size = q.shape
    slots = k_cache.shape[0]
    _require(mask.shape == (rows, slots), f"attention_prefill: mask {mask!r} is not ({rows}, {slots})")
    k, v = _heads(k_cache, kv_heads, q), _heads(v_cache, kv_heads, q)
    node = lib.ggml_flash_attn_ext(q.context, q.permute(1, 0, 2).c, k, v, mask.c, size**-0.5, 0.0, 0.0)
    lib.ggml_prec_set_acc(node, _PRECISION_F32)
    return q.derive(node, (rows, heads, size))


def _check_attention(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_heads: int) -> None:
    """What both attentions ask of q (T, H, D) and of a cache (P, Hkv*D)."""
    _require(
        len(q.shape) == 3 and q.shape[2] in (64, 128, 256), f"{op}: q {q!r} is not (T, H, D) with D 64, 128 or 256"
    )
    _require(
        k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads * q.shape[2]) and q.shape[1] % kv_heads == 0,
        f"{op}: q {q!r} does not fit K {k_cache!r}, V {v_cache!r} of {kv_heads} heads",
    )


def _heads(cache: Tensor, kv_heads: int, like: Tensor) -> Any:
    """(P, Hkv*D) seen as (Hkv, P, D): ggml's attention wants one matrix a head."""
    slots, columns = cache.shape
    size = columns // kv_heads
    row, head = cache.c.nb[1], size // cache.dtype.block_size * cache.dtype.type_size
    return lib.ggml_view_4d(like.context, cache.c, size, slots, kv_heads, 1, row, head, row * slots, 0)


# --- gated delta-net --------------------------------------------------------------------------------------------------


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
    """Convolution, gates and tape of a gated delta-net layer (ggml_ext/delta_inputs.h).

    x (T, C) raw q|k|v, alpha and beta (T, Hv), counts (2,) int32 = rows to replay, real rows; result (16 + T, C + 2
    Hv).
    ``keep``: the rows stay pending (T <= 16); otherwise they are committed at once.
    """
    rows, channels = x.shape
    heads = alpha.shape[1]
    history = conv_weight.shape[1] - 1
    _require(
        alpha.shape == beta.shape == (rows, heads), f"delta_inputs: alpha {alpha!r}, beta {beta!r} for {rows} rows"
    )
    _require(conv_weight.shape[0] == channels, f"delta_inputs: conv weight {conv_weight!r} for {channels} channels")
    _require(
        channels % CHANNEL_STEP == 0 and history < MAX_TAPS,
        f"delta_inputs: {channels} channels are not a multiple of {CHANNEL_STEP}, or {history + 1} taps "
        f"more than {MAX_TAPS}",
    )
    _require(
        ssm_a.shape == dt_bias.shape == (heads,), f"delta_inputs: ssm_a {ssm_a!r}, dt {dt_bias!r} for {heads} heads"
    )
    _require(
        window.shape == (history + TAPE_ROWS, channels + 2 * heads) and counts.shape == (2,),
        f"delta_inputs: window {window!r} or counts {counts!r}",
    )
    _require(
        not keep or rows <= TAPE_ROWS, f"delta_inputs: {rows} rows cannot stay pending, the tape holds {TAPE_ROWS}"
    )
    operands = [x, alpha, beta, conv_weight, ssm_a, dt_bias, window, counts]
    return _custom(lib.PYDFLASH_OP_DELTA_INPUTS, operands, (TAPE_ROWS + rows, channels + 2 * heads), [int(keep)])


def delta_rule(inputs: Tensor, state: Tensor, counts: Tensor, *, k_heads: int, eps: float, keep: bool) -> Tensor:
    """The gated delta rule over replayed and new rows (ggml_ext/delta_rule.h): state (Hv, D+1, D) to o (T, Hv*D)."""
    heads, _, size = state.shape
    rows = inputs.shape[0] - TAPE_ROWS
    _require(
        state.shape == (heads, size + 1, size) and inputs.shape[1] == (2 * k_heads + heads) * size + 2 * heads,
        f"delta_rule: inputs {inputs!r} do not fit state {state!r} and {k_heads} k-heads",
    )
    _require(
        heads % k_heads == 0 and counts.shape == (2,),
        f"delta_rule: {k_heads} k-heads for {heads} heads, or counts {counts!r}",
    )
    _require(
        size % 32 == 0 and size <= MAX_HEAD,
        f"delta_rule: head size {size} is not a multiple of 32 up to {MAX_HEAD}",
    )
    return _custom(
        lib.PYDFLASH_OP_DELTA_RULE, [inputs, state, counts], (rows, heads * size), [int(keep), k_heads, size, eps]
    )
