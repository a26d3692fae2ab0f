"""The bytes of one GGUF file: header, metadata and tensor directory, each number checked before it is relied on.

The layout, all little-endian: magic ``GGUF``, u32 version, u64 tensor count, u64 key count; then the keys (string, u32
type, value); then the tensors (string, u32 rank, u64 dimensions with the fastest first, u32 type, u64 offset); then
padding to the alignment, where offset 0 of the tensor data lies. A string is a u64 length and its bytes; an array is a
u32 element type, a u64 length and its elements. :mod:`pydflash.gguf` is what other modules use.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pydflash.errors import BadMetadata, LoadError, StateError
from pydflash.ggml_types import GGMLType

__all__ = ["Cursor", "Metadata", "TensorInfo", "read_header", "read_metadata", "read_tensors", "truncated"]

# Ceilings far above any real model; below them, the size of the file bounds every count. Strings and nested arrays cost
# Python work for each item, so their ceiling is lower than that of numbers, which are only pointed at.
MAX_TENSORS = MAX_KEYS = 100_000
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME without the terminator
MAX_STRING_BYTES = 16 << 20
MAX_NUMBERS = 100_000_000
MAX_ITEMS = 1 << 24
MAX_NESTING = 4
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENTS = tuple(1 << n for n in range(3, 21))  # 8 bytes to 1 MiB

# The fewest bytes an entry takes. A key: length, 1 byte, type, 1 byte. A tensor: length, 1 byte, rank, one dimension,
# type, offset.
MIN_KEY_ENTRY = 8 + 1 + 4 + 1
MIN_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8

KNOWN_TYPES = frozenset(int(kind) for kind in GGMLType)
DAMAGED = "the file is damaged or not a model: download or convert it again"

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class ValueType(IntEnum):
    """The type numbers of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("u1"),  # any non-zero byte is true, as in ggml
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor directory."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]  # row-major: the reverse of the file's order
    nbytes: int
    offset: int  # bytes from the start of the part's file
    part: int = 0  # which file of a split model

    @property
    def elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Value:
    """Where metadata lies. ``count`` is None for a scalar; ``start`` is the first byte behind type and length."""

    kind: ValueType
    count: int | None
    start: int

    def __str__(self) -> str:
        name = self.kind.name.lower()
        return name if self.count is None else f"array of {self.count:,} {name}"


class Cursor:
    """A read position in a mapped file. Whatever it returns or steps over lies inside the file."""

    def __init__(self, path: Path, data: mmap.mmap, pos: int = 0) -> None:
        self.path, self.data, self.size, self.pos = path, data, len(data), pos

    def fail(self, problem: str, at: int, remedy: str = DAMAGED, error: type[LoadError] = LoadError) -> NoReturn:
        raise error(f"{self.path}: {problem} (byte {at:,}); {remedy}")

    def skip(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` bytes and return where they start."""
        start = self.pos
        if nbytes > self.size - start:
            truncated(self.path, self.size, start, nbytes, what)
        self.pos = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.skip(8, what))[0])

    def text(self, what: str, limit: int) -> str:
        """A key or tensor name: 1 to ``limit`` bytes of UTF-8."""
        at = self.pos
        length = self.u64(f"the length of {what}")
        if not 1 <= length <= limit:
            self.fail(f"{what} is {length:,} bytes long, allowed are 1 to {limit:,}", at)
        start = self.skip(length, what)
        try:
            return self.data[start : self.pos].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", start + error.start)

    def value(self, key: str) -> Value:
        """Step over the metadata value of ``key``."""
        kind = self._value_type(key)
        if kind == ValueType.ARRAY:
            return self.array(key)
        start = self.pos
        if kind == ValueType.STRING:
            self._skip_strings(1, key)
        else:
            self.skip(_DTYPES[kind].itemsize, f"the value of {key!r}")
        return Value(kind, None, start)

    def array(self, key: str, depth: int = 1) -> Value:
        """Step over an array, from its element type on."""
        kind = self._value_type(key)
        at = self.pos
        count = self.u64(f"the array length of {key!r}")
        limit = MAX_NUMBERS if kind in _DTYPES else MAX_ITEMS
        if count > limit:
            self.fail(f"{key!r} is an array of {count:,} items, allowed are {limit:,}", at)
        start = self.pos
        if kind in _DTYPES:
            self.skip(count * _DTYPES[kind].itemsize, f"{count:,} items of {key!r}")
        elif kind == ValueType.STRING:
            self._skip_strings(count, key)
        elif depth == MAX_NESTING:
            self.fail(f"{key!r} nests arrays more than {MAX_NESTING} deep", at)
        else:
            for _ in range(count):
                self.array(key, depth + 1)
        return Value(kind, count, start)

    def _value_type(self, key: str) -> ValueType:
        at = self.pos
        number = self.u32(f"the type of {key!r}")
        if number > max(ValueType):
            self.fail(f"{key!r} has value type {number}, known are 0 to {max(ValueType):d}", at)
        return ValueType(number)

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over ``count`` strings; a vocabulary has a quarter of a million, so the loop does nothing else."""
        what = f"{count:,} strings of {key!r}, at least"
        if 8 * count > self.size - self.pos:
            truncated(self.path, self.size, self.pos, 8 * count, what)
        data, pos, length_at = self.data, self.pos, _U64.unpack_from
        try:
            for _ in range(count):
                (length,) = length_at(data, pos)
                if length > MAX_STRING_BYTES:
                    self.fail(f"a string of {key!r} has {length:,} bytes, allowed are {MAX_STRING_BYTES:,}", pos)
                pos += 8 + length
        except struct.error:  # the next length is not whole inside the file
            pos += 8
        self.skip(pos - self.pos, what)


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a file, decoded on first access.

    Scalars are int, float, bool or str. An array of numbers is a read-only numpy view of the file (an array of bools is
    a copy), an array of strings is ``list[str]``, a nested array is a list. Bytes that are not UTF-8, as byte-level
    token lists have, become lone surrogates: ``text.encode("utf-8", "surrogateescape")`` gives the file's bytes back.
    """

    def __init__(self, path: Path, data: mmap.mmap, values: dict[str, Value]) -> None:
        self._path, self._values = path, values
        self._data: mmap.mmap | None = data
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._decode(key, self._values[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:  # Mapping's own version would decode the value
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def describe(self, key: str) -> str:
        """The type of ``key`` as the file states it, such as ``uint32`` or ``array of 4 int32``."""
        return str(self._values[key])

    def count(self, key: str) -> int | None:
        """The number of items of the array ``key``; None if the key is missing or a scalar. Decodes nothing."""
        return self._values[key].count if key in self._values else None

    def position(self, key: str) -> int:
        """The byte of the file at which the value of ``key`` starts, behind its type and length."""
        return self._values[key].start

    def close(self) -> None:
        """Release the file. Values that were decoded before stay readable."""
        self._data = None

    def _decode(self, key: str, value: Value) -> Any:
        if self._data is None:
            raise StateError(f"{self._path}: {key!r} was requested after the file was closed; keep the file open")
        if value.kind == ValueType.ARRAY:
            cursor = Cursor(self._path, self._data, value.start)
            return [self._decode(key, cursor.array(key)) for _ in range(value.count or 0)]
        count = 1 if value.count is None else value.count
        if value.kind == ValueType.STRING:
            strings = _strings(self._data, value.start, count)
            return strings[0] if value.count is None else strings
        numbers = np.frombuffer(self._data, _DTYPES[value.kind], count, value.start)
        if value.kind == ValueType.BOOL:
            numbers = numbers != 0
        return numbers[0].item() if value.count is None else numbers


def truncated(path: Path, size: int, start: int, nbytes: int, what: str) -> NoReturn:
    """Raise the LoadError for ``nbytes`` bytes from ``start`` on that reach beyond the file's ``size``."""
    raise LoadError(
        f"{path}: {start + nbytes - size:,} bytes are missing: {what} needs {nbytes:,} bytes from byte {start:,} on, "
        f"and the file ends at byte {size:,}; download or copy it again"
    )


def read_header(cursor: Cursor) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of keys."""
    magic = cursor.data[cursor.skip(4, "the magic") : cursor.pos]
    if magic != b"GGUF":
        cursor.fail(f"a GGUF file starts with b'GGUF' and this one with {magic!r}", 0, "convert the model to GGUF")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("the file is big-endian and only little-endian is read", 4, "convert the model to little-endian")
    if version not in (2, 3):
        cursor.fail(f"the file has GGUF version {version}, only 2 and 3 can be read", 4, "convert the model again")
    n_tensors = _entry_count(cursor, "tensors", MAX_TENSORS, MIN_TENSOR_ENTRY)
    n_keys = _entry_count(cursor, "keys", MAX_KEYS, MIN_KEY_ENTRY)
    return n_tensors, n_keys


def _entry_count(cursor: Cursor, what: str, limit: int, entry_bytes: int) -> int:
    at = cursor.pos
    count = cursor.u64(f"the number of {what}")
    if count > limit:
        cursor.fail(f"the file claims {count:,} {what}, allowed are {limit:,}", at)
    if count * entry_bytes > cursor.size - cursor.pos:
        truncated(cursor.path, cursor.size, cursor.pos, count * entry_bytes, f"a list of {count:,} {what}, at least")
    return count


def read_metadata(cursor: Cursor, n_keys: int) -> Metadata:
    """Step over all key-value pairs; keys are unique, values are inside the file and not yet decoded."""
    values: dict[str, Value] = {}
    for index in range(n_keys):
        at = cursor.pos
        key = cursor.text(f"key {index}", MAX_KEY_BYTES)
        if key in values:
            cursor.fail(f"the key {key!r} appears twice", at)
        values[key] = cursor.value(key)
    return Metadata(cursor.path, cursor.data, values)


def read_tensors(cursor: Cursor, n_tensors: int, alignment: int, part: int) -> list[TensorInfo]:
    """The tensor directory in file order, offsets absolute. The tensors lie inside the file and do not overlap."""
    entries: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        at = cursor.pos
        info = _tensor_entry(cursor, part)
        if info.name in entries:
            cursor.fail(f"the tensor {info.name!r} appears twice", at)
        if info.offset % alignment:
            cursor.fail(f"tensor {info.name!r} has offset {info.offset:,}, which is not aligned to {alignment:,}", at)
        entries[info.name] = info
    start = -(-cursor.pos // alignment) * alignment
    tensors = [replace(info, offset=start + info.offset) for info in entries.values()]
    tensors.sort(key=lambda info: info.offset)
    for before, after in pairwise(tensors):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(f"the tensors {before.name!r} and {after.name!r} overlap", after.offset)
    if tensors and tensors[-1].offset + tensors[-1].nbytes > cursor.size:
        last = tensors[-1]
        truncated(cursor.path, cursor.size, last.offset, last.nbytes, f"tensor {last.name!r}")
    return tensors


def _tensor_entry(cursor: Cursor, part: int) -> TensorInfo:
    """One directory entry; its offset is relative to the start of the tensor data."""
    at = cursor.pos
    name = cursor.text("a tensor name", MAX_NAME_BYTES)
    tensor = f"tensor {name!r}"
    rank = cursor.u32(f"the rank of {tensor}")
    if not 1 <= rank <= MAX_DIMS:
        cursor.fail(f"{tensor} has {rank:,} dimensions, allowed are 1 to {MAX_DIMS}", at)
    shape = tuple(cursor.u64(f"the shape of {tensor}") for _ in range(rank))[::-1]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        cursor.fail(f"{tensor} has shape {shape}, allowed are dimensions from 1 and a product below 2**63", at)
    number = cursor.u32(f"the type of {tensor}")
    if number not in KNOWN_TYPES:
        cursor.fail(f"{tensor} has ggml type {number}, which is unknown or was removed", at, "quantise the model again")
    kind = GGMLType(number)
    if shape[-1] % kind.block_size:
        cursor.fail(f"{tensor} has rows of {shape[-1]:,} elements and {kind.name} blocks of {kind.block_size}", at)
    return TensorInfo(name, kind, shape, kind.nbytes(math.prod(shape)), cursor.u64(f"the offset of {tensor}"), part)


def read_alignment(cursor: Cursor, metadata: Metadata) -> int:
    """The alignment of the tensor data in bytes; BadMetadata unless it is a uint32 power of two from 8 B to 1 MiB."""
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    found = metadata.describe(key)
    if found == "uint32" and metadata[key] in ALIGNMENTS:
        return int(metadata[key])
    found += f" {metadata[key]:,}" if found == "uint32" else ""
    problem = f"{key!r} must be a uint32 power of two from 8 to 1,048,576 and is {found}"
    cursor.fail(problem, metadata.position(key), error=BadMetadata)


def _strings(data: mmap.mmap, start: int, count: int) -> list[str]:
    """Decode ``count`` strings that a cursor has stepped over before."""
    out: list[str] = []
    length_at = _U64.unpack_from
    for _ in range(count):
        begin = start + 8
        start = begin + length_at(data, start)[0]
        out.append(data[begin:start].decode("utf-8", "surrogateescape"))
    return out
