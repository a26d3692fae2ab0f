"""Write GGUF files (version 3): metadata from Python values, tensor data streamed and quantised as ggml does it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pydflash.arguments import shown
from pydflash.errors import ConfigError
from pydflash.files.atomic_file import replacing
from pydflash.files.gguf_format import ValueType
from pydflash.ggml_types import GGMLType

__all__ = ["WRITABLE_TYPES", "TensorSource", "encode", "write_gguf"]

_ALIGNMENT = 32
_ARRAY_KINDS = {
    "u1": ValueType.UINT8, "i1": ValueType.INT8, "u2": ValueType.UINT16, "i2": ValueType.INT16,
    "u4": ValueType.UINT32, "i4": ValueType.INT32, "f4": ValueType.FLOAT32, "b1": ValueType.BOOL,
    "u8": ValueType.UINT64, "i8": ValueType.INT64, "f8": ValueType.FLOAT64,
}  # fmt: skip

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorSource:
    """One tensor to write. ``chunks`` yields its bytes in order, as often as it is called."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    chunks: Callable[[], Iterable[npt.NDArray[np.uint8]]]

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(int(np.prod(self.shape, dtype=np.int64)))


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorSource], inputs: Iterable[Path] = ()
) -> int:
    """Write the file, whole or not at all, and return its size in bytes.

    bool, int, float and str become BOOL, UINT32 (INT32 below zero), FLOAT32 and STRING, or the 64-bit type where only
    that holds them; lists are arrays of these, with INT32 for int, or arrays of arrays; numpy arrays keep their type.
    ``inputs``: files that the values come from. Raises WriteError if ``path`` is one of them or cannot be written,
    ConfigError for a value that GGUF has no type for; the file that was there is as it was.
    """
    with replacing(path, inputs) as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            rank = len(tensor.shape)
            file.write(_string(tensor.name) + struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape)))
            file.write(struct.pack("<IQ", tensor.type, offset))
            offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
        _pad(file)
        for tensor in tensors:
            written = sum(file.write(chunk.data) for chunk in tensor.chunks())
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, {tensor.nbytes} belong there"
            _pad(file)
        return file.tell()


def encode(values: Floats, dtype: GGMLType) -> npt.NDArray[np.uint8]:
    """(..., n) f32 as the bytes of ``dtype``, flat. ConfigError for a type that cannot be written or rows that are not
    whole blocks.
    """
    if dtype not in _ENCODERS:
        raise ConfigError(f"type {dtype.name.lower()} cannot be written; valid types are {', '.join(WRITABLE_TYPES)}")
    if values.shape[-1] % dtype.block_size:
        raise ConfigError(
            f"rows of {values.shape[-1]} values do not divide into {dtype.name.lower()} blocks of {dtype.block_size};"
            " choose f16 or bf16"
        )
    return np.ascontiguousarray(_ENCODERS[dtype](np.ascontiguousarray(values, np.float32))).view(np.uint8).reshape(-1)


def _bf16(values: Floats) -> npt.NDArray[Any]:
    """Round to nearest even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(64)
    bits16: npt.NDArray[np.uint16] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return bits16


def _q8_0(values: Floats) -> npt.NDArray[Any]:
    """quantize_row_q8_0_ref: scale = max |x| / 127, halves round away from zero."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    x = blocks * _inverse(scale)
    quants = np.trunc(x + np.copysign(np.float32(0.5), x)).astype(np.int8)
    return np.hstack([scale.astype(np.float16).view(np.uint8), quants.view(np.uint8)])


def _q4_0(values: Floats) -> npt.NDArray[Any]:
    """quantize_row_q4_0_ref: scale = the value of largest magnitude / -8; value i shares a byte with value i + 16."""
    blocks = values.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    quants = np.minimum((blocks * _inverse(scale) + np.float32(8.5)).astype(np.int8), 15).view(np.uint8)
    return np.hstack([scale.astype(np.float16).view(np.uint8), quants[:, :16] | quants[:, 16:] << np.uint8(4)])


def _inverse(scale: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        inverse: Floats = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse


_ENCODERS: dict[GGMLType, Callable[[Floats], npt.NDArray[Any]]] = {
    GGMLType.F32: lambda values: values,
    GGMLType.F16: lambda values: values.astype(np.float16),
    GGMLType.BF16: _bf16,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
}
WRITABLE_TYPES = {dtype.name.lower(): dtype for dtype in _ENCODERS}
"""Types that ``encode`` writes, by the names that options use."""


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} cannot be written as UTF-8: {error.reason}") from None
    return struct.pack("<Q", len(data)) + data


# The types of a scalar in Python, in the order in which they are tried.
_SCALARS = {
    int: ((ValueType.UINT32, "I"), (ValueType.INT32, "i"), (ValueType.UINT64, "Q"), (ValueType.INT64, "q")),
    float: ((ValueType.FLOAT32, "f"), (ValueType.FLOAT64, "d")),
}


def _value(value: Any) -> bytes:
    """The type of a metadata value, and the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", ValueType.BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, np.ndarray | list):
        return struct.pack("<I", ValueType.ARRAY) + _array(value)
    for kind, code in _SCALARS.get(type(value), ()):
        with suppress(struct.error, OverflowError):  # out of that type's range
            return struct.pack(f"<I{code}", kind, value)
    raise ConfigError(f"{shown(value)} cannot be written as a metadata value: no type of GGUF holds it")


def _array(values: npt.NDArray[Any] | list[Any]) -> bytes:
    """The type of the items, their number and the items."""
    kinds = {type(value) for value in values} if isinstance(values, list) else set()
    if kinds == {str}:
        return struct.pack("<IQ", ValueType.STRING, len(values)) + b"".join(map(_string, values))
    if kinds and kinds <= {list, np.ndarray}:
        return struct.pack("<IQ", ValueType.ARRAY, len(values)) + b"".join(map(_array, values))
    array = values if isinstance(values, np.ndarray) else _numbers(values, kinds)
    return struct.pack("<IQ", _ARRAY_KINDS[array.dtype.str[1:]], len(array)) + array.tobytes()


def _numbers(values: list[Any], kinds: set[type]) -> npt.NDArray[Any]:
    dtype = {bool: np.bool_, int: np.int32, float: np.float32}.get(kinds.pop() if len(kinds) == 1 else int)
    with suppress(OverflowError, TypeError, ValueError):
        if dtype is not None:
            return np.array(values, dtype)
    raise ConfigError(f"{shown(values)} cannot be written as a metadata value: its items are not of one type of GGUF")
