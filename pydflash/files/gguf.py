"""Open GGUF model files, in one part or several, without copying them.

The file is checked once, completely, and mapped, not read: tensor data, arrays of numbers and the token list stay in it
until they are read. It must not be truncated or overwritten while it is open, because the operating system
kills a process that reads a page which is no longer there.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt

from pydflash.arguments import a_path
from pydflash.errors import BadMetadata, LoadError, MissingTensor, StateError
from pydflash.files.gguf_format import (
    Cursor,
    Metadata,
    TensorInfo,
    read_alignment,
    read_header,
    read_metadata,
    read_tensors,
    truncated,
)
from pydflash.ggml_types import GGMLType

__all__ = ["GGMLType", "GGUFFile", "Metadata", "TensorInfo"]

T = TypeVar("T")
D = TypeVar("D")

SAMPLE_BYTES = 4096
CHUNK_BYTES = 16 << 20
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


class _Part:
    """One mapped and completely checked file."""

    def __init__(self, path: Path, index: int) -> None:
        self.path = path
        self.file, self.data = _open_and_map(path)
        try:
            cursor = Cursor(path, self.data)
            n_tensors, n_keys = read_header(cursor)
            self.metadata = read_metadata(cursor, n_keys)
            alignment = read_alignment(cursor, self.metadata)
            self.tensors = read_tensors(cursor, n_tensors, alignment, index)
            self.header_bytes = cursor.pos
        except BaseException:
            self.data.close()
            self.file.close()
            raise

    def read(self, start: int, nbytes: int) -> bytes:
        """Copy bytes without touching the mapping, where each page touched would fetch megabytes around it."""
        try:
            self.file.seek(start)
            content = self.file.read(nbytes)
        except OSError as error:
            raise LoadError(f"{self.path}: cannot be read: {error}; download or copy it again") from error
        if len(content) < nbytes:
            truncated(self.path, start + len(content), start, nbytes, "its digest")
        return content

    def close(self) -> None:
        self.metadata.close()
        self.file.close()
        with suppress(BufferError):  # an array that was returned still needs the mapping and frees it later
            self.data.close()


class GGUFFile:
    """A model file, or all parts of a split one, mapped read-only; made by :meth:`open`, closed by ``with``.

    ``metadata`` is that of the first part, ``tensors`` holds those of all parts in file order, ``nbytes`` is the size
    of all files, ``path`` the first file and ``paths`` all of them. ``keys_read`` holds the metadata keys whose values
    :meth:`get` or :meth:`require` has given away.
    """

    def __init__(self, parts: list[_Part], tensors: dict[str, TensorInfo]) -> None:
        self._parts = parts
        self.path = parts[0].path
        self.paths = tuple(part.path for part in parts)
        self.nbytes = sum(len(part.data) for part in parts)
        self.metadata: Metadata = parts[0].metadata
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.keys_read: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and check the file at ``path``; the first part of a split model opens all parts.

        Raises LoadError (BadMetadata for a metadata value) that names the file, the place and the remedy; ConfigError
        for what is no path.
        """
        with ExitStack() as undo:
            parts = [_Part(a_path(path, "path"), 0)]
            undo.callback(parts[0].close)
            for index, other in enumerate(_other_parts(parts[0]), start=1):
                parts.append(_Part(other, index))
                undo.callback(parts[index].close)
            file = cls(parts, _merge_tensors(parts))
            undo.pop_all()
            return file

    def close(self) -> None:
        """Unmap the file. Arrays that were returned stay valid and keep their part mapped until they are gone."""
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Like :meth:`require`, but a missing key gives ``default``; a key of the wrong type still raises."""
        return self.require(key, kind) if key in self.metadata else default

    def require(self, key: str, kind: type[T]) -> T:
        """The value of ``key`` as int, float, bool, str, list or np.ndarray; BadMetadata if missing or of another type.

        Widening is allowed, guessing is not: an integer passes as float and any array as list, a bool is not an int.
        """
        wanted = f"{self.path}: metadata key {key!r} is needed as {kind.__name__}"
        if key not in self.metadata:
            raise BadMetadata(f"{wanted} and is missing; convert the model again with a current converter")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        elif kind is list and isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = f"{self.metadata.describe(key)} (byte {self.metadata.position(key):,})"
            raise BadMetadata(f"{wanted} and is {found}; convert the model again with a current converter")
        self.keys_read.add(key)
        return value

    def integers(self, key: str, at_most: int) -> list[int]:
        """The list ``key`` of up to ``at_most`` integers or flags, which count as 0 and 1; BadMetadata for another."""
        count = self.metadata.count(key)
        if count is not None and count > at_most:
            raise BadMetadata(f"{self.path}: {key} lists {count:,} values; at most {at_most:,} fit the model")
        values = self.require(key, list)
        if not all(isinstance(value, int) for value in values):
            raise BadMetadata(f"{self.path}: {key} is {self.metadata.describe(key)}; it must list integers")
        return [int(value) for value in values]

    def require_within(self, key: str, low: int, high: int, *, default: int | None = None, because: str = "") -> int:
        """The integer ``key``, or ``default`` if it is missing; BadMetadata outside of ``low..high``."""
        value = self.require(key, int) if default is None else self.get(key, int, default=default)
        if not low <= value <= high:
            reason = f" ({because})" if because else ""
            raise BadMetadata(f"{self.path}: {key} is {value}; it must lie in {low}..{high}{reason}")
        return value

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor ``name``, shape (nbytes,), as a read-only view of the file; MissingTensor if unknown."""
        if name not in self.tensors:
            found = f"not among the {len(self.tensors):,} tensors of the file"
            raise MissingTensor(f"{self.path}: tensor {name!r} is {found}; convert the model again")
        info = self.tensors[name]
        return np.frombuffer(self.mapping(info.part), np.uint8, info.nbytes, info.offset)

    def mapping(self, part: int = 0) -> mmap.mmap:
        """The whole file of ``part``, read-only, starting on a page boundary; ``TensorInfo.offset`` indexes it."""
        return self._open_parts()[part].data

    def _open_parts(self) -> list[_Part]:
        if not self._parts:
            raise StateError(f"{self.path}: tensor data was requested after the file was closed; keep the file open")
        return self._parts

    def fingerprint_digest(self) -> str:
        """A sha256 (hex) that identifies the model while reading only a few MiB, for caches that are keyed by model.

        It covers, part by part, the file's size, every byte of metadata and tensor directory, and the first and last
        4 KiB of each tensor in file order (all of a tensor up to 8 KiB). So it tells apart models, conversions,
        quantisations and fine-tunes. It cannot see a change confined to the inside of tensors, such as bit rot or an
        edit made to deceive; :meth:`full_digest` can. File names and dates do not matter; how a model is split does.
        """
        digest = hashlib.sha256(b"pydflash gguf fingerprint 1")
        for part in self._open_parts():
            digest.update(struct.pack("<QQ", len(part.data), part.header_bytes))
            digest.update(part.read(0, part.header_bytes))
            for info in part.tensors:
                first = min(info.nbytes, SAMPLE_BYTES)
                last = min(info.nbytes - first, SAMPLE_BYTES)
                digest.update(part.read(info.offset, first))
                digest.update(part.read(info.offset + info.nbytes - last, last))
        return digest.hexdigest()

    def full_digest(self, progress: Callable[[int, int], None] | None = None) -> str:
        """The sha256 (hex) of every byte of every part in order; for a single file it is what ``sha256sum`` prints.

        ``progress(done, total)`` is called with bytes after each 16 MiB.
        """
        digest, done = hashlib.sha256(), 0
        for part in self._open_parts():
            size = len(part.data)
            for start in range(0, size, CHUNK_BYTES):
                chunk = part.read(start, min(CHUNK_BYTES, size - start))
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, self.nbytes)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the file says it is, as plain JSON values, sizes in bytes; None where the file does not say."""

        def said(key: str) -> Any:
            return _plain(self.metadata.get(key))

        arch = said("general.architecture")
        return {
            "architecture": arch,
            "name": said("general.name"),
            "parameters": sum(info.elements for info in self.tensors.values()),
            "bytes": self.nbytes,
            "parts": len(self.paths),
            "tensors": len(self.tensors),
            "types": self._types(),
            "quantisation": self._quantisation(),
            "layers": said(f"{arch}.block_count"),
            "hidden": said(f"{arch}.embedding_length"),
            "heads": said(f"{arch}.attention.head_count"),
            "kv_heads": said(f"{arch}.attention.head_count_kv"),
            "context": said(f"{arch}.context_length"),
            "tokenizer": {
                "model": said("tokenizer.ggml.model"),
                "pre": said("tokenizer.ggml.pre"),
                "vocab_size": self.metadata.count("tokenizer.ggml.tokens"),
            },
            "has_chat_template": "tokenizer.chat_template" in self.metadata,
        }

    def _types(self) -> dict[str, dict[str, int]]:
        """Tensors, elements and bytes of each type, most bytes first."""
        types: dict[str, dict[str, int]] = {}
        for info in self.tensors.values():
            entry = types.setdefault(info.type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["parameters"] += info.elements
            entry["bytes"] += info.nbytes
        return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))

    def _quantisation(self) -> str | None:
        """The types that hold most bytes and the mean width, such as ``Q4_K 68%, Q6_K 20%, 4.85 bits per weight``."""
        types = self._types()
        if not types:
            return None
        elements, nbytes = (sum(entry[what] for entry in types.values()) for what in ("parameters", "bytes"))
        shares = [f"{name} {entry['bytes'] / nbytes:.0%}" for name, entry in types.items()]
        return f"{', '.join(shares[:2])}, {8 * nbytes / elements:.2f} bits per weight"


def _plain(value: Any) -> Any:
    """A metadata value without numpy types."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _open_and_map(path: Path) -> tuple[BinaryIO, mmap.mmap]:
    try:
        if not path.is_file():  # a pipe would block and a directory cannot be mapped
            found = "is not a regular file" if path.exists() else "does not exist"
            raise LoadError(f"{path}: a GGUF file is needed and the path {found}; check its spelling")
        with ExitStack() as undo:
            file = undo.enter_context(path.open("rb"))
            if file.seek(0, 2) == 0:  # an empty file cannot be mapped
                truncated(path, 0, 0, 24, "the header")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            undo.pop_all()
            return file, data
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be opened: {error}; check permissions and free memory") from error


def _other_parts(first: _Part) -> list[Path]:
    """The paths of parts 2, 3, ... of a split model, all of which exist; none for a model in one file."""
    path, count, number = first.path, _split_value(first, "split.count", 1), _split_value(first, "split.no", 0)
    if count <= 1:
        return []
    name = PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise LoadError(f"{path}: is one of {count} parts and must be named ...-00001-of-{count:05}.gguf; rename it")
    paths = [path.with_name(f"{name['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if number != 0:
        raise LoadError(f"{path}: is part {number + 1} of {count} and the first was expected; open {paths[0].name}")
    if path != paths[0]:
        raise LoadError(f"{path}: holds part 1 of {count} under another part's name; rename it to {paths[0].name}")
    for other in paths[1:]:
        if not other.exists():
            raise LoadError(f"{other}: missing, it is one of {count} parts; download all parts into one folder")
    return paths[1:]


def _merge_tensors(parts: list[_Part]) -> dict[str, TensorInfo]:
    """The tensors of all parts by name, after checking that the parts belong together."""
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        count, number = _split_value(part, "split.count", 1), _split_value(part, "split.no", 0)
        if index and (count, number) != (len(parts), index):
            found = f"says that it is part {number + 1} of {count}, but part {index + 1} of {len(parts)} was expected"
            raise LoadError(f"{part.path}: {found}; download all parts again")
        for info in part.tensors:
            if info.name in tensors:
                found = f"tensor {info.name!r} is also in part {tensors[info.name].part + 1}"
                raise LoadError(f"{part.path}: {found}; download all parts again")
            tensors[info.name] = info
    promised = _split_value(parts[0], "split.tensors.count", len(tensors))
    if len(parts) > 1 and promised != len(tensors):
        found = f"promises {promised:,} tensors and the {len(parts)} parts hold {len(tensors):,}"
        raise LoadError(f"{parts[0].path}: {found}; download all parts again")
    return tensors


def _split_value(part: _Part, key: str, default: int) -> int:
    """A count of the split's bookkeeping; BadMetadata unless it is an integer of at least 0."""
    if key not in part.metadata:
        return default
    found = part.metadata.describe(key)
    if found.startswith(("uint", "int")):
        value = int(part.metadata[key])
        if value >= 0:
            return value
        found = f"{value:,}"
    at = part.metadata.position(key)
    raise BadMetadata(f"{part.path}: {key!r} must be a count and is {found} (byte {at:,}); split the model again")
