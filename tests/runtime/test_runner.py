"""However tokens are cut into forwards, the logits are the same: bit for bit up to 16 rows, within rounding beyond."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydflash.kv_format import CACHE_TYPES
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests.helpers import Array, cosine, nmse, packed, run_chunks
from tests.reference.qwen35 import Reference
from tests.tiny import GEOMETRIES

Target = Callable[[str, str], Path]

COUNT = 33
CACHES = [*((name, name) for name in CACHE_TYPES), ("q4_0", "q8_0")]


def tokens_for(name: str, count: int = COUNT) -> list[int]:
    tokens: list[int] = np.random.default_rng(3).integers(0, GEOMETRIES[name].vocab, count).tolist()
    return tokens


def rows_of(
    model: Model, tokens: list[int], width: int, cache: tuple[str, str] = ("f16", "f16"), context: int = 256
) -> Array:
    with Session(model, context, *cache) as session:
        return run_chunks(session, tokens, width)


@pytest.mark.parametrize(
    ("name", "types"),
    [(name, "f32") for name in GEOMETRIES]
    + [("ratio3", types) for types in ("f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m")]
    + [("tied", "q4_k_m"), ("gqa6", "q4_k_m")],
)
def test_rows_are_bit_equal_at_every_width_up_to_16(target_of: Target, name: str, types: str) -> None:
    tokens = tokens_for(name)
    with load_model(target_of(name, types), "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1)
        for width in range(2, 17):
            assert np.array_equal(rows_of(model, tokens, width), single), width


@pytest.mark.parametrize("cache", CACHES, ids="/".join)
def test_rows_are_bit_equal_over_every_cache(target_of: Target, cache: tuple[str, str]) -> None:
    tokens = tokens_for("gqa6")
    with load_model(target_of("gqa6", "q8_0"), "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1, cache)
        for width in (2, 3, 7, 8, 16):
            assert np.array_equal(rows_of(model, tokens, width, cache), single), width


def test_rows_are_bit_equal_for_random_cuts_and_discarded_forwards(target_of: Target) -> None:
    rng = np.random.default_rng(8)
    tokens = tokens_for("ratio3", 120)
    with load_model(target_of("ratio3", "q4_k_m"), "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1)
        with Session(model, 256) as session:
            done = 0
            while done < len(tokens):
                junk = rng.integers(0, model.config.vocab, int(rng.integers(1, 17)))
                session.forward(junk, "none")
                session.commit(0)
                piece = tokens[done : done + int(rng.integers(1, 17))]
                kept = int(rng.integers(1, len(piece) + 1))
                got = session.forward(piece, "all").logits
                assert np.array_equal(got, single[done : done + len(piece)])
                session.commit(kept)
                done += kept


@pytest.mark.parametrize("types", ["f32", "q8_0", "q4_k_m"])
def test_threads_do_not_change_a_bit(target_of: Target, types: str) -> None:
    tokens = tokens_for("ratio3", 10)
    results = []
    for threads in (1, 2):
        with load_model(target_of("ratio3", types), "cpu", threads=threads) as model:
            results.append(rows_of(model, tokens, 5))
    assert np.array_equal(*results)


@pytest.mark.parametrize("types", ["f32", "q4_k_m"])
def test_the_size_of_the_cache_never_changes_a_bit(target_of: Target, types: str) -> None:
    tokens = tokens_for("gqa6")
    with load_model(target_of("gqa6", types), "cpu", threads=1) as model:
        results = [rows_of(model, tokens, 16, context=n) for n in (33, 256, 257, 1000, 4096)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_what_an_earlier_text_left_in_the_cache_never_changes_a_bit(target_of: Target) -> None:
    tokens = tokens_for("gqa6")
    with load_model(target_of("gqa6", "q8_0"), "cpu", threads=1) as model, Session(model, 256) as session:
        fresh = run_chunks(session, tokens, 7)
        session.reset()
        wide = session.forward(tokens, "all").logits
        session.commit(len(tokens))
        session.reset()
        session.forward(np.random.default_rng(9).integers(0, model.config.vocab, 200), "none")
        session.commit(200)
        session.reset()
        assert np.array_equal(run_chunks(session, tokens, 7), fresh)
        session.reset()
        assert np.array_equal(session.forward(tokens, "all").logits, wide)


@pytest.mark.parametrize("types", ["f32", "f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("name", ["ratio3", "gqa6"])
def test_prefill_agrees_with_single_steps_within_rounding(target_of: Target, name: str, types: str) -> None:
    """Wider steps take ggml's faster kernels: other orders of sums, which may flip the rounding of an activation.

    A flip is worth what the rounding itself is worth, so the two may differ by no more than single steps and the oracle
    without any rounding do; for f32 weights, which round nothing, by float32 arithmetic.
    """
    path, tokens = target_of(name, types), tokens_for(name, 150)
    with load_model(path, "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1, ("f32", "f32"))
        explained = max(1e-10, nmse(single, Reference(path).forward(tokens)))
        for chunk in (32, 64, 512):
            with Session(model, 256, "f32", "f32", chunk=chunk) as session:
                wide = session.forward(tokens, "all").logits
                assert nmse(wide, single) < explained
                session.commit(len(tokens))
                follow = session.forward([1], "all").logits
            with Session(model, 256, "f32", "f32") as session:
                run_chunks(session, tokens, 1)
                assert nmse(follow, session.forward([1], "all").logits) < 4 * explained  # one row instead of 150


@pytest.mark.parametrize("count", [17, 31, 32, 33, 100])
def test_padding_rows_of_a_wide_step_change_nothing(target_of: Target, count: int) -> None:
    tokens = tokens_for("odd", 200)
    with load_model(target_of("odd", "f32"), "cpu", threads=1) as model, Session(model, 256, "f32", "f32") as session:
        whole = run_chunks(session, tokens, 16)
        session.reset()
        got = session.forward(tokens[:count], "all").logits
        session.commit(count)
        assert cosine(got, whole[:count]) >= 0.99999
        after = session.forward(tokens[count : count + 5], "all").logits
        assert cosine(after, whole[count : count + 5]) >= 0.99999


@pytest.mark.parametrize("cache", [pair for pair in CACHES if "f32" not in pair], ids="/".join)
def test_lossy_caches_stay_close_to_the_f32_cache(target_of: Target, cache: tuple[str, str]) -> None:
    """The logits' NMSE stays below that of normal values that go through a cache's types.

    One layer in four has a cache, and its attention averages: a tenth of that is what is seen.
    """
    normal = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    bound = max(nmse(packed(normal, name).values, normal) for name in cache)
    tokens = tokens_for("gqa6", 64)
    with load_model(target_of("gqa6", "f32"), "cpu", threads=1) as model:
        exact = rows_of(model, tokens, 16, ("f32", "f32"))
        error = nmse(rows_of(model, tokens, 16, cache), exact)
    assert 0 < error < bound
