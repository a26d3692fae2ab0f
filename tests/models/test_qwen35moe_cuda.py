"""`qwen35moe` models on a GPU: as near the oracle as rounding allows, exact in the width, lossless with a draft.

The rules are those of test_cuda.py: the CPU's distance from the oracle says how far CUDA may be. Products with experts
round nothing on CUDA; the others round activations to f16. Where rounding makes a router choose another expert, a text
goes another way from there on: its distance says nothing about the arithmetic. So there are many short texts, and the
median of their distances counts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests.helpers import Array, nmse, run_chunks
from tests.models.test_qwen35moe_decoding import Scripted
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, WEIGHT_TYPES, write_draft

pytestmark = pytest.mark.cuda

Target = Callable[[str, str], Path]

CACHES = list(product(("f16", "q8_0", "q4_0"), repeat=2))
# Rows of moe_fused do not divide into blocks of K-quants.
QUANTISED = [("moe", types) for types in WEIGHT_TYPES[3:]] + [("moe_fused", types) for types in ("q8_0", "q4_0")]
EVERY = [(name, types) for name in MOE_GEOMETRIES for types in ("f32", "f16", "bf16")] + QUANTISED
MORE_ROUNDINGS = 4  # test_cuda.py
TEXTS, WIDE_TEXTS = (24, 8), (12, 24)  # how many, of how many tokens


def tokens_for(name: str, *shape: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(11).integers(0, MOE_GEOMETRIES[name].vocab, shape).tolist()
    return tokens


def rows_on(device: str, path: Path, texts: list[list[int]], cache: str = "f16") -> list[Array]:
    """Logits of each text, read in one forward."""
    rows = []
    with load_model(path, device, threads=1) as model, Session(model, 256, cache, cache) as session:
        for text in texts:
            session.reset()
            rows.append(session.forward(text, "all").logits)
    return rows


def typical(rows: list[Array], oracle: list[Array]) -> float:
    """The median of the texts' NMSE."""
    return float(np.median([nmse(*pair) for pair in zip(rows, oracle)]))


def oracle_rows(path: Path, texts: list[list[int]]) -> list[Array]:
    reference = MoEReference(path)
    rows = []
    for text in texts:
        reference.reset()
        rows.append(reference.forward(text))
    return rows


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_logits_of_f32_weights_are_as_near_the_oracle_as_f16_rounding_allows(target_of: Target, name: str) -> None:
    texts = tokens_for(name, *TEXTS)
    oracle = oracle_rows(target_of(name, "f32"), texts)
    allowed = MORE_ROUNDINGS * typical(rows_on("cpu", target_of(name, "f16"), texts), oracle)
    assert typical(rows_on("cuda", target_of(name, "f32"), texts), oracle) < allowed


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_logits_of_quantised_weights_are_nearer_the_oracle_than_the_cpu_s(
    target_of: Target, name: str, types: str
) -> None:
    """11 bits of an activation, or all of them, instead of 8."""
    path, texts = target_of(name, types), tokens_for(name, *TEXTS)
    oracle = oracle_rows(path, texts)
    assert typical(rows_on("cuda", path, texts), oracle) < typical(rows_on("cpu", path, texts), oracle)


@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe", "q8_0"), ("moe_fused", "q8_0")])
def test_prefill_is_as_near_the_oracle_as_8_bit_rounding_allows(target_of: Target, name: str, types: str) -> None:
    """ggml's products for wide steps round activations to 8 bits in blocks of 32 for every quantised type."""
    path, texts = target_of(name, types), tokens_for(name, *WIDE_TEXTS)
    oracle = oracle_rows(path, texts)
    allowed = MORE_ROUNDINGS * typical(rows_on("cpu", path, texts), oracle)
    assert typical(rows_on("cuda", path, texts), oracle) < allowed


@pytest.mark.parametrize(("name", "types"), EVERY)
def test_rows_are_bit_equal_at_every_width_up_to_16(target_of: Target, name: str, types: str) -> None:
    tokens = tokens_for(name, 40)
    with load_model(target_of(name, types), "cuda") as model:
        rows = []
        for width in range(1, 17):
            with Session(model, 256, "q8_0", "q8_0") as session:
                rows.append(run_chunks(session, tokens, width))
    assert all(np.array_equal(rows[0], other) for other in rows[1:])
    assert np.isfinite(rows[0]).all()


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe", "f32"), ("moe_fused", "q8_0")])
def test_commit_n_equals_a_fresh_run_of_those_n(target_of: Target, name: str, types: str, n: int) -> None:
    tokens, block, following = tokens_for(name, 19), tokens_for(name, 16)[::-1], [7, 8, 9]
    with load_model(target_of(name, types), "cuda") as model:
        with Session(model, 256, "q4_0", "q8_0") as session:
            run_chunks(session, tokens, 8)
            session.forward(block, "none")
            session.commit(n)
            got = session.forward(following, "all").logits
        with Session(model, 256, "q4_0", "q8_0") as fresh:
            run_chunks(fresh, tokens + block[:n], 1)
            assert np.array_equal(fresh.forward(following, "all").logits, got)


@pytest.mark.parametrize("n", [0, 1, 9, 16])
@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe_fused", "q8_0")])
def test_a_restored_session_goes_on_bit_for_bit(target_of: Target, name: str, types: str, n: int) -> None:
    tokens, block, following = tokens_for(name, 40), tokens_for(name, 16)[::-1], tokens_for(name, 30)
    with load_model(target_of(name, types), "cuda") as model:
        session, restored = Session(model, 256, "q4_0", "q8_0"), Session(model, 900, "q4_0", "q8_0", chunk=64)
        with session, restored:
            session.forward(tokens, "none")
            session.commit(40)
            session.forward(block, "none")
            session.commit(n)
            restored.forward(following, "none")  # another text, pending
            restored.restore(session.snapshot())
            assert np.array_equal(run_chunks(restored, following, 1), run_chunks(session, following, 1))


# --- speculation ------------------------------------------------------------------------------------------------------


def greedy(model: Model) -> Sampler:
    return Sampler(SamplingParams(), model.config.vocab)


@pytest.mark.parametrize("cache", CACHES, ids="/".join)
@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe_fused", "q8_0")])
def test_any_draft_gives_the_autoregressive_text(
    target_of: Target, tmp_path: Path, name: str, types: str, cache: tuple[str, str]
) -> None:
    """A draft that is right up to any place of the block, and one with random weights."""
    prompt, limits = tokens_for(name, 21), {"max_tokens": 60}
    draft_path = write_draft(tmp_path / "draft.gguf", MOE_GEOMETRIES[name], layers=3, window=24, seed=2)
    with load_model(target_of(name, types), "cuda") as model, load_draft(draft_path, model) as draft:
        with Session(model, 256, *cache) as session:
            wanted = collect(autoregressive(session, prompt, greedy(model), **limits))[0]
        known, rng = [*prompt, *wanted, *[0] * 32], np.random.default_rng(4)

        def choose(first: int, count: int) -> list[int]:
            right = int(rng.integers(0, 16))
            return [t if i < right else (t + 1) % 320 for i, t in enumerate(known[first : first + count])]

        with Session(model, 256, *cache) as session:
            tokens, stats = collect(speculative(session, Scripted(choose), prompt, greedy(model), **limits))
        assert tokens == wanted
        assert 0 < stats.accepted < stats.drafted
        with (
            Session(model, 256, *cache, capture=draft.config.taps) as session,
            DraftSession(draft, session) as drafting,
        ):
            assert collect(speculative(session, drafting, prompt, greedy(model), **limits))[0] == wanted
