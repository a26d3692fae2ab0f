"""What a sequence remembers: one module a kind of layer, their list, and snapshots of it."""

from pydflash.state.delta import DeltaSpec, DeltaState
from pydflash.state.fingerprint import FORMAT, Fingerprint, check_fingerprint
from pydflash.state.kv import CacheFormat, KVCache, KVPath, KVSpec, check_pair
from pydflash.state.layer import Batch, LayerSpec, LayerState, Layout, Room
from pydflash.state.pool import Pages, SequenceMemory, SequencePool, bytes_of, pages_for
from pydflash.state.rings import Ring, RingBatch, RingSpec
from pydflash.state.sequence import SequenceState
from pydflash.state.snapshot import Place, Snapshot, host_arrays

__all__ = [
    "FORMAT",
    "Batch",
    "CacheFormat",
    "DeltaSpec",
    "DeltaState",
    "Fingerprint",
    "KVCache",
    "KVPath",
    "KVSpec",
    "LayerSpec",
    "LayerState",
    "Layout",
    "Pages",
    "Place",
    "Ring",
    "RingBatch",
    "RingSpec",
    "Room",
    "SequenceMemory",
    "SequencePool",
    "SequenceState",
    "Snapshot",
    "bytes_of",
    "check_fingerprint",
    "check_pair",
    "host_arrays",
    "pages_for",
]
