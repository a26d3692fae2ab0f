"""Look for NaN and infinities in the tensors of a GGUF file: in the values, or in the scales of quantised blocks."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.files.gguf import GGUFFile, TensorInfo
from pydflash.ggml_types import GGMLType

__all__ = ["Damage", "damaged_tensors"]

_CHUNK_BYTES = 512 << 10

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """A tensor that holds NaN or infinities.

    ``values``: how many; a damaged scale counts for all values of its block. ``first``: the index of the first of them,
    row-major.
    """

    name: str
    type: GGMLType
    values: int
    first: tuple[int, ...]


def damaged_tensors(file: GGUFFile, progress: Progress | None = None) -> Iterator[Damage]:
    """Every damaged tensor of ``file``, in file order; those of integers cannot be damaged.

    Reads all tensor data, in pieces that are let go at once. ``progress(done, total)`` counts its bytes.
    """
    total, done = sum(info.nbytes for info in file.tensors.values()), 0
    for info in file.tensors.values():
        blocks, first = 0, -1
        for start, damaged in _pieces(file, info) if info.type in _FLOATS else ():
            if first < 0 and damaged.any():
                first = start + int(damaged.argmax())
            blocks += int(np.count_nonzero(damaged))
            if progress is not None:
                progress(done + (start + len(damaged)) * info.type.type_size, total)
        done += info.nbytes
        if blocks:
            index = np.unravel_index(first * info.type.block_size, info.shape)
            yield Damage(info.name, info.type, blocks * info.type.block_size, tuple(map(int, index)))


def _pieces(file: GGUFFile, info: TensorInfo) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Number of the first block, and which blocks are damaged, of one piece of the tensor after the other."""
    size, mapping, floats = info.type.type_size, file.mapping(info.part), _FLOATS[info.type]
    blocks, step = info.nbytes // size, max(1, _CHUNK_BYTES // size)
    for start in range(0, blocks, step):
        count, offset = min(step, blocks - start), info.offset + start * size
        yield start, floats.damaged(np.frombuffer(mapping, floats.block, count, offset))
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, page, offset + count * size - page)  # or all of the file becomes resident


# --- where a block's floats lie ---------------------------------------------------------------------------------------


class _Floats:
    """The floating-point fields of a block, as unsigned integers. A field is NaN or infinite where all bits of ``mask``
    are set: for IEEE types, those of the exponent.
    """

    def __init__(self, kind: GGMLType, field: str, mask: int, *offsets: int) -> None:
        names = [f"field{i}" for i in range(len(offsets))]
        formats = [field] * len(offsets)
        self.block = np.dtype(
            {"names": names, "formats": formats, "offsets": list(offsets), "itemsize": kind.type_size}
        )
        self.mask = np.dtype(field).type(mask)

    def damaged(self, blocks: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(n,) blocks to (n,) flags."""
        flags = [(blocks[name] & self.mask) == self.mask for name in blocks.dtype.names or ()]
        found: npt.NDArray[np.bool_] = np.logical_or.reduce(flags)
        return found


_F16, _BF16, _F32, _F64 = ("<u2", 0x7C00), ("<u2", 0x7F80), ("<u4", 0x7F800000), ("<u8", 0x7FF0000000000000)
_E8M0, _UE4M3 = ("u1", 0xFF), ("u1", 0x7F)  # no infinities; the one NaN of each (ggml reads them as numbers)
# IQ1_M strews the bits of its f16 over the top nibbles of four u16; these are the exponent's, in the last two.
_IQ1_M = ("<u4", 0x7000C000)

# The structs block_* in ggml-common.h: offsets of d, and of m, dmin or s where there is one.
_FLOATS: dict[GGMLType, _Floats] = {
    kind: _Floats(kind, *field, *offsets)
    for kind, field, *offsets in (
        (GGMLType.F32, _F32, 0), (GGMLType.F16, _F16, 0), (GGMLType.BF16, _BF16, 0), (GGMLType.F64, _F64, 0),
        (GGMLType.Q1_0, _F16, 0), (GGMLType.Q2_0, _F16, 0), (GGMLType.Q4_0, _F16, 0), (GGMLType.Q4_1, _F16, 0, 2),
        (GGMLType.Q5_0, _F16, 0), (GGMLType.Q5_1, _F16, 0, 2), (GGMLType.Q8_0, _F16, 0), (GGMLType.Q8_1, _F16, 0, 2),
        (GGMLType.Q2_K, _F16, 80, 82), (GGMLType.Q3_K, _F16, 108), (GGMLType.Q4_K, _F16, 0, 2),
        (GGMLType.Q5_K, _F16, 0, 2), (GGMLType.Q6_K, _F16, 208), (GGMLType.Q8_K, _F32, 0),
        (GGMLType.IQ1_S, _F16, 0), (GGMLType.IQ1_M, _IQ1_M, 52), (GGMLType.IQ2_XXS, _F16, 0),
        (GGMLType.IQ2_XS, _F16, 0), (GGMLType.IQ2_S, _F16, 0), (GGMLType.IQ3_XXS, _F16, 0), (GGMLType.IQ3_S, _F16, 0),
        (GGMLType.IQ4_NL, _F16, 0), (GGMLType.IQ4_XS, _F16, 0), (GGMLType.TQ1_0, _F16, 52), (GGMLType.TQ2_0, _F16, 64),
        (GGMLType.MXFP4, _E8M0, 0), (GGMLType.NVFP4, _UE4M3, 0, 1, 2, 3),
    )
}  # fmt: skip
