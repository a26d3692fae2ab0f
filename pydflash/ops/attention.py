"""Softmax attention over a K/V cache."""

from __future__ import annotations

from typing import Any

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS, PAGE, SLOT_STEP
from pydflash.native import Tensor
from pydflash.ops.node import custom, require

__all__ = ["attention", "attention_prefill"]

_PRECISION_F32 = 10


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
    pages: Tensor | None = None,
    sequences: Tensor | None = None,
) -> Tensor:
    """Softmax attention over a cache (attention.h): q (T, H, D) to (T, H, D); on CUDA of at most 16 rows.

    ``k_cache``, ``v_cache``: (P, Hkv*D), each with its own dtype. A row at position p sees slots with position <= p
    (all slots when not ``causal``), within ``window`` positions unless 0. Slot s holds position s, or
    ``slot_positions[s]`` (negative: empty). With ``pages`` (S, N) int32, row t sees the slots of sequence
    ``sequences[t]`` (T,) int32, whose positions from 256 i on lie in page ``pages[.., i]`` of the cache; causal only.
    """
    _check_attention("attention", q, k_cache, v_cache, kv_heads)
    rows, _, size = q.shape
    require(q.home.traits.paged or rows <= EXACT_ROWS, f"attention: {rows} rows; this device takes {EXACT_ROWS}")
    require(
        k_cache.shape[0] % SLOT_STEP == 0,
        f"attention: {k_cache.shape[0]} cache slots are not a multiple of {SLOT_STEP}",
    )
    require(
        positions.shape == (rows,) and window >= 0,
        f"attention: positions {positions!r} for {rows} rows, window {window}",
    )
    operands = [q.contiguous(), k_cache, v_cache, positions]
    if slot_positions is not None:
        require(slot_positions.shape == k_cache.shape[:1], f"attention: {slot_positions!r} does not cover {k_cache!r}")
        operands.append(slot_positions)
    if pages is not None and sequences is not None:
        _check_pages(k_cache, pages, sequences, rows)
        require(causal and slot_positions is None, "attention: pages are for causal attention without slot_positions")
        operands += [pages, sequences]
    return custom(lib.PYDFLASH_OP_ATTENTION, operands, q.shape, [float(size**-0.5), int(causal), window, kv_heads])


def attention_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, kv_heads: int) -> Tensor:
    """Softmax attention of more than 16 rows by ggml's flash attention: q (T, H, D), mask (T, P) f16 added to the
    scores. CUDA has no kernel for fewer rows."""
    _check_attention("attention_prefill", q, k_cache, v_cache, kv_heads)
    rows, heads, size = q.shape
    slots = k_cache.shape[0]
    require(mask.shape == (rows, slots), f"attention_prefill: mask {mask!r} is not ({rows}, {slots})")
    k, v = _heads(k_cache, kv_heads, q), _heads(v_cache, kv_heads, q)
    node = lib.ggml_flash_attn_ext(q.context, q.permute(1, 0, 2).c, k, v, mask.c, size**-0.5, 0.0, 0.0)
    lib.ggml_prec_set_acc(node, _PRECISION_F32)
    return q.derive(node, (rows, heads, size))


def _check_attention(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_heads: int) -> None:
    """Check q (T, H, D) and a cache (P, Hkv*D) for both kinds of attention."""
    require(len(q.shape) == 3 and q.shape[2] in (64, 128, 256), f"{op}: q {q!r} is not (T, H, D) with D 64, 128 or 256")
    require(
        k_cache.shape == v_cache.shape == (k_cache.shape[0], kv_heads * q.shape[2]) and q.shape[1] % kv_heads == 0,
        f"{op}: q {q!r} does not fit K {k_cache!r}, V {v_cache!r} of {kv_heads} heads",
    )


def _check_pages(cache: Tensor, pages: Tensor, sequences: Tensor, rows: int) -> None:
    require(
        cache.shape[0] % PAGE == 0 and pages.dtype == sequences.dtype == GGMLType.I32,
        f"attention: {cache!r} is not in pages of {PAGE}, or {pages!r}, {sequences!r} are not i32",
    )
    require(
        len(pages.shape) == 2 and sequences.shape == (rows,),
        f"attention: pages {pages!r} and sequences {sequences!r} for {rows} rows",
    )


def _heads(cache: Tensor, kv_heads: int, like: Tensor) -> Any:
    """(P, Hkv*D) viewed as (Hkv, P, D): ggml's attention takes one matrix per head."""
    slots, columns = cache.shape
    size = columns // kv_heads
    row, head = cache.c.nb[1], size // cache.dtype.block_size * cache.dtype.type_size
    return lib.ggml_view_4d(like.context, cache.c, size, slots, kv_heads, 1, row, head, row * slots, 0)
