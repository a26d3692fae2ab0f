"""Persistent graphs: built once for constant shapes, allocated once, replayed for every step.

What changes from step to step (token ids, positions, row numbers, counts) are inputs: tensors whose contents are
written before each run. Building a graph costs about a microsecond per operation in Python and never happens per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from pydflash._ffi import check, ffi, lib
from pydflash.errors import DeviceError, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS
from pydflash.native.backend import Backend
from pydflash.native.device_lock import DeviceLock, closing, exclusive
from pydflash.native.headroom import STACK, check_allocation, check_stack, refuse_stack
from pydflash.native.memory import new_context
from pydflash.native.tensor import Shape, Tensor, new_tensor
from pydflash.native.traits import Traits

__all__ = ["Copies", "Graph"]

_ALLOCATOR_BYTES = 1024  # a node, at most: what ggml keeps to place it and its operands


class Copies:
    """What a run copies besides: the beginnings of tensors, from or to contiguous arrays of their types."""

    def __init__(self, pairs: Sequence[tuple[Tensor, npt.NDArray[Any]]] = ()) -> None:
        self._arrays = [values for _, values in pairs]  # whose memory C is given
        self.count = len(pairs)
        self.c = ffi.new("struct pydflash_copy[]", self.count)
        for entry, (tensor, values) in zip(self.c, pairs):
            entry.tensor, entry.data, entry.size = tensor.c, ffi.cast("void *", values.ctypes.data), values.nbytes


_NOTHING = Copies()


class Graph:
    """Nodes in the order in which they were asked for."""

    def __init__(self, backend: Backend, piece: int = 1024, exact_rows: int = EXACT_ROWS) -> None:
        """``piece``: tensors whose descriptions are allocated together; a graph may have any number of them.
        ``exact_rows``: operations of so many rows compute each as if it were alone."""
        self.backend, self._piece, self.exact_rows = backend, piece, exact_rows
        self._contexts = [new_context(self.lock, piece, "a graph's tensors")]
        self._effects: list[Any] = []  # as ggml's pointers: a Tensor would refer back to this graph
        self.c: Any = None  # made by finish, when its size is known
        self._allocator: Any = None

    @property
    def lock(self) -> DeviceLock:
        return self.backend.lock

    @property
    def traits(self) -> Traits:
        return self.backend.traits

    @property
    def context(self) -> Any:
        """What the next operation is built in: a ggml context with room for it."""
        if lib.ggml_used_mem(self._contexts[-1]) >= lib.ggml_tensor_overhead() * self._piece:
            self._contexts.append(new_context(self.lock, self._piece, "a graph's tensors"))
        return self._contexts[-1]

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
        """Compute ``tensor`` at this point, for its side effect on other memory (a cache, a ring)."""
        self._effects.append(tensor.c)
        return tensor

    def _collect(self) -> None:
        """Make the ggml graph of all effects and what they need, which ggml finds recursively."""
        check_stack()
        tensors = sum(int(lib.ggml_used_mem(c) // lib.ggml_tensor_overhead()) for c in self._contexts)
        size = 1 + max(tensors, sum(int(lib.pydflash_context_operands(c)) for c in self._contexts))
        overhead = int(lib.ggml_graph_overhead_custom(size, False))
        self._contexts.append(new_context(self.lock, 1, "a graph", overhead))
        self.c = lib.ggml_new_graph_custom(self._contexts[-1], size, False)
        for tensor in self._effects:
            lib.ggml_build_forward_expand(self.c, tensor)

    @exclusive
    def finish(self) -> None:
        """Check that the device runs every node, and allocate. The graph is constant from here on.

        Raises DeviceError naming an operation that the device lacks, or when the calling thread has too little stack;
        OutOfMemory with bytes asked for and free.
        """
        self._collect()
        for i in range(lib.ggml_graph_n_nodes(self.c)):
            node = lib.ggml_graph_node(self.c, i)
            if not lib.ggml_backend_supports_op(self.backend.c, node):
                own = lib.pydflash_node_op(node)
                name = ffi.string(own.name if own else lib.ggml_op_desc(node)).decode()
                shape = tuple(int(n) for n in reversed(list(node.ne[0 : lib.ggml_n_dims(node)])))
                raise DeviceError(
                    f"{self.backend.name} cannot run {name} with a result of shape {shape} and its operands' types"
                )
        check_allocation(_ALLOCATOR_BYTES * int(lib.ggml_graph_n_nodes(self.c)), "a graph allocator")
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
                f"a graph's working memory of {int(size[0]):,} bytes could not be allocated on {self.backend.name}"
            )
        self.nbytes = int(lib.ggml_gallocr_get_buffer_size(self._allocator, 0))
        self.backend.reserve_for(self.c)
        lib.pydflash_graph_set_uid(self.c)

    @exclusive
    def run(self, inputs: Copies = _NOTHING, results: Copies = _NOTHING) -> None:
        """Enqueue one run, with ``inputs`` written before it; then wait for ``results``, if any.

        Raises DeviceError when the calling thread has too little stack.
        """
        status = lib.pydflash_step(self.backend.c, self.c, STACK, inputs.c, inputs.count, results.c, results.count)
        if status < 0:
            refuse_stack()
        check(status, "running a graph")

    @closing
    def close(self) -> None:
        """Free the working memory. Safe to call twice."""
        if self._allocator is not None:
            ffi.release(self._allocator)
            self._allocator = None
        for context in self._contexts:
            ffi.release(context)
        self._contexts, self.c = [], None
