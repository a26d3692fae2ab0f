"""A GGUF file taken apart and put together again without a check, so that it can say anything."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARRAY", "SCALARS", "STRING", "Image", "Key", "Tensor"]

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Key:
    """``value``: a number, text, or for an array (kind of the items, items). ``claims``: the number of items that an
    array says it has, None for the right one."""

    name: str
    kind: int
    value: Any
    claims: int | None = None


@dataclass
class Tensor:
    """``offset`` counts from the start of the data."""

    name: str
    shape: list[int]
    kind: int
    offset: int


@dataclass
class Image:
    magic: bytes = b"GGUF"
    version: int = 3
    more_tensors: int = 0
    more_keys: int = 0
    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    @classmethod
    def parse(cls, content: bytes) -> Image:
        """Of a good file of version 3."""
        reader = _Reader(content)
        reader.take("<4sI")
        n_tensors, n_keys = reader.take("<QQ")
        keys = []
        for _ in range(n_keys):
            name, kind = reader.text(), reader.take("<I")[0]
            keys.append(Key(name, kind, reader.value(kind)))
        tensors = []
        for _ in range(n_tensors):
            name, rank = reader.text(), reader.take("<I")[0]
            tensors.append(Tensor(name, list(reader.take(f"<{rank}Q")), *reader.take("<IQ")))
        start = -(-reader.at // ALIGNMENT) * ALIGNMENT
        return cls(keys=keys, tensors=tensors, data=bytearray(content[start:]))

    def serialise(self) -> bytes:
        counts = (len(self.tensors) + self.more_tensors, len(self.keys) + self.more_keys)
        out = self.magic + struct.pack("<I", self.version) + b"".join(_packed("Q", count) for count in counts)
        for key in self.keys:
            out += _text(key.name) + struct.pack("<I", key.kind) + _value(key.kind, key.value, key.claims)
        for tensor in self.tensors:
            out += _text(tensor.name) + _packed("I", len(tensor.shape))
            out += b"".join(_packed("Q", size) for size in tensor.shape)
            out += _packed("I", tensor.kind) + _packed("Q", tensor.offset)
        return out + bytes(-len(out) % ALIGNMENT) + bytes(self.data)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.content, self.at)
        self.at += struct.calcsize(layout)
        return values

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.take("<IQ")
            return item, [self.value(item) for _ in range(count)]
        return self.take(f"<{SCALARS[kind]}")[0]


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass") if "\ud800" in text else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _packed(code: str, number: float) -> bytes:
    """``number`` wrapped into the range of the type."""
    if code in "fd":
        try:
            return struct.pack(f"<{code}", number)
        except OverflowError:
            return struct.pack(f"<{code}", float("inf"))
    size = struct.calcsize(f"<{code}")
    return (int(number) % (1 << 8 * size)).to_bytes(size, "little")


def _value(kind: int, value: Any, claims: int | None = None) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        item, items = value
        count = len(items) if claims is None else claims
        return _packed("I", item) + _packed("Q", count) + b"".join(_value(item, one) for one in items)
    return _packed(SCALARS.get(kind, "Q"), value)
