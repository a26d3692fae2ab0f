"""Graphs have room for any number of layers, of either kind and of a draft; impossible counts are refused."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from pydflash.drafts import DraftSession, load_draft
from pydflash.models import load_model
from pydflash.runtime import Session
from tests import tiny

# Narrow, so that hundreds of layers are a small file: 64 columns, 2 heads of 64, a delta-net of 2 heads of 32.
NARROW = tiny.Geometry(64, 400, 4, 2, 1, 64, 16, 2, 2, 32, 4, 64, 320)
PROMPT = list(range(3, 43))  # a wide step, then a narrow one


@pytest.mark.parametrize(("layers", "interval"), [(320, 1), (400, 4), (400, 1000)], ids=str)
def test_a_model_of_many_layers_runs(tmp_path: Path, layers: int, interval: int) -> None:
    path = tiny.write_target(
        tmp_path / "deep.gguf", dataclasses.replace(NARROW, layers=layers, interval=interval), "f16"
    )
    with load_model(path, "cpu", threads=1) as model, Session(model, 64) as session:
        for tokens in (PROMPT, [7], [8, 9]):
            logits = session.forward(tokens).logits
            assert np.isfinite(logits).all()
            session.commit(len(tokens))


def test_many_layers_fit_the_stack_of_a_small_thread(tmp_path: Path) -> None:
    """ggml walks back from a node recursively: no further than a layer."""
    path = tiny.write_target(tmp_path / "deep.gguf", dataclasses.replace(NARROW, interval=1000), "f16")
    done: list[int] = []

    def work() -> None:
        with load_model(path, "cpu", threads=1) as model, Session(model, 64) as session:
            session.forward(PROMPT)
            done.append(session.pending)

    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert done == [len(PROMPT)]


def test_a_draft_of_many_layers_runs(tmp_path: Path) -> None:
    geometry = dataclasses.replace(NARROW, layers=4)
    target = tiny.write_target(tmp_path / "target.gguf", geometry, "f16")
    path = tiny.write_draft(
        tmp_path / "draft.gguf", geometry, layers=400, heads=2, kv_heads=1, ffn=64, types="f16", window=16
    )
    with (
        load_model(target, "cpu", threads=1) as model,
        load_draft(path, model) as draft,
        Session(model, 256, capture=draft.config.taps) as session,
        DraftSession(draft, session) as proposing,
    ):
        session.forward(PROMPT)
        session.commit(len(PROMPT))
        proposing.commit(len(PROMPT))
        assert len(proposing.propose([5], 8)) > 1
