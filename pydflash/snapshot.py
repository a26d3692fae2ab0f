"""Snapshots: what a session remembers, as values on the host from which a session of the same configuration goes on.

A fingerprint is every choice that changes what those bytes mean (D9); a snapshot is restored only where all agree. In a
file the arrays lie in a safetensors container whose metadata hold the rest and a checksum. Its header has one valid
spelling, so that the checksum, of the data and of all that the header is made from, covers every byte of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from pydflash.atomic_file import replacing
from pydflash.errors import LoadError, ShapeError, SnapshotMismatch
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.limits import MOST_POSITIONS, TAPE_ROWS
from pydflash.state import DraftCache, state_shape, tape_shape
from pydflash.tensor import Shape

__all__ = [
    "FORMAT",
    "DraftFingerprint",
    "Fingerprint",
    "Layout",
    "Place",
    "Snapshot",
    "check_fingerprint",
    "host_arrays",
]

FORMAT = 1
"""Raised when a version of this package gives the bytes of a snapshot another meaning."""

Layout: TypeAlias = "dict[str, tuple[Shape, str]]"
"""Arrays by name: shape and dtype, 'F32' or 'U8' (rows of packed bytes)."""

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


# --- what the bytes mean ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides what the bytes of a target session mean.

    ``model`` is :meth:`GGUFFile.fingerprint_digest`; ``k_basis`` and ``v_basis`` are names of ``kv_format.K_BASES``.
    The device does not matter, since all keep rows and states alike, nor do ``max_context``, ``chunk``, ``capture``.
    """

    format: int
    model: str
    cache_k: str
    cache_v: str
    k_basis: str
    v_basis: str
    rope_base: float
    rope_dims: int
    attention_layers: tuple[int, ...]
    kv_heads: int
    head_size: int
    delta_layers: tuple[int, ...]
    k_heads: int
    v_heads: int
    state_size: int
    conv_kernel: int

    def layout(self, length: int, replay: int) -> Layout:
        """The arrays of ``length`` positions: K/V rows of all, the delta-net state before the last ``replay`` of them
        and a window of the history and these."""
        arrays: Layout = {}
        for layer in self.delta_layers:
            arrays[f"state.{layer}"] = (state_shape(self), "F32")
            arrays[f"window.{layer}"] = ((self.conv_kernel - 1 + replay, tape_shape(self)[1]), "F32")
        for layer in self.attention_layers:
            for side, cache in (("k", self.cache_k), ("v", self.cache_v)):
                arrays[f"{side}.{layer}"] = _rows(length, self.kv_heads * self.head_size, CACHE_TYPES[cache])
        return arrays


@dataclass(frozen=True)
class DraftFingerprint:
    """Everything that decides what the bytes of a draft session mean. ``model`` and ``draft`` are digests of the files.

    ``windows`` and ``causal``: per layer, as in ``DraftConfig``.
    """

    format: int
    model: str
    draft: str
    taps: tuple[int, ...]
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    rope_base: float
    kv_heads: int
    head_size: int

    def layout(self, length: int, replay: int) -> Layout:
        """The arrays of ``length`` positions: K/V rows of all, or of those that a sliding layer's window covers."""
        if replay:
            raise ShapeError(f"a draft session has no rows to replay, found {replay}")
        arrays: Layout = {}
        for layer, window in enumerate(self.windows):
            for side in "kv":
                rows = min(length, window) if window else length
                arrays[f"{side}.{layer}"] = _rows(rows, self.kv_heads * self.head_size, DraftCache.dtype)
        return arrays


_KINDS = {"session": Fingerprint, "draft session": DraftFingerprint}
AnyFingerprint: TypeAlias = "Fingerprint | DraftFingerprint"


def _rows(count: int, columns: int, dtype: GGMLType) -> tuple[Shape, str]:
    return (count, dtype.nbytes(columns)), "U8"


def _check_counts(length: int, replay: int) -> None:
    """ShapeError unless a session can have ``length`` positions, the last ``replay`` of them on its tape."""
    if not 0 <= length <= MOST_POSITIONS or not 0 <= replay <= min(length, TAPE_ROWS):
        raise ShapeError(
            f"a snapshot of {length} positions with {replay} rows to replay; "
            f"there are at most {MOST_POSITIONS:,} and {TAPE_ROWS}"
        )


def host_arrays(layout: Layout) -> dict[str, npt.NDArray[Any]]:
    """Arrays of ``layout``, to be filled."""
    return {name: np.empty(shape, _DTYPES[dtype]) for name, (shape, dtype) in layout.items()}


def _kind(fingerprint: AnyFingerprint) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(fingerprint, kind))


def check_fingerprint(found: AnyFingerprint, wanted: AnyFingerprint) -> None:
    """SnapshotMismatch unless a snapshot's fingerprint is the session's: the first field that differs, both values."""
    if type(found) is not type(wanted):
        raise SnapshotMismatch(f"restore: the snapshot is that of a {_kind(found)}, this is a {_kind(wanted)}")
    for name in (f.name for f in fields(wanted)):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if theirs != ours:
            raise SnapshotMismatch(
                f"restore: {name} of the snapshot is {theirs!r}, that of this {_kind(wanted)} is {ours!r}; open the "
                "session as it was when the snapshot was taken, or take another one"
            )


# --- snapshots --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A point of one sequence: no two texts share it."""

    sequence: str
    length: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A session or draft session between two steps; made by their ``snapshot()`` or by :meth:`load`. It never changes.

    ``length``: positions. ``replay``: the last of them that the delta-net state does not contain yet; they lie in its
    window. ``sequence``: what the session's text is called, so that a draft's snapshot finds its target's. ``arrays``:
    read-only numpy arrays, as ``fingerprint.layout(length, replay)`` says. ShapeError when they are not.
    """

    fingerprint: AnyFingerprint
    sequence: str
    length: int
    replay: int = 0
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_counts(self.length, self.replay)
        layout = self.fingerprint.layout(self.length, self.replay)
        if list(self.arrays) != list(layout):
            raise ShapeError(f"a snapshot with arrays {', '.join(self.arrays)}; it needs {', '.join(layout)}")
        for name, (shape, dtype) in layout.items():
            values = self.arrays[name]
            if values.shape != shape or values.dtype != _DTYPES[dtype] or not values.flags.c_contiguous:
                raise ShapeError(
                    f"a snapshot with {name} of shape {values.shape} and dtype {values.dtype}; "
                    f"it needs contiguous {shape}, {_DTYPES[dtype]}"
                )
            values.flags.writeable = False
        object.__setattr__(self, "arrays", MappingProxyType(dict(self.arrays)))

    @property
    def place(self) -> Place:
        return Place(self.sequence, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; a file has a few KiB more."""
        return sum(values.nbytes for values in self.arrays.values())

    def save(self, path: str | Path) -> None:
        """Write a file that only its owner can read, either whole or not at all, and on the disk when this returns.

        A symlink is followed; what is no regular file is refused. Raises WriteError, which is an OSError.
        """
        statement = _statement(self)
        header = _header(self.fingerprint.layout(self.length, self.replay), statement, _digest(statement, self.arrays))
        with replacing(path, private=True) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for values in self.arrays.values():
                file.write(values.data)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read a file that :meth:`save` wrote. Nothing in it is believed before it was checked.

        Raises LoadError that names the file, what was found and what to do.
        """
        path = Path(path)
        if not path.is_file():  # a pipe would block
            found = "is not a regular file" if path.exists() else "does not exist"
            raise LoadError(f"{path}: a snapshot was asked for and the path {found}; check its spelling")
        try:
            with path.open("rb") as file:
                return _Reader(path, file).read()
        except (OSError, MemoryError) as error:
            raise LoadError(f"{path}: cannot be read: {error!r}; check permissions and free memory") from error


# --- files ------------------------------------------------------------------------------------------------------------

_HEADER_LIMIT = 1 << 20  # a header of the 27B model has 11 KB
_STATEMENT, _SHA256 = "pydflash.snapshot", "sha256"


def _statement(snapshot: Snapshot) -> str:
    """Everything but the arrays, as JSON."""
    content = {name: getattr(snapshot, name) for name in ("sequence", "length", "replay")}
    content |= {"kind": _kind(snapshot.fingerprint), "fingerprint": asdict(snapshot.fingerprint)}
    return json.dumps(content, separators=(",", ":"))


def _digest(statement: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(statement.encode(errors="surrogatepass"))  # JSON from a hostile file can hold surrogates
    for values in arrays.values():
        digest.update(values.data)
    return digest.hexdigest()


def _nbytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _header(layout: Layout, statement: str, digest: str) -> bytes:
    """The one header that a file of these contents has."""
    header: dict[str, Any] = {"__metadata__": {_STATEMENT: statement, _SHA256: digest}}
    start = 0
    for name, (shape, dtype) in layout.items():
        end = start + _nbytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class _Reader:
    """Reads one file, and checks each part before the next relies on it."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def read(self) -> Snapshot:
        header = self._read_header()
        statement, digest = self._metadata(header)
        fingerprint, sequence, length, replay, layout = self._parse(statement)
        if header != _header(layout, statement, digest):
            self._damaged("its arrays are not those that its fingerprint asks for")
        self._check_size(8 + len(header) + sum(_nbytes(*spec) for spec in layout.values()))
        arrays = host_arrays(layout)
        for values in arrays.values():
            self._fill(values)
        if _digest(statement, arrays) != digest:
            self._damaged("its contents do not have the checksum that it states")
        return Snapshot(fingerprint, sequence, length, replay, arrays)

    def _read_header(self) -> bytes:
        prefix = self.file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, self.size - 8):
            kind = "a GGUF file" if prefix[:4] == b"GGUF" else f"{self.size:,} bytes without a header of a valid size"
            raise LoadError(f"{self.path}: is no snapshot, found {kind}; give a file that Snapshot.save wrote")
        return self.file.read(length)

    def _metadata(self, header: bytes) -> tuple[str, str]:
        """The statement and the digest."""
        try:
            metadata = json.loads(header)["__metadata__"]
            statement, digest = metadata[_STATEMENT], metadata[_SHA256]
            if not isinstance(statement, str) or not isinstance(digest, str):
                raise TypeError("metadata are strings")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LoadError(
                f"{self.path}: is no snapshot or damaged, its header has no metadata of one; "
                "give a file that Snapshot.save wrote"
            ) from None
        return statement, digest

    def _parse(self, statement: str) -> tuple[AnyFingerprint, str, int, int, Layout]:
        """Fingerprint, sequence, length and rows to replay, each of a valid type and size, and the layout of these."""
        try:
            content = json.loads(statement)
            found = content["fingerprint"]
            if found["format"] != FORMAT:
                raise LoadError(
                    f"{self.path}: has format {found['format']!r:.20}, this version reads {FORMAT}; "
                    "take the snapshot again"
                )
            kind = _KINDS[content["kind"]]
            fingerprint = kind(**{f.name: _value(str(f.type), found[f.name]) for f in fields(kind)})
            length, replay = _value("int", content["length"]), _value("int", content["replay"])
            _check_counts(length, replay)
            layout = fingerprint.layout(length, replay)
            return fingerprint, _value("str", content["sequence"]), length, replay, layout
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._damaged(f"its metadata hold what no snapshot has ({error!r:.80})")

    def _check_size(self, needed: int) -> None:
        if self.size != needed:
            self._damaged(f"it has {self.size:,} bytes and its header asks for {needed:,}")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise LoadError(
                f"{self.path}: holds {needed:,} bytes, this machine has {memory:,} bytes of memory; "
                "restore it on a larger one"
            )

    def _fill(self, values: npt.NDArray[Any]) -> None:
        if values.nbytes and self.file.readinto(values.reshape(-1).data) != values.nbytes:
            self._damaged("it became shorter while it was read")

    def _damaged(self, found: str) -> NoReturn:
        raise LoadError(f"{self.path}: the snapshot is truncated or damaged, {found}; take it again or copy it again")


def _value(kind: str, value: Any) -> Any:
    """``value`` from JSON for a field declared as ``kind``; ValueError for another type or a number out of range."""
    if kind.startswith("tuple["):
        if type(value) is not list:
            raise ValueError(f"{value!r:.20} is no list")
        return tuple(_value(kind[6:].partition(",")[0], item) for item in value)
    wanted = {"int": int, "float": float, "str": str, "bool": bool}[kind]
    if type(value) is not wanted:
        raise ValueError(f"{value!r:.20} is no {kind}")
    if isinstance(value, int) and not 0 <= value < 1 << 31:
        raise ValueError(f"{value} is out of range")
    return value
