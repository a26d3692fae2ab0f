"""Random pairs of a target and a draft, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pydflash.drafts import Draft, DraftSession, load_draft
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests.tiny import GEOMETRIES, write_draft, write_target


@dataclass
class Pair:
    """A loaded target and draft, and the files they came from."""

    model: Model
    draft: Draft
    target_path: Path
    draft_path: Path

    def open(self, context: int = 256, k: str = "f32", v: str = "f32", **options: Any) -> tuple[Session, DraftSession]:
        session = Session(self.model, context, k, v, capture=self.draft.config.taps, **options)
        return session, DraftSession(self.draft, session)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair]]:
    """(geometry name, weight types, **options of write_draft) to a loaded pair, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("pairs")
    loaded: dict[str, Pair] = {}

    def load(name: str = "equal", types: str = "f32", **options: Any) -> Pair:
        key = f"{name}-{types}-{sorted(options.items())}"
        if key not in loaded:
            target = write_target(folder / f"t{len(loaded)}.gguf", GEOMETRIES[name], types=types, seed=1)
            draft = write_draft(folder / f"d{len(loaded)}.gguf", GEOMETRIES[name], types="f32", seed=2, **options)
            model = load_model(target, "cpu", threads=1)
            loaded[key] = Pair(model, load_draft(draft, model), target, draft)
        return loaded[key]

    yield load
    for pair in loaded.values():
        pair.draft.close()
        pair.model.close()
