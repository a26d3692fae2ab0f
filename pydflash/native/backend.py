"""Devices: the CPU or one CUDA GPU, and the bytes that go in and out."""

from __future__ import annotations

import re
import weakref
from typing import Any

import numpy.typing as npt

from pydflash import machine
from pydflash._ffi import build_info, check, cuda_library, ffi, lib
from pydflash.arguments import an_integer, shown
from pydflash.errors import ConfigError, NoDevice, OutOfMemory, StateError
from pydflash.native.device_lock import DeviceLock, exclusive
from pydflash.native.headroom import check_allocation, check_threads
from pydflash.native.tensor import Tensor
from pydflash.native.traits import CPU, CUDA

__all__ = ["Backend", "cuda_device_count", "default_threads"]


def default_threads() -> int:
    """The processors this process may use, by its affinity and the quotas of its cgroups."""
    return machine.processors().usable


def cuda_device_count() -> int:
    """CUDA devices that this build can use now; 0 without a CUDA build, a driver or a GPU.

    Raises StateError in a child of ``fork`` whose parent had loaded CUDA.
    """
    return 0 if not cuda_library().exists() or _load_cuda() else int(lib.pydflash_cuda_device_count())


def _load_cuda() -> str:
    """Load the CUDA back end, which happens once; returns why it does not load, or ''."""
    if lib.pydflash_cuda_forked():
        raise StateError(
            "CUDA was loaded before this process was forked from its parent, and cannot be used in a child; start it "
            "with multiprocessing's 'spawn', or load the model after the fork only"
        )
    failure = lib.pydflash_cuda_load(str(cuda_library()).encode())
    return "" if failure == ffi.NULL else str(ffi.string(failure).decode(errors="replace"))


def _open_cuda(index: int) -> Any:
    if not cuda_library().exists():
        raise NoDevice(
            f"device 'cuda:{index}' was asked for, but this build has no CUDA back end ({build_info()['why']}); "
            "reinstall with PYDFLASH_CUDA=ON on a machine with a CUDA toolkit, or use device='cpu'"
        )
    failure = _load_cuda()
    if failure:
        raise NoDevice(
            f"device 'cuda:{index}' was asked for, but the CUDA back end does not load: {failure}; "
            "install the NVIDIA driver and the CUDA runtime it names"
        )
    count = lib.pydflash_cuda_device_count()
    if index >= count:
        raise NoDevice(f"device 'cuda:{index}' was asked for, but {count} CUDA devices were found; see nvidia-smi")
    return lib.pydflash_cuda_init(index)


class Backend:
    """One device. ``close()`` (or ``with``) frees it; every arena and graph on it must be closed before.

    ``name`` is 'cpu' or 'cuda:N'; ``description`` is the device's own name; ``lock`` is who may use it now; ``traits``
    is what the rest of the package goes by.
    """

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        """``device``: 'auto' (CUDA when there is one), 'cpu', 'cuda' or 'cuda:N'. ``threads`` is for the CPU only.

        Raises NoDevice when it is not there, ConfigError for another name or fewer than 1 thread.
        """
        if isinstance(device, str) and device == "auto":
            device = "cuda" if cuda_device_count() else "cpu"
        match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
        if match is None:
            raise ConfigError(f"device {shown(device)} is not one of 'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1', ...")
        if threads is not None:
            threads = an_integer(threads, "threads", 1, 512)
        self.is_cuda = device != "cpu"
        self.traits = CUDA if self.is_cuda else CPU
        self.threads = 0 if self.is_cuda else threads or default_threads()
        index = int(match.group(1) or 0)
        self.name = f"cuda:{index}" if self.is_cuda else "cpu"
        self.lock = DeviceLock(f"device {self.name!r}")
        own = self.lock.own
        self._pool: Any = None
        self._scratch: Any = None
        if self.is_cuda:
            self.c = own(_open_cuda(index), lib.ggml_backend_free, "opening the CUDA device")
        else:
            check_threads(self.threads - 1)
            self._scratch = own(lib.pydflash_scratch_new(self.threads), lib.pydflash_scratch_free, "scratch memory")
            self.c = own(lib.ggml_backend_cpu_init(), lib.ggml_backend_free, "opening the CPU back end")
            self._pool = own(lib.pydflash_threadpool_new(self.threads), lib.ggml_threadpool_free, "starting threads")
            lib.ggml_backend_cpu_set_n_threads(self.c, self.threads)
            lib.ggml_backend_cpu_set_threadpool(self.c, self._pool)
        self.device = lib.ggml_backend_get_device(self.c)
        self.buffer_type = lib.ggml_backend_get_default_buffer_type(self.c)
        self.description = ffi.string(lib.ggml_backend_dev_description(self.device)).decode(errors="replace")
        self._leave = weakref.finalize(self, self.lock.leave)

    def close(self) -> None:
        """Free the device's streams and threads, after the step that runs. Safe to call twice."""
        if self.c is not None:
            self.lock.close()
            self._leave.detach()
            ffi.release(self.c)
            if self._pool is not None:
                ffi.release(self._pool)
                ffi.release(self._scratch)
            self.c = self._pool = self._scratch = None

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes in all on the device; on the CPU, those that this process can have."""
        host = machine.memory() if self.traits.host_memory else None
        if host is not None:
            return host
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        lib.ggml_backend_dev_memory(self.device, free, total)
        return int(free[0]), int(total[0])

    @exclusive
    def check_free(self, size: int, what: str) -> None:
        """OutOfMemory when ``size`` bytes for ``what`` are more than the device has free."""
        free, _ = self.memory()
        if size > free:
            raise OutOfMemory(
                f"{what} needs {size:,} bytes on {self.name} ({self.description}), where {free:,} are free; "
                "use a smaller max_context, smaller cache types, or a smaller model"
            )
        if self.traits.host_memory:
            check_allocation(size, what)

    @exclusive
    def reserve_for(self, graph: Any) -> None:
        """Have ready on the host what running ``graph``, a ggml_cgraph, takes; OutOfMemory when there is too little."""
        if not self.traits.host_memory:
            return
        scratch = int(lib.pydflash_graph_scratch_size(graph)) * self.threads
        check_allocation(scratch, "a graph's scratch memory")
        check(lib.pydflash_graph_set_scratch(graph, self._scratch), "allocating scratch memory")
        check_allocation(int(lib.pydflash_graph_work_size(graph, self.threads)), "a graph's work buffer")

    @exclusive
    def synchronize(self) -> None:
        """Wait until everything enqueued on the device is done."""
        lib.ggml_backend_synchronize(self.c)

    @exclusive
    def write(self, tensor: Tensor, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy contiguous ``values`` into ``tensor`` from byte ``offset`` on, ordered before the next graph.

        The values are taken before this returns on the CPU; on CUDA they are staged by the driver.
        """
        source = ffi.from_buffer(values)
        lib.ggml_backend_tensor_set_async(self.c, tensor.c, source, offset, values.nbytes)

    @exclusive
    def read(self, tensor: Tensor, out: npt.NDArray[Any], offset: int = 0) -> None:
        """Fill contiguous ``out`` from byte ``offset`` of ``tensor`` on; waits for the device."""
        target = ffi.from_buffer(out, require_writable=True)
        lib.ggml_backend_tensor_get_async(self.c, tensor.c, target, offset, out.nbytes)
        lib.ggml_backend_synchronize(self.c)

    @exclusive
    def clear(self, tensor: Tensor, offset: int, size: int) -> None:
        """Zero ``size`` bytes of ``tensor`` from byte ``offset`` on, after what the device is doing."""
        lib.ggml_backend_synchronize(self.c)
        lib.ggml_backend_tensor_memset(tensor.c, 0, offset, size)
