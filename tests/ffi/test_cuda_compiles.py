"""Our CUDA sources compile where a toolkit exists, GPU or not; nothing here runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
EXT = ROOT / "ggml_ext"
SOURCES = sorted(EXT.rglob("*.cu"))
FLAGS = ["-std=c++17", "-arch=sm_90", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS"]


@pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit (nvcc) on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_cuda_source_compiles(source: Path, ggml_source: Path, tmp_path: Path) -> None:
    ours = [EXT, *(path for path in EXT.iterdir() if path.is_dir())]
    folders = [*ours, *(ggml_source / name for name in ("include", "src", "src/ggml-cuda"))]
    command = [
        str(NVCC),
        *FLAGS,
        *(f"-I{folder}" for folder in folders),
        "-c",
        str(source),
        "-o",
        str(tmp_path / "out.o"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
