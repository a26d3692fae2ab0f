"""Write what the build makes: the C sources of the bindings, and the contracts' limits for Python.

    python generate.py EXT OUTPUT

EXT is the folder of ops.def and contract.h; _NAME.c for each NAME.cdef.h and NAME.csrc.c beside this file, and
_contract.py, go to the folder OUTPUT. Run by CMake; needs cffi only.
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


def write_binding(name: str, output: Path, more: str = "") -> None:
    """_NAME.c in the folder ``output``; ``more`` lines follow those of NAME.cdef.h."""
    builder = cffi.FFI()
    builder.cdef((HERE / f"{name}.cdef.h").read_text() + more)
    builder.set_source(f"pydflash._ffi._{name}", (HERE / f"{name}.csrc.c").read_text())
    builder.emit_c_code(str(output / f"_{name}.c"))


def main() -> None:
    ext, output = map(Path, sys.argv[1:])
    write_binding("processor", output)
    write_binding("ggml", output, more=op_ids((ext / "ops.def").read_text()))
    (output / "_contract.py").write_text(limits((ext / "contract.h").read_text()))


if __name__ == "__main__":
    main()
