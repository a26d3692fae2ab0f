"""ggml seen from Python: devices, memory, tensors and graphs. It knows no model."""

from pydflash.native.backend import Arena, Backend, MappedArena, Staging, cuda_device_count, default_threads
from pydflash.native.device_lock import DeviceLock, closing, exclusive
from pydflash.native.graph import Graph
from pydflash.native.replay import Replay, ReplayCache
from pydflash.native.tensor import Shape, Tensor, ggml_shape

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
    "closing",
    "cuda_device_count",
    "default_threads",
    "exclusive",
    "ggml_shape",
]
