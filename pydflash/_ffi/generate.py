"""Write the C source of a binding from NAME.cdef.h and NAME.csrc.c: ``python generate.py NAME OUTPUT``.

Run by CMake; needs cffi only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).parent


def main(name: str, output: str) -> None:
    builder = cffi.FFI()
    builder.cdef((HERE / f"{name}.cdef.h").read_text())
    builder.set_source(f"pydflash._ffi._{name}", (HERE / f"{name}.csrc.c").read_text())
    builder.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
