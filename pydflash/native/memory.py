"""Memory on a device: named tensors in one buffer, tensors in a mapped file, and the way of uploads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash._ffi import check, ffi, lib
from pydflash.errors import DeviceError, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.native.backend import Backend
from pydflash.native.device_lock import DeviceLock, closing, exclusive
from pydflash.native.headroom import check_allocation
from pydflash.native.tensor import Shape, Tensor, new_tensor

__all__ = ["Arena", "MappedArena", "Staging", "new_context"]

_USAGE_WEIGHTS = 1


class Arena:
    """Named tensors with one buffer on a device, zeroed: weights, caches, state. ``close()`` frees them.

    ``arena[name]`` is the tensor; ``arena.nbytes`` the size of the buffer.
    """

    def __init__(self, backend: Backend, specs: Mapping[str, tuple[Shape, GGMLType]], what: str) -> None:
        """``specs``: name to (row-major shape, dtype). ``what`` names the arena in OutOfMemory's message."""
        self.backend, self.lock = backend, backend.lock
        self._context = new_context(self.lock, len(specs), what)
        self._tensors = {
            name: Tensor(new_tensor(self._context, shape, dtype), shape, dtype, None)
            for name, (shape, dtype) in specs.items()
        }
        self._buffer: Any = None
        self.nbytes = 0
        if specs:
            self._allocate(what)

    @exclusive
    def _allocate(self, what: str) -> None:
        backend = self.backend
        size = int(lib.ggml_backend_alloc_ctx_tensors_from_buft_size(self._context, backend.buffer_type))
        backend.check_free(size, what)
        buffer = lib.ggml_backend_alloc_ctx_tensors(self._context, backend.c)
        if buffer == ffi.NULL:
            free, _ = backend.memory()
            raise OutOfMemory(f"{what}: allocating {size:,} bytes on {backend.name} failed with {free:,} free")
        self._buffer = self.lock.own(buffer, lib.ggml_backend_buffer_free, what)
        lib.ggml_backend_buffer_clear(self._buffer, 0)
        self.nbytes = int(lib.ggml_backend_buffer_get_size(self._buffer))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    @property
    def closed(self) -> bool:
        return self._context is None

    def set_weights_usage(self) -> None:
        """Tell ggml that the contents do not change between graphs."""
        if self._buffer is not None:
            lib.ggml_backend_buffer_set_usage(self._buffer, _USAGE_WEIGHTS)

    @exclusive
    def clear(self) -> None:
        """Zero every byte."""
        if self._buffer is not None:
            self.backend.synchronize()
            lib.ggml_backend_buffer_clear(self._buffer, 0)

    @closing
    def close(self) -> None:
        """Free the buffer. Safe to call twice."""
        if self._context is not None:
            if self._buffer is not None:
                ffi.release(self._buffer)
            ffi.release(self._context)
            self._buffer = self._context = None


class MappedArena:
    """Tensors that lie in memory the caller owns (a mapped file): nothing is copied. CPU only."""

    def __init__(
        self, backend: Backend, memory: npt.NDArray[np.uint8], specs: Mapping[str, tuple[Shape, GGMLType, int]]
    ) -> None:
        """``specs``: name to (row-major shape, dtype, byte offset into ``memory``, a multiple of 32)."""
        if not backend.traits.host_memory:
            raise DeviceError(f"mapped tensors need a device that reads the host's memory, not {backend.name}")
        self.lock = backend.lock
        self._memory = memory  # keeps the mapping alive
        self._context = new_context(self.lock, len(specs), "mapped tensors")
        base = ffi.from_buffer(memory)
        self._buffer = self.lock.own(
            lib.ggml_backend_cpu_buffer_from_ptr(ffi.cast("void *", base), memory.nbytes),
            lib.ggml_backend_buffer_free,
            "mapping",
        )
        lib.ggml_backend_buffer_set_usage(self._buffer, _USAGE_WEIGHTS)
        self._tensors: dict[str, Tensor] = {}
        for name, (shape, dtype, offset) in specs.items():
            tensor = new_tensor(self._context, shape, dtype)
            check(
                lib.ggml_backend_tensor_alloc(self._buffer, tensor, ffi.cast("char *", base) + offset),
                f"mapping {name}",
            )
            self._tensors[name] = Tensor(tensor, shape, dtype, None)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    @closing
    def close(self) -> None:
        """Forget the tensors; the mapping itself is the caller's. Safe to call twice."""
        if self._buffer is not None:
            ffi.release(self._buffer)
            ffi.release(self._context)
            self._buffer = None


class Staging:
    """Page-locked host memory for uploads: two halves, one being filled while the other is in flight."""

    def __init__(self, backend: Backend, size: int = 64 << 20) -> None:
        """``size``: bytes of each half."""
        self.backend, self.lock, self.size = backend, backend.lock, size
        host_type = lib.ggml_backend_dev_host_buffer_type(backend.device)
        buffer_type = backend.buffer_type if host_type == ffi.NULL else host_type
        self._buffer = self.lock.own(
            lib.ggml_backend_buft_alloc_buffer(buffer_type, 2 * size), lib.ggml_backend_buffer_free, "staging memory"
        )
        base = ffi.cast("char *", lib.ggml_backend_buffer_get_base(self._buffer))
        self._halves = [np.frombuffer(ffi.buffer(base + i * size, size), np.uint8) for i in range(2)]
        self._turn = 0

    @exclusive
    def upload(self, tensor: Tensor, data: npt.NDArray[np.uint8]) -> None:
        """Copy ``data`` to ``tensor`` in pieces; the last transfer may still be in flight when this returns."""
        for start in range(0, data.nbytes, self.size):
            piece = data[start : start + self.size]
            half = self._halves[self._turn]
            half[: piece.nbytes] = piece  # reads the file; the other half's transfer runs meanwhile
            self.backend.synchronize()
            lib.ggml_backend_tensor_set_async(self.backend.c, tensor.c, ffi.from_buffer(half), start, piece.nbytes)
            self._turn = 1 - self._turn

    @exclusive
    def close(self) -> None:
        """Wait for the last transfer and free the memory."""
        self.backend.synchronize()
        self._halves = []
        ffi.release(self._buffer)


def new_context(lock: DeviceLock, tensors: int, what: str, besides: int = 0) -> Any:
    """A ggml context for the descriptions of ``tensors`` tensors, without their data, and ``besides`` more bytes."""
    size = lib.ggml_tensor_overhead() * (tensors + 1) + besides
    check_allocation(size, f"a context for {what}")
    params = ffi.new("struct ggml_init_params *", {"mem_size": size, "mem_buffer": ffi.NULL, "no_alloc": True})
    return lock.own(lib.ggml_init(params[0]), lib.ggml_free, f"a context for {what}")
