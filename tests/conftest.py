"""Fixtures that several folders share: a tiny random pair and engines on it, one thread each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pydflash.engine import Engine
from tests.tiny import GEOMETRIES, write_draft, write_target

PAIR_GEOMETRY = "gqa6"


@pytest.fixture(scope="session")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("pair") / "target.gguf", GEOMETRIES[PAIR_GEOMETRY], "q8_0")


@pytest.fixture(scope="session")
def draft_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(tmp_path_factory.mktemp("pair") / "draft.gguf", GEOMETRIES[PAIR_GEOMETRY], window=64)


@pytest.fixture(scope="session")
def engine(target_path: Path) -> Iterator[Engine]:
    with Engine.load(target_path, device="cpu", threads=1, max_context=512, environment={}) as engine:
        yield engine


@pytest.fixture(scope="session")
def speculating(target_path: Path, draft_path: Path) -> Iterator[Engine]:
    options = {"device": "cpu", "threads": 1, "max_context": 512, "environment": {}}
    with Engine.load(target_path, draft_path, **options) as engine:
        yield engine
