"""A `qwen35moe` file through llama.cpp of the pinned version: its logits are the oracle's and ours, its text is ours.

The rules, and the reasons for them, are those of test_llama_cpp.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pydflash.models import load_model
from pydflash.runtime import Session
from tests.helpers import Array, RoundedMoEReference, nmse, run_chunks
from tests.parity.peer import peer_logits
from tests.parity.test_llama_cpp import RANDOM, Distances, distances
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, write_target

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="the peer is not installed: pip install llama-cpp-python==0.3.36",
    ),
]

COUNT, PROMPT = 64, 16
# Both engines compute in float32, the oracle in double precision: 1e-12 was seen. A wrong expert is worth 1e-2.
FLOAT_NMSE = 1e-9
F16_NMSE = 1e-6  # test_llama_cpp.py: beyond it, no more than llama.cpp's widths differ


def tokens_for(name: str) -> list[int]:
    tokens: list[int] = np.random.default_rng(6).integers(0, MOE_GEOMETRIES[name].vocab, COUNT).tolist()
    return tokens


def ours(path: Path, tokens: list[int], width: int) -> Array:
    with load_model(path, "cpu", threads=1) as model, Session(model, 256, "f32", "f32") as session:
        return run_chunks(session, tokens, width)


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_logits_with_f32_weights_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path, tokens = write_target(tmp_path / "x.gguf", MOE_GEOMETRIES[name], seed=1), tokens_for(name)
    oracle = MoEReference(path).forward(tokens)
    for width, wanted in peer_logits(path, tokens, [1, 16, COUNT], tmp_path).items():
        assert nmse(wanted, oracle) < FLOAT_NMSE, width
        assert nmse(ours(path, tokens, width), wanted) < FLOAT_NMSE, width


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_logits_with_f16_weights_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path, tokens = write_target(tmp_path / "x.gguf", MOE_GEOMETRIES[name], types="f16", seed=1), tokens_for(name)
    peer = peer_logits(path, tokens, [1, 16], tmp_path)
    error, own = np.mean([nmse(ours(path, tokens, w), wanted) for w, wanted in peer.items()]), nmse(peer[1], peer[16])
    assert error <= max(F16_NMSE, own), own


@pytest.mark.parametrize("types", ["f32", "f16"])
@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_greedy_text_is_that_of_llama_cpp(tmp_path: Path, name: str, types: str) -> None:
    """Each token is llama.cpp's choice after the same text."""
    path, text = write_target(tmp_path / "x.gguf", MOE_GEOMETRIES[name], types=types, seed=1), tokens_for(name)[:PROMPT]
    with load_model(path, "cpu", threads=1) as model, Session(model, 256, "f32", "f32") as session:
        choice = int(run_chunks(session, text, 16)[-1].argmax())
        for _ in range(COUNT):
            text.append(choice)
            choice = int(session.forward([choice]).argmax[0])
            session.commit(1)
    peer = peer_logits(path, text, [1], tmp_path)[1]
    assert peer[PROMPT - 1 : -1].argmax(1).tolist() == text[PROMPT:]


@pytest.mark.parametrize(("types", "names"), [("q8_0", ("moe", "moe_fused")), ("q4_k_m", ("moe",))])
def test_quantised_logits_are_no_further_from_llama_cpp_than_it_is_from_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], types: str, names: Sequence[str]
) -> None:
    """A row whose router stands between two experts is worth more than any other flip, so there are twice as many
    texts as for dense models."""
    plan, found = replace(RANDOM, count=2 * RANDOM.count), []
    for name in names:
        geometry = replace(MOE_GEOMETRIES[name], interval=2)
        path = write_target(tmp_path / "x.gguf", geometry, types=types, seed=1)
        texts = np.random.default_rng(6).integers(0, geometry.vocab, (plan.count, plan.length)).tolist()
        found.append(distances(path, texts, tmp_path, plan, (RoundedMoEReference, MoEReference)))
    joined = Distances.joined(found)
    with capsys.disabled():
        print(f"\n{types}, experts: {joined}")
    joined.check()
