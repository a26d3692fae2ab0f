"""What every operation's function is made of: a check of its operands, and a node of ours."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pydflash._ffi import ffi, lib
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.limits import MAX_PARAMS
from pydflash.native import Shape, Tensor, ggml_shape

__all__ = ["custom", "require"]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def custom(
    op: int,
    operands: Sequence[Tensor],
    shape: Shape,
    params: Sequence[int | float] = (),
    inplace: Tensor | None = None,
    dtype: GGMLType = GGMLType.F32,
) -> Tensor:
    """A custom node (ggml_ext/ext.h). Float parameters are passed as their bits.

    The result is new, of ``shape`` and ``dtype``; or a view of ``inplace``, an operand that the node writes.
    """
    words = [p if isinstance(p, int) else struct.unpack("<i", struct.pack("<f", p))[0] for p in params]
    node = lib.pydflash_op_new(
        operands[0].context,
        op,
        int(dtype),
        ffi.new("int64_t[4]", ggml_shape(shape)),
        ffi.new("struct ggml_tensor *[]", [t.c for t in operands]),
        len(operands),
        ffi.new(f"int32_t[{MAX_PARAMS}]", words),
        ffi.NULL if inplace is None else inplace.c,
    )
    return operands[0].derive(node, shape, dtype if inplace is None else inplace.dtype)


def check_rows(op: str, x: Tensor, shape: Shape | None = None) -> None:
    require(
        x.dtype == GGMLType.F32 and x.c.nb[0] == 4 and x.shape == (shape or x.shape),
        f"{op}: {x!r} is not f32 of shape {shape or x.shape} with contiguous rows",
    )
