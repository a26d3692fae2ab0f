"""Quantise to and from the block formats of the exported files: Q8_0, Q4_K, Q5_K and Q6_K.

A super-block of the K formats holds 256 consecutive weights of a row. Q4_K and Q5_K cut it into 8 sub-blocks of 32 with
a 6-bit scale and a 6-bit minimum each (x = d * scale * q - dmin * minimum); Q6_K cuts it into 16 sub-blocks of 16 with
an 8-bit scale (x = d * scale * q). Scales are found by least squares over a few candidate grids. Everything works on
arrays of blocks, so a matrix is quantised in a handful of numpy calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUPER_BLOCK = 256


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _half(x: Floats) -> tuple[Floats, Bytes]:
    """The values of `x` (n, 1) after rounding to float16, and their two bytes (n, 2)."""
    half = x.astype("<f2")
    return half.astype(np.float32), half.view(np.uint8).reshape(len(x), 2)


def _read_half(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)  # (n, 1)


# ---------------------------------------------------------------------------------------------------------- Q8_0
def quantize_q8_0(x: Floats) -> Bytes:
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    q = np.rint(_divide(blocks, scale)).astype(np.int8)
    return np.hstack([_half(scale)[1], q.view(np.uint8)])


def dequantize_q8_0(raw: Bytes) -> Floats:
    return _read_half(raw[:, :2]) * raw[:, 2:].view(np.int8)


# ------------------------------------------------------------------------------------------------- Q4_K and Q5_K
def _fit_scale_and_minimum(x: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and minimum (both >= 0) of each sub-block x (n, 8, 32) for codes 0..top, by weighted least squares."""
    weight = np.abs(x) + np.sqrt(np.mean(x * x, axis=-1, keepdims=True))  # large weights matter more
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    span = x.max(axis=-1, keepdims=True) - low
    best_scale, best_low = span / top, low
    best_error = np.full(span.shape, np.inf, np.float32)
    sum_w, sum_x = weight.sum(-1, keepdims=True), (weight * x).sum(-1, keepdims=True)
    for stretch in np.linspace(-1.0, 1.0, 21, dtype=np.float32):
        q = np.clip(np.rint(_divide(top + stretch, span) * (x - low)), 0, top).astype(np.float32)
        sum_q, sum_qq = (weight * q).sum(-1, keepdims=True), (weight * q * q).sum(-1, keepdims=True)
        sum_qx = (weight * q * x).sum(-1, keepdims=True)
        scale = _divide(sum_w * sum_qx - sum_q * sum_x, sum_w * sum_qq - sum_q * sum_q)
        offset = _divide(sum_x - scale * sum_q, sum_w)
        positive = offset > 0  # the format can only subtract: fit the scale alone
        scale = np.where(positive, _divide(sum_qx, sum_qq), scale)
        offset = np.where(positive, np.float32(0), offset)
        error = (weight * (scale * q + offset - x) ** 2).sum(-1, keepdims=True)
        better = (error < best_error) & (scale >= 0)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, offset, best_low)
        best_error = np.where(better, error, best_error)
    return best_scale[..., 0], -best_low[..., 0]  # (n, 8) each


def _pack_scales(scale: Bytes, minimum: Bytes) -> Bytes:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes, the upper two bits of entries 4..7 spread over 0..7."""
    first = (scale[:, :4] & 63) | (scale[:, 4:] >> 4) << 6
    second = (minimum[:, :4] & 63) | (minimum[:, 4:] >> 4) << 6
    third = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def _unpack_scales(raw: Bytes) -> tuple[Bytes, Bytes]:
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scale = np.hstack([first & 63, (third & 15) | (first >> 6) << 4])
    minimum = np.hstack([second & 63, (third >> 4) | (second >> 6) << 4])
    return scale, minimum  # (n, 8) each


def _affine_codes(x: Floats, top: int) -> tuple[Bytes, Bytes]:
    """Header (n, 16) = d, dmin and packed scales, and codes (n, 8, 32) of a Q4_K (top 15) or Q5_K (top 31) array."""
    blocks = x.reshape(-1, 8, 32)
    scale, minimum = _fit_scale_and_minimum(blocks, top)
    d, d_bytes = _half(scale.max(axis=1, keepdims=True) / 63)
    dmin, dmin_bytes = _half(minimum.max(axis=1, keepdims=True) / 63)
    scale_code = np.clip(np.rint(_divide(scale, d)), 0, 63).astype(np.uint8)
    min_code = np.clip(np.rint(_divide(minimum, dmin)), 0, 63).astype(np.uint8)
    step, shift = (d * scale_code)[..., None], (dmin * min_code)[..., None]
    codes = np.clip(np.rint(_divide(blocks + shift, step)), 0, top).astype(np.uint8)
    return np.hstack([d_bytes, dmin_bytes, _pack_scales(scale_code, min_code)]), codes


def _affine_values(header: Bytes, codes: Bytes) -> Floats:
    scale, minimum = _unpack_scales(header[:, 4:])
    step, shift = _read_half(header[:, :2]) * scale, _read_half(header[:, 2:4]) * minimum
    return step[..., None] * codes - shift[..., None]  # (n, 8, 32)


def _pack_nibbles(codes: Bytes) -> Bytes:
    """Low nibbles of codes (n, 8, 32) as (n, 128): sub-blocks 2j and 2j+1 share the 32 bytes of group j."""
    pairs = codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4
    return pairs.reshape(-1, 128).astype(np.uint8)


def _unpack_nibbles(raw: Bytes) -> Bytes:
    pairs = raw.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)


def quantize_q4_k(x: Floats) -> Bytes:
    header, codes = _affine_codes(x, 15)
    return np.hstack([header, _pack_nibbles(codes)])


def dequantize_q4_k(raw: Bytes) -> Floats:
    return _affine_values(raw[:, :16], _unpack_nibbles(raw[:, 16:]))


def quantize_q5_k(x: Floats) -> Bytes:
    header, codes = _affine_codes(x, 31)
    bit = np.arange(8, dtype=np.uint8)[:, None]  # the fifth bit of sub-block s is bit s of the 32 bytes `high`
    high = np.bitwise_or.reduce(codes >> 4 << bit, axis=1)
    return np.hstack([header, high, _pack_nibbles(codes)])


def dequantize_q5_k(raw: Bytes) -> Floats:
    bit = np.arange(8, dtype=np.uint8)[:, None]
    high = (raw[:, None, 16:48] >> bit & 1) << 4
    return _affine_values(raw[:, :16], _unpack_nibbles(raw[:, 48:]) | high.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------- Q6_K
def _fit_scale(x: Floats) -> Floats:
    """Signed scale of each sub-block x (n, 16, 16) for codes -32..31, by least squares weighted with x squared."""
    weight = x * x
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    best_scale: Floats = -peak / np.float32(32)
    best_gain = np.full(peak.shape, -np.inf, np.float32)
    for top in np.linspace(30.5, 33.0, 11, dtype=np.float32):
        q = np.clip(np.rint(_divide(-top * x, peak)), -32, 31).astype(np.float32)
        sum_qx, sum_qq = (weight * q * x).sum(-1, keepdims=True), (weight * q * q).sum(-1, keepdims=True)
        gain = _divide(sum_qx * sum_qx, sum_qq)  # error = const - gain
        better = gain > best_gain
        best_scale = np.where(better, _divide(sum_qx, sum_qq), best_scale)
        best_gain = np.where(better, gain, best_gain)
    return best_scale[..., 0]  # (n, 16)


def quantize_q6_k(x: Floats) -> Bytes:
    blocks = x.reshape(-1, 16, 16)
    scale = _fit_scale(blocks)
    widest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    d, d_bytes = _half(-widest / np.float32(128))
    scale_code = np.clip(np.rint(_divide(scale, d)), -128, 127).astype(np.int8)
    codes = np.clip(np.rint(_divide(blocks, (d * scale_code)[..., None])), -32, 31) + 32
    quarter = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # (n, half, quarter, lane)
    low = quarter[:, :, :2] & 15 | (quarter[:, :, 2:] & 15) << 4
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce(quarter >> 4 << shift, axis=2)
    return np.hstack([low.reshape(-1, 128), high.reshape(-1, 64), scale_code.view(np.uint8), d_bytes])


def dequantize_q6_k(raw: Bytes) -> Floats:
    low = raw[:, :128].reshape(-1, 2, 2, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    codes = (np.concatenate([low & 15, low >> 4], axis=2) | high << 4).astype(np.int16) - 32
    step = _read_half(raw[:, 208:]) * raw[:, 192:208].view(np.int8)  # (n, 16)
    values: Floats = step[..., None] * codes.reshape(-1, 16, 16)
    return values


# ----------------------------------------------------------------------------------------------------- dispatch
CODECS: dict[str, tuple[Callable[[Floats], Bytes], Callable[[Bytes], Floats]]] = {
    "Q8_0": (quantize_q8_0, dequantize_q8_0),
    "Q4_K": (quantize_q4_k, dequantize_q4_k),
    "Q5_K": (quantize_q5_k, dequantize_q5_k),
    "Q6_K": (quantize_q6_k, dequantize_q6_k),
}


def quantize(x: Floats, kind: str) -> Bytes:
    """Encode `x` (rows, columns) as `kind`, one of F32, Q8_0, Q4_K, Q5_K, Q6_K.

    Returns uint8 (rows, bytes per row). Raises ValueError if a row is not a whole number of blocks.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if kind == "F32":
        return x.view(np.uint8)
    block = 32 if kind == "Q8_0" else SUPER_BLOCK
    if x.shape[-1] % block:
        raise ValueError(f"{kind} needs rows of a multiple of {block} values, got {x.shape}")
    return CODECS[kind][0](x).reshape(*x.shape[:-1], -1)


def dequantize(raw: Bytes, kind: str) -> Floats:
    """Decode what `quantize` returned: uint8 (rows, bytes per row) to float32 (rows, columns)."""
    if kind == "F32":
        return raw.view(np.float32)
    block_bytes = {"Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
    blocks = np.ascontiguousarray(raw).reshape(-1, block_bytes)
    return CODECS[kind][1](blocks).reshape(*raw.shape[:-1], -1).astype(np.float32)
