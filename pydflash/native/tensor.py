"""A tensor of a graph: shape, dtype, arithmetic and movement. Named operations are in ``ops``.

Shapes are row-major as in numpy: ``(rows, columns)``, the last axis contiguous. ggml counts its axes the other way
around; the reversal happens in this file and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from pydflash._ffi import ffi, lib
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native.traits import Traits

__all__ = ["Home", "Shape", "Tensor", "ggml_shape"]

Shape = tuple[int, ...]


def ggml_shape(shape: Sequence[int]) -> list[int]:
    """``shape`` in ggml's order, filled up to its four axes."""
    return [*reversed(shape), *[1] * (4 - len(shape))]


class Home(Protocol):
    """What computes tensors: a graph. ``context``: what the next operation is built in."""

    @property
    def context(self) -> Any: ...
    @property
    def traits(self) -> Traits:
        """Those of the device that it runs on."""

    @property
    def exact_rows(self) -> int:
        """Rows up to which no operation's row may depend on the others."""

    def effect(self, tensor: Tensor) -> Tensor:
        """Compute ``tensor`` at this place, and return it."""


class Tensor:
    """A ggml tensor. ``graph`` is the graph that computes it, or None for weights and state, which any graph may
    read."""

    __slots__ = ("c", "dtype", "graph", "shape")

    def __init__(self, c: Any, shape: Shape, dtype: GGMLType, graph: Home | None) -> None:
        self.c = c
        self.shape = shape
        self.dtype = dtype
        self.graph = graph

    def __repr__(self) -> str:
        return f"Tensor({'x'.join(map(str, self.shape))}, {self.dtype.name})"

    @property
    def nbytes(self) -> int:
        return int(lib.ggml_nbytes(self.c))

    @property
    def is_contiguous(self) -> bool:
        return bool(lib.ggml_is_contiguous(self.c))

    def within(self, graph: Home) -> Tensor:
        """The same tensor as an operand of ``graph``: how weights and state enter an expression."""
        return Tensor(self.c, self.shape, self.dtype, graph)

    def derive(self, c: Any, shape: Shape, dtype: GGMLType | None = None) -> Tensor:
        """A tensor of the same graph."""
        return Tensor(c, shape, self.dtype if dtype is None else dtype, self.graph)

    @property
    def home(self) -> Home:
        """The graph that computes it; ShapeError for weights and state, which belong to none."""
        if self.graph is None:
            raise ShapeError(f"{self!r} belongs to no graph; use tensor.within(graph) to compute with it")
        return self.graph

    @property
    def context(self) -> Any:
        return self.home.context

    # --- arithmetic -------------------------------------------------------------------------------------------------

    def __add__(self, other: Tensor) -> Tensor:
        self._check_broadcast(other, "+")
        return self.derive(lib.ggml_add(self.context, self.c, other.c), self.shape)

    def __mul__(self, other: Tensor) -> Tensor:
        self._check_broadcast(other, "*")
        return self.derive(lib.ggml_mul(self.context, self.c, other.c), self.shape)

    def _check_broadcast(self, other: Tensor, sign: str) -> None:
        padded = (1,) * (len(self.shape) - len(other.shape)) + other.shape
        if len(padded) != len(self.shape) or any(a != b and b != 1 for a, b in zip(self.shape, padded)):
            raise ShapeError(f"{self!r} {sign} {other!r}: the right operand's axes must be equal or 1")

    # --- movement ---------------------------------------------------------------------------------------------------

    def reshape(self, *shape: int) -> Tensor:
        """The same values under another shape; copies first when they are not contiguous."""
        if math.prod(shape) != math.prod(self.shape) or not 1 <= len(shape) <= 4:
            raise ShapeError(f"{self!r} cannot be reshaped to {shape}")
        source = self.contiguous()
        return self.derive(lib.ggml_reshape_4d(self.context, source.c, *ggml_shape(shape)), shape)

    def contiguous(self) -> Tensor:
        """This tensor, or a copy with dense strides."""
        return self if self.is_contiguous else self.derive(lib.ggml_cont(self.context, self.c), self.shape)

    def slice(self, axis: int, start: int, stop: int) -> Tensor:
        """The half-open range of one axis, as a view. On the last axis, bounds must be whole blocks of the dtype."""
        axis %= len(self.shape)
        if not 0 <= start < stop <= self.shape[axis]:
            raise ShapeError(f"{self!r} has no range {start}:{stop} on axis {axis}")
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        position = len(self.shape) - 1 - axis  # ggml's number of that axis
        block = self.dtype.block_size if position == 0 else 1
        if start % block or (stop - start) % block:
            raise ShapeError(f"{self!r}: {start}:{stop} does not cut whole blocks of {block}")
        stride = self.c.nb
        offset = start // block * stride[position]
        view = lib.ggml_view_4d(self.context, self.c, *ggml_shape(shape), stride[1], stride[2], stride[3], offset)
        return self.derive(view, shape)

    def split(self, sizes: Sequence[int]) -> list[Tensor]:
        """Views of consecutive ranges of the last axis."""
        if sum(sizes) != self.shape[-1]:
            raise ShapeError(f"{self!r}: sizes {list(sizes)} do not add up to {self.shape[-1]}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.slice(-1, start, start + size) for start, size in zip(starts, sizes)]

    def permute(self, *axes: int) -> Tensor:
        """Axes in another order, as a view: ``axes[i]`` is the old axis that becomes axis i."""
        count = len(self.shape)
        if sorted(axes) != list(range(count)):
            raise ShapeError(f"{self!r}: {axes} is not an order of its {count} axes")
        destination = [0, 1, 2, 3]
        for new, old in enumerate(axes):
            destination[count - 1 - old] = count - 1 - new
        return self.derive(lib.ggml_permute(self.context, self.c, *destination), tuple(self.shape[a] for a in axes))


def new_tensor(context: Any, shape: Shape, dtype: GGMLType) -> Any:
    """A leaf of ``context``; ShapeError unless ggml can hold it."""
    if not 1 <= len(shape) <= 4 or any(not 1 <= n < 2**40 for n in shape) or shape[-1] % dtype.block_size:
        raise ShapeError(
            f"no {dtype.name} tensor of shape {shape}: 1 to 4 axes, rows of whole blocks of {dtype.block_size}"
        )
    return lib.ggml_new_tensor(context, int(dtype), 4, ffi.new("int64_t[4]", ggml_shape(shape)))
