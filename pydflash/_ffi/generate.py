"""Write the C source of the binding: ``python generate.py OUTPUT``. Run by CMake; needs cffi only."""

from __future__ import annotations

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).parent


def main() -> None:
    builder = cffi.FFI()
    builder.cdef((HERE / "ggml.cdef.h").read_text())
    builder.set_source("pydflash._ffi._ggml", (HERE / "ggml.csrc.c").read_text())
    builder.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
