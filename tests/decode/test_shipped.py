"""The shipped pair: equal to the model it was trained as, and really faster to decode with, at no change of a byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, Stats, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.kv_format import CACHE_TYPES
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.helpers import Pair, cosine, dequantised
from tests.shipped import DRAFT, TARGET, TEST_DATA, held_out_prompts, needs_pair

pytestmark = needs_pair

LOGITS_DIFFERENCE = 1e-3  # float32 on both sides, in different orders, through 8 layers


@pytest.fixture(scope="module")
def float_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The pair with the same weights as f32, which round no activation: what the stored arrays were computed with."""
    folder = tmp_path_factory.mktemp("f32")
    target, draft = dequantised(TARGET, folder / "target.gguf"), dequantised(DRAFT, folder / "draft.gguf")
    with load_model(target, "cpu", threads=1) as model, load_draft(draft, model) as loaded:
        yield Pair(model, loaded, target, draft)


def stored(name: str) -> Any:
    path = TEST_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in tests/data; tools/tiny writes it")
    return np.load(path)


def numbered(arrays: Any, name: str) -> list[int]:
    return [int(key.rsplit("_", 1)[1]) for key in arrays.files if key.rsplit("_", 1)[0] == name]


def generate(pair: Pair, prompt: list[int], count: int, k: str = "f16", v: str = "f16") -> tuple[list[int], Stats]:
    """The speculative text, after the autoregressive one was found to be the same."""
    vocab, context = pair.model.config.vocab, -(-(len(prompt) + count) // 256) * 256
    greedy = Sampler(SamplingParams(), vocab)
    stops = pair.model.tokenizer.eos_ids
    with Session(pair.model, context, k, v) as plain:
        wanted = [t for s in autoregressive(plain, prompt, greedy, max_tokens=count, stop_ids=stops) for t in s.tokens]
    session, draft = pair.open(context, k, v)
    with session, draft:
        tokens, stats = collect(speculative(session, draft, prompt, greedy, max_tokens=count, stop_ids=stops))
    assert tokens == wanted
    return tokens, stats


def acceptance_over(pair: Pair, prompts: int, tokens: int) -> float:
    steps = accepted = 0
    for text in held_out_prompts(prompts):
        _, stats = generate(pair, pair.model.tokenizer.encode(text), tokens)
        steps += stats.steps
        accepted += stats.accepted
    return (accepted + steps) / steps


def test_speculative_text_is_autoregressive_text_on_20_held_out_prompts(shipped_pair: Pair) -> None:
    assert acceptance_over(shipped_pair, 20, 64) >= 4


@pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="takes four minutes; set SLOW_TESTS=1")
def test_speculative_text_is_autoregressive_text_on_200_held_out_prompts(shipped_pair: Pair) -> None:
    assert acceptance_over(shipped_pair, 200, 256) >= 4


@pytest.mark.parametrize(("k", "v"), [*((name, name) for name in CACHE_TYPES), ("q4_0", "q8_0")])
def test_speculative_text_is_autoregressive_text_over_every_cache(shipped_pair: Pair, k: str, v: str) -> None:
    for text in held_out_prompts(3):
        generate(shipped_pair, shipped_pair.model.tokenizer.encode(text), 48, k, v)


def test_f32_logits_are_those_of_the_model_it_was_trained_as(float_pair: Pair) -> None:
    arrays = stored("tiny_logits.npz")
    for i in numbered(arrays, "ids"):
        ids, wanted = arrays[f"ids_{i}"], arrays[f"logits_{i}"]
        for width in (len(ids), 5):
            with Session(float_pair.model, 256, "f32", "f32") as session:
                rows = []
                for start in range(0, len(ids), width):
                    piece = ids[start : start + width]
                    rows.append(session.forward(piece, "all").logits)
                    session.commit(len(piece))
            got = np.concatenate(rows)
            assert np.abs(got - wanted).max() <= LOGITS_DIFFERENCE
            assert np.array_equal(got.argmax(1), wanted.argmax(1))


def test_the_residual_stream_is_that_of_the_model_it_was_trained_as(float_pair: Pair) -> None:
    arrays = stored("tiny_logits.npz")
    layers = tuple(range(float_pair.model.config.layers))
    with Session(float_pair.model, 256, "f32", "f32", capture=layers) as session:
        ids = arrays["ids_0"]
        session.forward(ids, "none")
        out = np.empty(session.features.shape, np.float32)
        float_pair.model.backend.read(session.features, out)
    for layer in layers:
        assert cosine(out[: len(ids), layer], arrays["residual_0"][layer]) >= 0.999999


def test_draft_logits_are_those_of_the_draft_it_was_trained_as(float_pair: Pair) -> None:
    arrays = stored("tiny_draft.npz")
    for i in numbered(arrays, "anchor"):
        ids, anchor = arrays[f"ids_{i}"], int(arrays[f"anchor_{i}"])
        session, draft = float_pair.open(256)
        with session, draft:
            assert session.forward(ids).argmax.tolist() == [anchor]
            session.commit(len(ids))
            draft.commit(len(ids))
            draft.propose([anchor])
            got = draft.logits()
        best = arrays[f"top_ids_{i}"]
        # The draft's context K and V are kept in f16, which the stored ones were not.
        assert np.abs(np.take_along_axis(got, best, 1) - arrays[f"top_logits_{i}"])[1:].max() < 0.05
        if f"logits_{i}" in arrays.files:
            assert cosine(got[1:], arrays[f"logits_{i}"][1:]) >= 0.99999


def test_accepted_lengths_are_those_of_the_model_it_was_trained_as(float_pair: Pair) -> None:
    arrays = stored("tiny_draft.npz")
    greedy = Sampler(SamplingParams(), float_pair.model.config.vocab)
    for j in numbered(arrays, "run_ids"):
        prompt, wanted = arrays[f"run_ids_{j}"].tolist(), arrays[f"run_tokens_{j}"].tolist()
        session: Session
        draft: DraftSession
        session, draft = float_pair.open(512)
        with session, draft:
            tokens, stats = collect(speculative(session, draft, prompt, greedy, max_tokens=len(wanted)))
            assert tokens == wanted
        # The stored lengths count the last verify in full; the engine proposes no more than is asked for.
        lengths = [n + 1 for n in stats.trace]
        assert lengths[:-1] == arrays[f"run_lengths_{j}"].tolist()[: len(lengths) - 1]


def test_both_files_fit_what_the_package_may_weigh() -> None:
    assert Path(TARGET).stat().st_size <= 9 << 20
    assert Path(TARGET).stat().st_size + Path(DRAFT).stat().st_size <= 13 << 20
