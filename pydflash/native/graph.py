"""Persistent graphs: built once for constant shapes, allocated once, replayed for every step.

What changes from step to step (token ids, positions, row numbers, counts) are inputs: tensors whose contents are
written before each run. Building a graph costs about a microsecond an operation in Python and never happens per token.
"""

from __future__ import annotations

from typing import Any

from pydflash._ffi import check, ffi, lib
from pydflash.errors import DeviceError, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.native.backend import Backend
from pydflash.native.device_lock import DeviceLock, closing, exclusive
from pydflash.native.tensor import Shape, Tensor, new_tensor

__all__ = ["Graph"]


class Graph:
    """Nodes in the order in which they were asked for. ``context`` is what the operations are built in."""

    def __init__(self, backend: Backend, capacity: int = 8192) -> None:
        """``capacity``: the most nodes and leaves together."""
        self.backend = backend
        size = lib.ggml_tensor_overhead() * capacity + lib.ggml_graph_overhead_custom(capacity, False)
        params = ffi.new("struct ggml_init_params *", {"mem_size": size, "mem_buffer": ffi.NULL, "no_alloc": True})
        self.context = self.lock.own(lib.ggml_init(params[0]), lib.ggml_free, "a graph's context")
        self.c = lib.ggml_new_graph_custom(self.context, capacity, False)
        self._allocator: Any = None

    @property
    def lock(self) -> DeviceLock:
        return self.backend.lock

    def input(self, shape: Shape, dtype: GGMLType) -> Tensor:
        """A tensor to be written before each run; its memory is never reused within the graph."""
        tensor = new_tensor(self.context, shape, dtype)
        lib.ggml_set_input(tensor)
        return Tensor(tensor, shape, dtype, self)

    def output(self, tensor: Tensor) -> Tensor:
        """Compute ``tensor`` and keep its memory after the run, so that it can be read."""
        lib.ggml_set_output(tensor.c)
        return self.effect(tensor)

    def effect(self, tensor: Tensor) -> Tensor:
        """Compute ``tensor`` at this place, for what its computation writes elsewhere (a cache, a ring)."""
        lib.ggml_build_forward_expand(self.c, tensor.c)
        return tensor

    @exclusive
    def finish(self) -> None:
        """Check that the device runs every node, and allocate. The graph is constant from here on.

        Raises DeviceError naming an operation that the device lacks, OutOfMemory with bytes asked for and free.
        """
        for i in range(lib.ggml_graph_n_nodes(self.c)):
            node = lib.ggml_graph_node(self.c, i)
            if not lib.ggml_backend_supports_op(self.backend.c, node):
                own = lib.pydflash_node_op(node)
                name = ffi.string(own.name if own else lib.ggml_op_desc(node)).decode()
                shape = tuple(int(n) for n in reversed(list(node.ne[0 : lib.ggml_n_dims(node)])))
                raise DeviceError(
                    f"{self.backend.name} cannot run {name} with a result of shape {shape} and its operands' types"
                )
        self._allocator = self.lock.own(
            lib.ggml_gallocr_new(self.backend.buffer_type), lib.ggml_gallocr_free, "a graph allocator"
        )
        size = ffi.new("size_t[1]")
        lib.ggml_gallocr_reserve_n_size(self._allocator, self.c, ffi.NULL, ffi.NULL, size)
        self.backend.check_free(int(size[0]), "a graph's working memory")
        if not (
            lib.ggml_gallocr_reserve(self._allocator, self.c) and lib.ggml_gallocr_alloc_graph(self._allocator, self.c)
        ):
            raise OutOfMemory(
                f"a graph's working memory of {int(size[0]):,} bytes could not be had on {self.backend.name}"
            )
        self.nbytes = int(lib.ggml_gallocr_get_buffer_size(self._allocator, 0))
        lib.pydflash_graph_set_uid(self.c)

    @exclusive
    def run(self) -> None:
        """Enqueue one run. Write the inputs first; read the outputs after."""
        check(lib.ggml_backend_graph_compute_async(self.backend.c, self.c), "running a graph")

    @closing
    def close(self) -> None:
        """Free the working memory. Safe to call twice."""
        if self.context is not None:
            if self._allocator is not None:
                ffi.release(self._allocator)
            ffi.release(self.context)
            self.context = self._allocator = None
