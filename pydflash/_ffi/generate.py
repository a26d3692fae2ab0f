"""Write the C source of the binding: ``python generate.py OPS_DEF OUTPUT``. Run by CMake; needs cffi only."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

HERE = Path(__file__).parent


def op_ids(table: str) -> str:
    """cdef lines of the ids of the operations in ``table``, the text of ggml_ext/ops.def."""
    rows = re.findall(r"^OP\((\w+),", table, re.MULTILINE)
    return "".join(f"#define PYDFLASH_OP_{row} ...\n" for row in rows)


def main() -> None:
    ops, output = sys.argv[1:]
    builder = cffi.FFI()
    builder.cdef((HERE / "ggml.cdef.h").read_text() + op_ids(Path(ops).read_text()))
    builder.set_source("pydflash._ffi._ggml", (HERE / "ggml.csrc.c").read_text())
    builder.emit_c_code(output)


if __name__ == "__main__":
    main()
