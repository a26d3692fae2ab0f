"""A minimal GGUF (version 3) writer: the header from Python values, tensor data streamed from iterators of bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydflash.files import replacing

from .blocks import BlockType

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

Scalar = bool | int | float | str
Value = Scalar | Sequence[Scalar]


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: row-major shape, type, and a function that yields its bytes in order."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.type.row_bytes(self.shape[-1])


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> int:
    """Write a GGUF file, whole or not at all, and return its size in bytes.

    Python types choose the GGUF types: bool BOOL, int UINT32 (INT32 inside lists), float FLOAT32, str STRING. Raises
    ValueError if a tensor yields too few or too many bytes, WriteError if the file cannot be written.
    """
    with replacing(path) as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            extents = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            file.write(_string(tensor.name) + extents + struct.pack("<IQ", tensor.type.code, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        _pad(file)
        for tensor in tensors:
            written = sum(file.write(chunk) for chunk in tensor.chunks())
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes were produced, {tensor.nbytes} belong there")
            _pad(file)
        return file.tell()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, (str, bool, int, float)):
        kind = UINT32 if _kind(value) == INT32 else _kind(value)
        return struct.pack("<I", kind) + _scalar(value, kind)
    kind = _kind(value[0])
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_scalar(item, kind) for item in value)


def _kind(value: Scalar) -> int:
    # bool comes first: a bool is an int as well.
    kinds = ((bool, BOOL), (int, INT32), (float, FLOAT32), (str, STRING))
    return next(kind for python, kind in kinds if isinstance(value, python))


def _scalar(value: Scalar, kind: int) -> bytes:
    if isinstance(value, str):
        return _string(value)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)
