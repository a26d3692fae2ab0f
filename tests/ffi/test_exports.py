"""Our libraries share a process with others that bring a C++ runtime, torch for one, whichever comes first."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pydflash._ffi import _ggml

LIBRARIES = sorted(Path(_ggml.__file__).parent.glob("libggml-*.so"))
LOADING = "from pydflash.native import Backend\nBackend('cuda').close()\n"


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils) on this machine")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_exports_c_functions_only(library: Path) -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names
    assert [name for name in names if not name.startswith(("ggml_", "gguf_", "quantize_", "pydflash_"))] == []


@pytest.mark.cuda
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("program", [f"import torch\n{LOADING}", f"{LOADING}import torch\n"], ids=["first", "last"])
def test_torch_is_imported_beside_a_cuda_device(program: str) -> None:
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
