"""Random tensor data in the block formats of GGUF files: every block is valid and dequantises to a chosen spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """A ggml tensor type: `size` values are stored together in `nbytes` bytes; `code` is its number in a GGUF file."""

    name: str
    code: int
    size: int
    nbytes: int

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of `values` values; ValueError if the row does not divide into blocks."""
        if values % self.size:
            raise ValueError(f"a row of {values} values is not a multiple of the {self.size} of a {self.name} block")
        return values // self.size * self.nbytes


TYPES = {
    block.name: block
    for block in (
        BlockType("f32", 0, 1, 4),
        BlockType("f16", 1, 1, 2),
        BlockType("q4_0", 2, 32, 18),
        BlockType("q8_0", 8, 32, 34),
        BlockType("q4_k", 12, 256, 144),
        BlockType("q5_k", 13, 256, 176),
        BlockType("q6_k", 14, 256, 210),
        BlockType("bf16", 30, 1, 2),
    )
}


def random_blocks(name: str, count: int, std: float, rng: np.random.Generator) -> Bytes:
    """`count` random blocks of type `name`, (count, nbytes), whose values have mean 0 and standard deviation `std`."""
    if name in ("f32", "f16", "bf16"):
        return as_bytes(rng.standard_normal((count, 1), dtype=np.float32) * np.float32(std), name)
    makers = {"q4_0": _q4_0, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
    return makers[name](count, std, rng)


def as_bytes(values: npt.NDArray[np.float32], name: str) -> Bytes:
    """Plain float rows (rows, n) as the bytes of type f32, f16 or bf16 (rounded to nearest even)."""
    if name == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.ascontiguousarray(rounded.view(np.uint16)[..., 1::2]).view(np.uint8)
    return np.ascontiguousarray(values.astype(np.float16 if name == "f16" else np.float32)).view(np.uint8)


def _scale(mean: float, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Block scales around `mean`, (count, 1); 25 % of spread, because blocks of a real tensor differ as well."""
    return (mean * rng.uniform(0.75, 1.25, (count, 1))).astype(np.float32)


def _half(values: npt.NDArray[np.float32]) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _q4_0(count: int, std: float, rng: np.random.Generator) -> Bytes:
    # value = d * (q - 8) with q uniform in 0..15: spread 4.64 about -0.5, and a random sign of d centres the mean.
    d = _scale(std / 4.64, count, rng) * rng.choice(np.array([-1, 1], np.float32), (count, 1))
    return np.hstack([_half(d), rng.integers(0, 256, (count, 16), np.uint8)])


def _q8_0(count: int, std: float, rng: np.random.Generator) -> Bytes:
    q = np.rint(rng.standard_normal((count, 32), dtype=np.float32) * 40).clip(-127, 127).astype(np.int8)
    return np.hstack([_half(_scale(std / 40, count, rng)), q.view(np.uint8)])


def _k_scales(count: int, std: float, levels: int, rng: np.random.Generator) -> Bytes:
    """The 16-byte head of Q4_K and Q5_K: d, dmin and eight 6-bit (scale, min) pairs, for quants uniform in 0..levels-1.

    A value is d * scale * q - dmin * min; min = scale and dmin = d * (levels - 1) / 2 put the mean at zero.
    """
    scale = rng.integers(32, 64, (count, 8), np.uint8)  # root mean square 48.4
    spread = np.sqrt((levels**2 - 1) / 12)
    d = _scale(std / (48.4 * spread), count, rng)
    low, high = scale[:, :4], scale[:, 4:]
    packed = low | (high >> 4) << 6
    dmin = d * np.float32((levels - 1) / 2)
    return np.hstack([_half(d), _half(dmin), packed, packed, (high & 15) | (high & 15) << 4])


def _q4_k(count: int, std: float, rng: np.random.Generator) -> Bytes:
    return np.hstack([_k_scales(count, std, 16, rng), rng.integers(0, 256, (count, 128), np.uint8)])


def _q5_k(count: int, std: float, rng: np.random.Generator) -> Bytes:
    return np.hstack([_k_scales(count, std, 32, rng), rng.integers(0, 256, (count, 32 + 128), np.uint8)])


def _q6_k(count: int, std: float, rng: np.random.Generator) -> Bytes:
    # value = d * scale * (q - 32) with q uniform in 0..63: spread 18.5 about -0.5; signs of the scales centre the mean.
    sign = rng.choice(np.array([-1, 1], np.int8), (count, 16))
    scale = rng.integers(64, 128, (count, 16), np.int8) * sign  # root mean square 97.3
    d = _scale(std / (97.3 * 18.5), count, rng)
    return np.hstack([rng.integers(0, 256, (count, 128 + 64), np.uint8), scale.view(np.uint8), _half(d)])


class Pool:
    """A few tens of megabytes of random blocks of one type, cut at differing offsets to fill any number of tensors.

    Its length is a prime number of blocks, more than any vocabulary has rows: two rows of a tensor never start at
    the same block, so no two rows of an embedding or an LM head are equal.
    """

    def __init__(self, name: str, std: float, rng: np.random.Generator, nbytes: int = 48 << 20) -> None:
        self.type = TYPES[name]
        self._blocks = random_blocks(name, next_prime(nbytes // self.type.nbytes), std, rng)

    def cut(self, shape: tuple[int, ...], offset: int) -> Iterator[memoryview]:
        """The bytes of a tensor of row-major `shape` (rows, values), from block `offset` of the pool on, in pieces."""
        count = int(np.prod(shape[:-1])) * (self.type.row_bytes(shape[-1]) // self.type.nbytes)
        start = offset % len(self._blocks)
        while count > 0:
            piece = self._blocks[start : start + count]
            yield piece.reshape(-1).data
            count -= len(piece)
            start = 0


def next_prime(n: int) -> int:
    """The smallest prime >= n."""
    while any(n % divisor == 0 for divisor in range(2, int(n**0.5) + 1)):
        n += 1
    return n
