"""Which draft a name or a file is: a row a kind, and whoever is none of them is told which there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pydflash.drafts import Draft, LoadedDraft, NGramDraft, load_draft
from pydflash.drafts.loading import FILES, NAMES
from pydflash.errors import LoadError, UnsupportedArchitecture
from pydflash.models import Model
from tests.tiny import GEOMETRIES, write_draft

Load = Callable[..., Model]


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_without_a_file_is_loaded_by_its_name(model_of: Load, name: str) -> None:
    draft = load_draft(name, model_of("equal"))
    assert str(draft.path) == name
    assert draft.limit >= 1
    draft.close()


def test_a_name_and_a_file_are_told_apart(model_of: Load, tmp_path: Path) -> None:
    assert {"dflash", "dflash-draft", "qwen35-dflash-draft"} <= set(FILES)
    assert isinstance(load_draft("ngram", model_of("equal")), NGramDraft)
    with load_draft(write_draft(tmp_path / "draft.gguf", GEOMETRIES["equal"]), model_of("equal")) as draft:  # type: ignore[attr-defined]
        assert isinstance(draft, Draft)


@pytest.mark.parametrize("layout", ["llama.cpp", "fork"])
def test_what_every_draft_tells_a_dflash_file_tells(model_of: Load, tmp_path: Path, layout: str) -> None:
    path = write_draft(tmp_path / "draft.gguf", GEOMETRIES["equal"], taps=(0, 2), block_size=8, layout=layout)
    draft: LoadedDraft = load_draft(path, model_of("equal"))
    assert (draft.path, draft.limit, draft.taps) == (path, 7, (0, 2))
    told = {name: value for name, value, _ in draft.describe()}
    assert told["block size"] == "8"
    assert told["tapped layers"] == "0, 2"
    draft.close()


def test_another_architecture_is_told_which_there_are(model_of: Load) -> None:
    model = model_of("equal")
    with pytest.raises(UnsupportedArchitecture, match="'qwen35' is not that of a draft; known are dflash, "):
        load_draft(model.path, model)


def test_a_name_that_is_none_is_a_file_that_is_missing(model_of: Load) -> None:
    with pytest.raises(LoadError, match="n-gram"):
        load_draft("n-gram", model_of("equal"))


def test_a_file_that_is_refused_is_closed(model_of: Load) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    model = model_of("equal")
    before = opened()
    for _ in range(3):
        with pytest.raises(UnsupportedArchitecture):
            load_draft(model.path, model)
    assert opened() == before
