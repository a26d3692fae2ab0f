"""Random targets, written once for each geometry and weight type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import GEOMETRIES, write_target


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(geometry name, weight types) to the path of a file, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("targets")

    def write(name: str, types: str) -> Path:
        path = folder / f"{name}-{types}.gguf"
        return path if path.exists() else write_target(path, GEOMETRIES[name], types=types, seed=1)

    return write
