"""Write what the build makes from ggml_ext: the C source of the binding, and the contracts' limits for Python.

    python generate.py OPS_DEF CONTRACT_H OUTPUT_C OUTPUT_PY

Run by CMake; needs cffi only.
"""

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


def limits(header: str) -> str:
    """A Python module with the limits in ``header``, the text of ggml_ext/contract.h."""
    rows = re.findall(r"^#define PYDFLASH_(\w+) +(?:PYDFLASH_)?(\w+)", header, re.MULTILINE)
    return "# Made from ggml_ext/contract.h.\n" + "".join(f"{name} = {value}\n" for name, value in rows)


def main() -> None:
    ops, contract, output_c, output_py = map(Path, sys.argv[1:])
    builder = cffi.FFI()
    builder.cdef((HERE / "ggml.cdef.h").read_text() + op_ids(ops.read_text()))
    builder.set_source("pydflash._ffi._ggml", (HERE / "ggml.csrc.c").read_text())
    builder.emit_c_code(str(output_c))
    output_py.write_text(limits(contract.read_text()))


if __name__ == "__main__":
    main()
