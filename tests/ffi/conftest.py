"""Where the source that the libraries were built from lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ggml_source() -> Path:
    """ggml's source tree; the test is skipped without one."""
    given = os.environ.get("PYDFLASH_GGML_SOURCE")
    trees = [Path(given)] if given else sorted((ROOT / ".cache").glob("ggml-*"))
    if not trees:
        pytest.skip("this build took ggml from elsewhere; set PYDFLASH_GGML_SOURCE as for the build")
    return trees[-1]
