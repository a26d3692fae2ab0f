"""What differs from device to device, by name: nothing else asks whether a device is a CPU or a GPU."""

from __future__ import annotations

from typing import NamedTuple

from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES

__all__ = ["CPU", "CUDA", "Traits"]


class Traits(NamedTuple):
    """host_memory: its memory is the host's, so that a mapped file can be used in place. cheap_rows: a step of 16 rows
    costs little more than one of a row. own_norms: norms and gates are nodes of ours; else ggml's, which are fused.
    paged: its attention finds K and V of any number of rows through tables of pages, and reads no further than a row's
    own position; else a sequence has the whole cache, and wide steps a mask.
    cache_types: types of a K or V cache that its attention reads.
    """

    host_memory: bool
    cheap_rows: bool
    own_norms: bool
    paged: bool
    cache_types: tuple[GGMLType, ...]


CPU = Traits(host_memory=True, cheap_rows=False, own_norms=True, paged=True, cache_types=tuple(CACHE_TYPES.values()))
CUDA = Traits(
    host_memory=False,
    cheap_rows=True,
    own_norms=False,
    paged=False,
    cache_types=tuple(t for t in CACHE_TYPES.values() if t != GGMLType.F32),
)
