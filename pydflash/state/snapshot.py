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
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from pydflash.arguments import a_path, an_instance, an_integer
from pydflash.errors import LoadError, ShapeError
from pydflash.files import replacing
from pydflash.limits import MOST_POSITIONS, TAPE_ROWS
from pydflash.native import Shape
from pydflash.state.fingerprint import FORMAT, Fingerprint, checked
from pydflash.state.layer import Layout

__all__ = ["Place", "Snapshot", "host_arrays"]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


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


# --- snapshots --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A point of one sequence; no two texts share one."""

    sequence: str
    length: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A session or draft session between two steps; made by their ``snapshot()`` or by :meth:`load`. It never changes.

    ``length``: positions. ``replay``: the last of them that the delta-net state does not contain yet; they lie in its
    window. ``sequence``: the name of the session's text, by which a draft's snapshot finds its target's. ``arrays``:
    read-only numpy arrays, as ``fingerprint.layout(length, replay)`` says. ShapeError when they are not.
    """

    fingerprint: Fingerprint
    sequence: str
    length: int
    replay: int = 0
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        an_instance(self.fingerprint, Fingerprint, "fingerprint")
        an_instance(self.sequence, str, "sequence")
        an_instance(self.arrays, Mapping, "arrays")
        for name in ("length", "replay"):
            an_integer(getattr(self, name), name, -sys.maxsize, sys.maxsize)
        _check_counts(self.length, self.replay)
        layout = self.fingerprint.layout(self.length, self.replay)
        if list(self.arrays) != list(layout):
            raise ShapeError(f"a snapshot with arrays {', '.join(self.arrays)}; it needs {', '.join(layout)}")
        for name, (shape, dtype) in layout.items():
            values = an_instance(self.arrays[name], np.ndarray, name)
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
        """Read a file that :meth:`save` wrote. Nothing in it is trusted before it has been checked.

        Raises LoadError that names the file, what was found and what to do.
        """
        path = a_path(path, "path")
        try:
            if not path.is_file():  # a pipe would block
                found = "is not a regular file" if path.exists() else "does not exist"
                raise LoadError(f"{path}: a snapshot file is needed and the path {found}; check its spelling")
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
    content["fingerprint"] = snapshot.fingerprint.as_json()
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
            self._damaged("its arrays are not those that its fingerprint requires")
        self._check_size(8 + len(header) + sum(_nbytes(*spec) for spec in layout.values()))
        try:
            arrays = host_arrays(layout)
        except ValueError as error:  # a size below 0, or one whose product with others overflows
            self._damaged(f"its arrays cannot be made ({error})")
        for values in arrays.values():
            self._fill(values)
        if _digest(statement, arrays) != digest:
            self._damaged("its contents do not match its checksum")
        return Snapshot(fingerprint, sequence, length, replay, arrays)

    def _read_header(self) -> bytes:
        prefix = self.file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, self.size - 8):
            kind = "a GGUF file" if prefix[:4] == b"GGUF" else f"{self.size:,} bytes without a header of a valid size"
            raise LoadError(f"{self.path}: is not a snapshot, found {kind}; give a file that Snapshot.save wrote")
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
                f"{self.path}: is not a snapshot or is damaged: its header lacks a snapshot's metadata; "
                "give a file that Snapshot.save wrote"
            ) from None
        return statement, digest

    def _parse(self, statement: str) -> tuple[Fingerprint, str, int, int, Layout]:
        """Fingerprint, sequence, length and rows to replay, each of a valid type and size, and the layout of these."""
        try:
            content = json.loads(statement)
            found = content["fingerprint"]
            if found["format"] != FORMAT:
                raise LoadError(
                    f"{self.path}: has format {found['format']!r:.20}, this version reads {FORMAT}; "
                    "take the snapshot again"
                )
            fingerprint = Fingerprint.from_json(found)
            length, replay = checked("int", content["length"]), checked("int", content["replay"])
            _check_counts(length, replay)
            layout = fingerprint.layout(length, replay)
            return fingerprint, checked("str", content["sequence"]), length, replay, layout
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._damaged(f"its metadata are not those of a snapshot ({error!r:.80})")

    def _check_size(self, needed: int) -> None:
        if self.size != needed:
            self._damaged(f"it has {self.size:,} bytes and its header requires {needed:,}")
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
