"""What differs from device to device, by name: nothing else asks whether a device is a CPU or a GPU."""

from __future__ import annotations

from typing import NamedTuple

from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES

__all__ = ["CPU", "CUDA", "Traits"]


class Traits(NamedTuple):
    """host_memory: its memory is the host's, so that a mapped file can be used in place. cheap_rows: a step of 16 rows
    costs little more than one of a row. own_norms: norms and gates are nodes of ours; else ggml's, which are fused.
    paged: its attention can find K and V through tables of pages, for any number of rows, and reads no further than a
    row's own position. cache_types: types of a K or V cache that
    its attention reads. weight_types: types of matrices that it multiplies with; table_types: those whose rows it looks
    up.
    """

    host_memory: bool
    cheap_rows: bool
    own_norms: bool
    paged: bool
    cache_types: tuple[GGMLType, ...]
    weight_types: tuple[GGMLType, ...]
    table_types: tuple[GGMLType, ...]


_WEIGHTS = tuple(kind for kind in GGMLType if kind.is_weight)

CPU = Traits(
    host_memory=True,
    cheap_rows=False,
    own_norms=True,
    paged=True,
    cache_types=tuple(CACHE_TYPES.values()),
    weight_types=_WEIGHTS,
    table_types=_WEIGHTS,
)
CUDA = Traits(
    host_memory=False,
    cheap_rows=True,
    own_norms=False,
    paged=False,
    cache_types=tuple(t for t in CACHE_TYPES.values() if t != GGMLType.F32),
    # linear_formats.cuh and experts.cu
    weight_types=tuple(GGMLType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")),
    # ggml has no look-up of the others, or one for rows of multiples of 256 only
    table_types=tuple(t for t in _WEIGHTS if t.name not in ("TQ1_0", "TQ2_0", "NVFP4", "MXFP4", "IQ4_NL")),
)
