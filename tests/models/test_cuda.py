"""Whole models on a GPU: as near the oracle as its rounding allows, exact in the width, lossless with a draft.

Decoding on CUDA rounds activations, weights, attention weights and what it reads of a cache to f16, whatever the file
holds. The CPU does the same to a file of f16 weights but for the attention, and rounds to 8 bits for quantised weights.
So the CPU's distance from the oracle, measured on the same tokens, says how far CUDA may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, autoregressive, speculative
from pydflash.drafts import Draft, DraftSession, load_draft
from pydflash.errors import ConfigError, DeviceError
from pydflash.kv_format import CACHE_TYPES
from pydflash.models import Model, load_model
from pydflash.native.traits import CUDA
from pydflash.runtime import Session
from tests.helpers import Array, nmse, run_chunks
from tests.reference.qwen35 import Reference
from tests.shipped import DRAFT, TARGET, held_out_prompts, needs_pair
from tests.tiny import GEOMETRIES, K_QUANT_GEOMETRIES

pytestmark = pytest.mark.cuda

Target = Callable[[str, str], Path]

CACHES = list(product([name for name, t in CACHE_TYPES.items() if t in CUDA.cache_types], repeat=2))
# Twice as many roundings of one size (weights and attention beside activations), and the luck of the draw: the squared
# error of a few thousand logits, most of which comes from a few amplified values.
MORE_ROUNDINGS = 4


def tokens_for(name: str, count: int = 40) -> list[int]:
    tokens: list[int] = np.random.default_rng(11).integers(0, GEOMETRIES[name].vocab, count).tolist()
    return tokens


def rows_on(device: str, path: Path, tokens: list[int], width: int, cache: str = "f16") -> Array:
    with load_model(path, device, threads=1) as model, Session(model, 256, cache, cache) as session:
        return run_chunks(session, tokens, width)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_of_f32_weights_are_as_near_the_oracle_as_f16_rounding_allows(target_of: Target, name: str) -> None:
    tokens = tokens_for(name)
    oracle = Reference(target_of(name, "f32")).forward(tokens)
    allowed = MORE_ROUNDINGS * nmse(rows_on("cpu", target_of(name, "f16"), tokens, 8), oracle)
    assert nmse(rows_on("cuda", target_of(name, "f32"), tokens, 8), oracle) < allowed


@pytest.mark.parametrize("types", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m"])
@pytest.mark.parametrize("name", K_QUANT_GEOMETRIES)
def test_logits_of_quantised_weights_are_nearer_the_oracle_than_the_cpu_s(
    target_of: Target, name: str, types: str
) -> None:
    """11 bits of an activation instead of 8."""
    path, tokens = target_of(name, types), tokens_for(name)
    oracle = Reference(path).forward(tokens)
    assert nmse(rows_on("cuda", path, tokens, 8), oracle) < nmse(rows_on("cpu", path, tokens, 8), oracle)


@pytest.mark.parametrize("types", ["q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("name", K_QUANT_GEOMETRIES)
def test_prefill_is_as_near_the_oracle_as_8_bit_rounding_allows(target_of: Target, name: str, types: str) -> None:
    """ggml's products for wide steps round activations to 8 bits in blocks of 32 for every quantised type."""
    path, tokens = target_of(name, types), tokens_for(name)
    oracle = Reference(path).forward(tokens)
    allowed = MORE_ROUNDINGS * nmse(rows_on("cpu", path, tokens, 8), oracle)
    assert nmse(rows_on("cuda", path, tokens, 40), oracle) < allowed


@pytest.mark.parametrize(
    ("name", "types"),
    [(name, "f32") for name in GEOMETRIES]
    + [("ratio3", types) for types in ("f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")]
    + [(name, "q4_k_m") for name in K_QUANT_GEOMETRIES],
)
def test_rows_are_bit_equal_at_widths_up_to_16(target_of: Target, name: str, types: str) -> None:
    tokens = tokens_for(name)
    with load_model(target_of(name, types), "cuda") as model:
        rows = []
        for width in (1, 3, 8, 16):
            with Session(model, 256) as session:
                rows.append(run_chunks(session, tokens, width))
    assert all(np.array_equal(rows[0], other) for other in rows[1:])


@pytest.mark.parametrize("cache", CACHES, ids="/".join)
def test_rows_are_bit_equal_over_every_cache(target_of: Target, cache: tuple[str, str]) -> None:
    tokens = tokens_for("gqa6")
    with load_model(target_of("gqa6", "q4_k_m"), "cuda") as model:
        rows = []
        for width in (1, 3, 8, 16):
            with Session(model, 256, *cache) as session:
                rows.append(run_chunks(session, tokens, width))
    assert all(np.array_equal(rows[0], other) for other in rows[1:])
    assert np.isfinite(rows[0]).all()


@pytest.mark.parametrize("n", range(17))
@pytest.mark.parametrize(("name", "types"), [("gqa6", "q4_k_m"), ("odd", "q8_0"), ("tied", "f32")])
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
@pytest.mark.parametrize(("name", "types"), [("gqa6", "q4_k_m"), ("odd", "q8_0"), ("all_recurrent", "f32")])
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


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("name", ["gqa6", "odd"])
def test_a_snapshot_of_one_device_goes_on_on_the_other(target_of: Target, name: str, first: str, second: str) -> None:
    """States and rows lie alike on both, with rows that are still to be replayed."""
    path, tokens = target_of(name, "f16"), tokens_for(name)
    with load_model(path, first) as model, Session(model, 256) as session:
        run_chunks(session, tokens[:12], 12)
        session.forward(tokens[12:24], "none")
        session.commit(8)
        snapshot = session.snapshot()
    with load_model(path, second) as model, Session(model, 256) as session:
        session.restore(snapshot)
        rows = run_chunks(session, tokens[20:], 4)
    oracle = Reference(path).forward(tokens)[20:]
    assert nmse(rows, oracle) < MORE_ROUNDINGS * nmse(rows_on("cpu", path, tokens, 8)[20:], oracle)


def test_an_f32_cache_is_refused(target_of: Target) -> None:
    refused = pytest.raises((ConfigError, DeviceError))
    with load_model(target_of("gqa6", "q8_0"), "cuda") as model, refused, Session(model, 256, "f32", "f32") as session:
        session.forward([1, 2, 3])


# --- the shipped pair -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Model, Draft]]:
    with load_model(TARGET, "cuda") as model, load_draft(DRAFT, model) as draft:
        yield model, draft


def accepted_while_lossless(pair: tuple[Model, Draft], text: str, count: int, k: str, v: str) -> int:
    """Accepted tokens of a speculative text that was found equal to the autoregressive one."""
    model, draft = pair
    prompt, greedy = model.tokenizer.encode(text), Sampler(SamplingParams(), model.config.vocab)
    limits = {"max_tokens": count, "stop_ids": model.tokenizer.eos_ids}
    with Session(model, 512, k, v) as session:
        wanted = [t for step in autoregressive(session, prompt, greedy, **limits) for t in step.tokens]  # type: ignore[arg-type]
    with Session(model, 512, k, v, capture=draft.config.taps) as session, DraftSession(draft, session) as drafting:
        steps = list(speculative(session, drafting, prompt, greedy, **limits))  # type: ignore[arg-type]
    assert [t for step in steps for t in step.tokens] == wanted
    return sum(step.accepted for step in steps)


@needs_pair
def test_speculative_text_is_autoregressive_text_on_5_held_out_prompts(pair: tuple[Model, Draft]) -> None:
    accepted = [accepted_while_lossless(pair, text, 64, "f16", "f16") for text in held_out_prompts(5)]
    assert sum(accepted) > 100  # of at most 315: the draft's context reached it


@needs_pair
@pytest.mark.parametrize("cache", CACHES, ids="/".join)
def test_speculative_text_is_autoregressive_text_over_every_cache(
    pair: tuple[Model, Draft], cache: tuple[str, str]
) -> None:
    for text in held_out_prompts(3):
        accepted_while_lossless(pair, text, 48, *cache)


@needs_pair
def test_a_short_proposal_is_the_beginning_of_a_whole_block(pair: tuple[Model, Draft]) -> None:
    model, draft = pair
    with Session(model, 512, capture=draft.config.taps) as session, DraftSession(draft, session) as drafting:
        session.forward([1, 2, 3], "none")
        session.commit(3)
        drafting.commit(3)
        whole = drafting.propose([4]).ids.tolist()
        for count in range(1, draft.config.block_size):
            assert drafting.propose([4], count).ids.tolist() == whole[: 1 + count]
            assert len(drafting.logits()) == draft.config.block_size


@needs_pair
def test_a_restored_pair_gives_the_same_tokens_and_accepts_as_many(pair: tuple[Model, Draft]) -> None:
    model, draft = pair
    greedy = Sampler(SamplingParams(), model.config.vocab)
    sessions = [Session(model, size, "q4_0", "q8_0", capture=draft.config.taps) for size in (1024, 2048)]
    drafting = [DraftSession(draft, session) for session in sessions]
    prompt = model.tokenizer.encode(held_out_prompts(1)[0])
    anchor = [t for s in speculative(sessions[0], drafting[0], prompt, greedy, max_tokens=60) for t in s.tokens][-1]
    sessions[1].restore(sessions[0].snapshot())
    drafting[1].restore(drafting[0].snapshot())
    here, there = (list(speculative(*each, [anchor], greedy, max_tokens=100)) for each in zip(sessions, drafting))
    assert here == there
    assert sum(step.accepted for step in here) > len(here)  # there is acceptance to lose
    for each in (*drafting, *sessions):
        each.close()
