"""Our CUDA sources compile where a toolkit exists, GPU or not; nothing here runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((ROOT / "ggml_ext").rglob("*.cu"))
FLAGS = ["-std=c++17", "-arch=sm_90", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS"]


@pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit (nvcc) on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_cuda_source_compiles(source: Path, include_paths: list[str], tmp_path: Path) -> None:
    command = [str(NVCC), *FLAGS, *include_paths, "-c", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
