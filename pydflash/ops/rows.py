"""Rows of tables and caches."""

from __future__ import annotations

from pydflash._ffi import lib
from pydflash.ggml_types import GGMLType
from pydflash.native import Tensor
from pydflash.ops.node import require

__all__ = ["copy_into", "get_rows", "set_rows"]


def get_rows(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]`` as f32: (N, C) of any dtype and (T,) int32 to (T, C)."""
    require(rows.dtype == GGMLType.I32, f"get_rows: {rows!r} are not i32")
    require(
        len(table.shape) == 2 and len(rows.shape) == 1, f"get_rows: {table!r} is not a matrix or {rows!r} not a vector"
    )
    shape = (rows.shape[0], table.shape[1])
    return rows.derive(lib.ggml_get_rows(rows.context, table.c, rows.c), shape, GGMLType.F32)


def set_rows(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``table[rows] = values`` in place, converted or quantised to the table's dtype; returns the table after it.

    (N, C), (T,) int32 and (T, C) f32.
    """
    require(
        rows.dtype == GGMLType.I32 and values.dtype == GGMLType.F32,
        f"set_rows: {rows!r} are not i32 or {values!r} not f32",
    )
    require(
        len(table.shape) == 2 and values.shape == (*rows.shape, table.shape[1]),
        f"set_rows: {values!r} does not fill {rows!r} rows of {table!r}",
    )
    node = lib.ggml_set_rows(values.context, table.c, values.c, rows.c)
    return values.derive(node, table.shape, table.dtype)


def copy_into(target: Tensor, source: Tensor) -> Tensor:
    """``target[...] = source``, both of the same shape; ``target`` may be a strided view of state."""
    require(target.shape == source.shape, f"copy_into: {source!r} does not fit {target!r}")
    return source.derive(lib.ggml_cpy(source.context, source.c, target.c), target.shape, target.dtype)
