"""Loaded random targets that the state tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pydflash.models import Model, load_model
from tests.tiny import GEOMETRIES, write_target


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    """(geometry name, weight types) to a loaded model, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("targets")
    loaded: dict[tuple[str, str], Model] = {}

    def load(name: str, types: str = "f32") -> Model:
        if (name, types) not in loaded:
            path = write_target(folder / f"{name}-{types}.gguf", GEOMETRIES[name], types=types, seed=1)
            loaded[name, types] = load_model(path, "cpu", threads=1)
        return loaded[name, types]

    yield load
    for model in loaded.values():
        model.close()
