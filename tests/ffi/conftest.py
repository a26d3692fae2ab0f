"""What our C and CUDA sources are compiled with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXT = ROOT / "ggml_ext"


@pytest.fixture(scope="session")
def include_paths() -> list[str]:
    """Options for our headers and ggml's; the test is skipped where ggml's source is not at hand."""
    given = os.environ.get("PYDFLASH_GGML_SOURCE")
    trees = [Path(given)] if given else sorted((ROOT / ".cache").glob("ggml-*"))
    if not trees:
        pytest.skip("this build took ggml from elsewhere; set PYDFLASH_GGML_SOURCE as for the build")
    ours = [EXT, *(path for path in EXT.iterdir() if path.is_dir())]
    return [f"-I{path}" for path in (*ours, *(trees[-1] / name for name in ("include", "src", "src/ggml-cuda")))]
