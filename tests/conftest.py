"""What tests are given: devices, random files, and the models, pairs and engines made of them, each made once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pydflash.drafts import load_draft
from pydflash.engine import Engine
from pydflash.models import Model, load_model
from pydflash.native import Backend, cuda_device_count
from tests.helpers import Pair
from tests.shipped import DRAFT, TARGET
from tests.tiny import GEOMETRIES, MOE_GEOMETRIES, write_draft, write_target


def pytest_configure() -> None:
    """Shells let background jobs ignore these signals, and programs that the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``cuda``, as a whole or for one of its parameters, needs a CUDA device."""
    if item.get_closest_marker("cuda") and not cuda_device_count():
        pytest.skip("no CUDA device, or a build without CUDA")


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU always, and the first CUDA device where there is one."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def cpu() -> Iterator[Backend]:
    with Backend("cpu", threads=1) as backend:
        yield backend


@pytest.fixture(scope="session")
def cuda() -> Iterator[Backend]:
    """For tests marked ``cuda``."""
    with Backend("cuda") as backend:
        yield backend


@pytest.fixture
def backend(device: str, request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(device)
    return found


# --- models and pairs, by what they are made of -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(geometry name, weight types) to the path of a random target, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("targets")

    def write(name: str, types: str = "f32") -> Path:
        path = folder / f"{name}-{types}.gguf"
        geometry = (GEOMETRIES | MOE_GEOMETRIES)[name]
        return path if path.exists() else write_target(path, geometry, types=types, seed=1)

    return write


@pytest.fixture(scope="session")
def model_of(target_of: Callable[..., Path]) -> Iterator[Callable[..., Model]]:
    """(geometry name, weight types) to a random target, loaded on the CPU, the same for equal arguments."""
    loaded: dict[tuple[str, str], Model] = {}
    with ExitStack() as undo:

        def load(name: str, types: str = "f32") -> Model:
            if (name, types) not in loaded:
                loaded[name, types] = undo.enter_context(load_model(target_of(name, types), "cpu", threads=1))
            return loaded[name, types]

        yield load


@pytest.fixture(scope="session")
def pair_of(target_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair]]:
    """(geometry name, weight types, device, threads, **options of write_draft) to a random target and its draft, the
    same for equal arguments."""
    folder = tmp_path_factory.mktemp("drafts")
    loaded: dict[str, Pair] = {}
    with ExitStack() as undo:

        def load(
            name: str = "equal", types: str = "f32", device: str = "cpu", threads: int = 1, **options: Any
        ) -> Pair:
            key = f"{name}-{types}-{device}-{threads}-{sorted(options.items())}"
            if key not in loaded:
                target = target_of(name, types)
                path = write_draft(folder / f"{len(loaded)}.gguf", GEOMETRIES[name], types="f32", seed=2, **options)
                model = undo.enter_context(load_model(target, device, threads=threads if device == "cpu" else None))
                draft = undo.enter_context(load_draft(path, model))
                loaded[key] = Pair(model, draft, target, path)
            return loaded[key]

        yield load


@pytest.fixture(scope="session")
def shipped_pair() -> Iterator[Pair]:
    """For tests marked ``needs_pair``."""
    with load_model(TARGET, "cpu", threads=1) as model, load_draft(DRAFT, model) as draft:
        yield Pair(model, draft, TARGET, DRAFT)


# --- engines ----------------------------------------------------------------------------------------------------------

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
