"""ggml seen from Python: devices, memory, tensors and graphs. It knows no model."""

from pydflash.native.backend import Backend, cuda_device_count, default_threads
from pydflash.native.device_lock import DeviceLock, closing, exclusive
from pydflash.native.graph import Graph
from pydflash.native.memory import Arena, MappedArena, Staging
from pydflash.native.replay import Replay, ReplayCache
from pydflash.native.tensor import Shape, Tensor, ggml_shape
from pydflash.native.traits import Traits

__all__ = [
    "Arena",
    "Backend",
    "DeviceLock",
    "Graph",
    "MappedArena",
    "Replay",
    "ReplayCache",
    "Shape",
    "Staging",
    "Tensor",
    "Traits",
    "closing",
    "cuda_device_count",
    "default_threads",
    "exclusive",
    "ggml_shape",
]
