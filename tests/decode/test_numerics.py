"""A model whose numerics fail says so, on every path alike and naming the position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.errors import ConfigError, NativeError
from pydflash.files import GGUFFile
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.tiny import GEOMETRIES, write_draft, write_target

PROMPT = [3, 1, 4, 1, 5]
PATHS = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.2},
    "sampled": {"temperature": 0.7, "seed": 1},
    "sampled, cut": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 1},
}


def damaged(path: Path, tensor: str, value: float) -> Path:
    """The file with ``value`` as the first number of an f32 ``tensor``, changed in place."""
    with GGUFFile.open(path) as file:
        offset = file.tensors[tensor].offset
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(np.float32(value).tobytes())
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(tensor: str, value: float) -> tuple[Path, Path]:
        target = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"], "f32", seed=1)
        return damaged(target, tensor, value), write_draft(
            tmp_path / "d.gguf", GEOMETRIES["equal"], types="f32", seed=2
        )

    return write


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("output_norm.weight", np.nan),
        ("output_norm.weight", np.inf),
        ("blk.1.post_attention_norm.weight", np.nan),
        ("blk.1.post_attention_norm.weight", np.inf),
        ("output.weight", np.nan),
    ],
)
def test_every_way_of_decoding_raises_the_same_error(
    pair: Callable[..., tuple[Path, Path]], tensor: str, value: float
) -> None:
    target, draft_path = pair(tensor, value)
    said = set()
    with load_model(target, "cpu", threads=1) as model, load_draft(draft_path, model) as draft:
        for options in PATHS.values():
            for speculate in (False, True):
                sampler = Sampler(SamplingParams(**options), model.config.vocab)  # type: ignore[arg-type]
                session = Session(model, 64, capture=draft.config.taps)
                with session, DraftSession(draft, session) as proposer:
                    steps = autoregressive(session, PROMPT, sampler, max_tokens=8)
                    if speculate:
                        steps = speculative(session, proposer, PROMPT, sampler, max_tokens=8)
                    with pytest.raises(NativeError) as caught:
                        collect(steps)
                said.add(str(caught.value))
    assert len(said) == 1
    assert "the logits after position 4 hold NaN or have no finite maximum" in said.pop()


def test_a_token_that_damages_the_text_later_is_named_by_its_position(tmp_path: Path) -> None:
    """One row of the embedding is NaN; the text is right up to the token that it belongs to."""
    target = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"], "f32", seed=1)
    greedy = SamplingParams(max_tokens=12)
    with load_model(target, "cpu", threads=1) as model, Session(model, 64) as session:
        vocab = model.config.vocab
        wanted, _ = collect(autoregressive(session, PROMPT, Sampler(greedy, vocab), max_tokens=12))
        hidden = model.config.hidden
        offset = model.file.tensors["token_embd.weight"].offset
    place = next(i for i, token in enumerate(wanted) if token not in PROMPT + wanted[:i] and i >= 2)
    with target.open("r+b") as file:
        file.seek(offset + 4 * hidden * wanted[place])
        file.write(np.float32(np.nan).tobytes())
    with load_model(target, "cpu", threads=1) as model, Session(model, 64) as session:
        steps = autoregressive(session, PROMPT, Sampler(greedy, vocab), max_tokens=12)
        assert [next(steps).tokens for _ in range(place + 1)] == [(token,) for token in wanted[: place + 1]]
        with pytest.raises(NativeError, match=f"after position {len(PROMPT) + place} hold NaN"):
            next(steps)


def test_a_draft_whose_numerics_fail_changes_no_token(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    target = write_target(tmp_path / "whole.gguf", GEOMETRIES["equal"], "f32", seed=1)
    bad = damaged(write_draft(tmp_path / "bad.gguf", GEOMETRIES["equal"], types="f32"), "output_norm.weight", np.nan)
    with load_model(target, "cpu", threads=1) as model, load_draft(bad, model) as draft:
        greedy = Sampler(SamplingParams(), model.config.vocab)
        session = Session(model, 64, capture=draft.config.taps)
        with session, DraftSession(draft, session) as proposer:
            tokens, stats = collect(speculative(session, proposer, PROMPT, greedy, max_tokens=20))
            session.reset()
            assert tokens == collect(autoregressive(session, PROMPT, greedy, max_tokens=20))[0]
            assert stats.drafted > 0


def test_a_mask_that_leaves_nothing_is_the_callers_mistake_not_the_models() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0), 4, lambda history: np.zeros(4, bool))
    with pytest.raises(ConfigError, match="leave no token"):
        sampler.draw(np.zeros(4, np.float32), [1])
    with pytest.raises(NativeError, match="after position 1"):
        Sampler(SamplingParams(temperature=1.0), 4).draw(np.full(4, -np.inf, np.float32), [1, 2])
