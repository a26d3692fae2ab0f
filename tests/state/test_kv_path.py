"""A session that takes Q, K and V to attention in one kernel each has the bytes of one that takes them step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from pydflash._ffi import ffi, lib
from pydflash.decode import Sampler, SamplingParams, collect, speculative
from pydflash.drafts import DraftSession
from pydflash.kv_format import CACHE_TYPES
from pydflash.runtime import Session
from tests.helpers import Pair, state_of
from tests.tiny import GEOMETRIES

LOSSY = [name for name in CACHE_TYPES if name != "f32"]
# Cache types and bases of K and V.
CASES = [("f16", "f16", "none", "none"), ("q4_0", "q8_0", "auto", "none"), ("q4_0", "q4_0", "auto", "hadamard-64")]
CASES += [("q8_0", "bf16", "signed-128", "hadamard-256"), ("q4_0", "f16", "hadamard-64", "hadamard-128")]


@pytest.fixture(scope="module")
def pair(pair_of: Callable[..., Pair], device: str) -> Pair:
    """Heads of 256 as in the 27B model, on every device; the draft's heads are of another size."""
    return pair_of("gqa6", "q8_0", device, threads=2, window=64)


def tokens_for(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, GEOMETRIES["gqa6"].vocab, count).tolist()
    return tokens


def opened(pair: Pair, case: tuple[str, str, str, str], fused: bool) -> Session:
    return Session(pair.model, 512, *case, fused=fused, capture=pair.draft.config.taps)


def assert_same_run(pair: Pair, case: tuple[str, str, str, str]) -> None:
    """A prefill with padding, narrow steps, a part forgotten: logits and everything remembered, byte by byte."""
    pieces = [(100, 100), (1, 1), (16, 9), (3, 3), (16, 16), (5, 0), (33, 33), (2, 1)]
    with opened(pair, case, True) as fused, opened(pair, case, False) as plain:
        for seed, (count, kept) in enumerate(pieces):
            rows = [s.forward(tokens_for(count, seed), "all").logits for s in (fused, plain)]
            assert np.array_equal(*rows), (seed, count)
            for session in (fused, plain):
                session.commit(kept)
        here, there = (state_of(session, pair.model) for session in (fused, plain))
    assert here.keys() == there.keys()
    for name, values in there.items():
        assert np.array_equal(here[name], values), name


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_logits_and_caches_have_the_same_bytes(pair: Pair, case: tuple[str, str, str, str]) -> None:
    assert_same_run(pair, case)


@pytest.mark.parametrize("types", list(product(LOSSY, LOSSY)), ids="/".join)
def test_logits_and_caches_have_the_same_bytes_for_every_pair_of_types(pair: Pair, types: tuple[str, str]) -> None:
    assert_same_run(pair, (*types, "auto", "none"))


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_speculation_proposes_and_accepts_the_same(pair: Pair, case: tuple[str, str, str, str]) -> None:
    texts, traces, proposed = [], [], []
    for fused in (True, False):
        with opened(pair, case, fused) as session, DraftSession(pair.draft, session) as draft:
            sampler = Sampler(SamplingParams(), pair.model.config.vocab)
            tokens, stats = collect(speculative(session, draft, tokens_for(40), sampler, max_tokens=60))
            texts.append(tokens)
            traces.append(stats.trace)
            proposed.append(draft.logits())
    assert texts[0] == texts[1]
    assert traces[0] == traces[1]
    assert np.array_equal(*proposed)


def kind_of(node: Any) -> str:
    """ggml's name of a node, but one name for what normalises, be it a node of ours or of ggml."""
    own = lib.pydflash_node_op(node)
    if own and ffi.string(own.name) == b"rms_norm":
        return "RMS_NORM"
    return ffi.string(lib.ggml_op_desc(node)).decode()


def test_a_fused_session_turns_and_stores_in_no_node_of_its_own(pair: Pair) -> None:
    """Of the nodes that store a row none is left, of those that normalise and turn it two less in each layer."""
    counts = []
    for fused in (True, False):
        with opened(pair, ("q4_0", "q8_0", "auto", "none"), fused) as session:
            session.forward(tokens_for(1), "none")
            (step,) = session.shared.runner.narrow
            nodes = [lib.ggml_graph_node(step.graph.c, i) for i in range(lib.ggml_graph_n_nodes(step.graph.c))]
            counts.append(Counter(kind_of(node) for node in nodes))
    layers, (fused_counts, plain_counts) = len(pair.model.config.attention_layers), counts
    taps = len(pair.draft.config.taps)  # their rows go into the ring of features either way
    assert fused_counts["SET_ROWS"] == taps
    assert plain_counts["SET_ROWS"] == 2 * layers + taps
    # The plain way turns and rotates Q and K in two nodes of ours each; fused, Q has one, and K and V have one.
    for kind in ("RMS_NORM", "CUSTOM"):
        assert plain_counts[kind] - fused_counts[kind] == 2 * layers, kind
