"""The draft equals its oracle: logits of a block, for any layer kind, any context, and however that was built."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pydflash.drafts import DraftSession, load_draft
from pydflash.errors import ConfigError, SessionClosed, ShapeError, StateError
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.helpers import Array, Pair, cosine
from tests.reference.dflash import DraftReference
from tests.reference.qwen35 import Reference

PairOf = Callable[..., Pair]

COSINE = 0.99999  # float32, and K/V of the context in f16: 2^-12 of each value
TIE = 0.02  # that f16 changes these logits, of 4 rms, by up to 0.01: two that are nearer may change places

KINDS: dict[str, dict[str, Any]] = {
    "full": {"layers": 2},
    "full, causal": {"layers": 2, "causal": True},
    "sliding and full": {"layers": 3, "window": 24},
    "sliding and full, not causal": {"layers": 3, "window": 24, "causal": False},
    "sliding only": {"layers": 2, "window": 9, "sliding": (True, True)},
    "full before sliding": {"layers": 2, "window": 40, "sliding": (False, True), "taps": (2, 0)},
    "window of one": {"layers": 2, "window": 1},
    "fork": {"layers": 3, "window": 24, "layout": "fork"},
    "block of 5": {"layers": 2, "window": 24, "block_size": 5},
    "one tap": {"layers": 1, "taps": (1,), "head_dim": 128, "heads": 3, "kv_heads": 1},
}


def tokens_for(pair: Pair, count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, pair.model.config.vocab, count).tolist()
    return tokens


def oracle_features(pair: Pair, tokens: list[int], draft: DraftReference) -> Array:
    target = Reference(pair.target_path)
    target.forward(tokens)
    return draft.features(target.hidden)


def fill(session: Session, draft: DraftSession, tokens: list[int], width: int) -> None:
    for start in range(0, len(tokens), width):
        piece = tokens[start : start + width]
        draft.flush()
        session.forward(piece, "none")
        session.commit(len(piece))
        draft.commit(len(piece))


@pytest.mark.parametrize("context", [1, 2, 16, 45, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_block_logits_equal_the_oracle(pair_of: PairOf, kind: str, context: int) -> None:
    pair = pair_of(**KINDS[kind])
    tokens = tokens_for(pair, context)
    oracle = DraftReference(pair.draft_path, pair.target_path)
    wanted = oracle.propose_logits(oracle_features(pair, tokens, oracle), 7, context, oracle.block_size)
    session, draft = pair.open()
    with session, draft:
        fill(session, draft, tokens, 64)
        proposal = draft.propose([7])
        got = draft.logits()
        assert cosine(got[1:], wanted[1:]) >= COSINE
        assert len(proposal) == oracle.block_size
        assert proposal.ids.tolist() == [7, *got[1:].argmax(axis=1).tolist()]
        second, first = np.sort(wanted[1:], axis=1)[:, -2:].T
        clear = first - second > TIE
        assert clear.mean() > 0.5
        assert np.array_equal(proposal.ids[1:][clear], wanted[1:].argmax(axis=1)[clear])


@pytest.mark.parametrize("kind", ["full", "sliding and full", "sliding only", "fork"])
def test_a_context_kept_piece_by_piece_equals_recomputing_it_from_all_features(pair_of: PairOf, kind: str) -> None:
    """Features of rejected rows never enter, whatever the lengths of the kept prefixes."""
    pair = pair_of(**KINDS[kind])
    oracle = DraftReference(pair.draft_path, pair.target_path)
    rng = np.random.default_rng(3)
    kept = tokens_for(pair, 20)
    session, draft = pair.open()
    with session, draft:
        fill(session, draft, kept, 64)
        for n in (3, 16, 1, 7, 16, 16, 5, 2, 12):
            block = rng.integers(0, pair.model.config.vocab, 16).tolist()
            draft.propose([block[0]])
            session.forward(block, "all")
            session.commit(n)
            draft.commit(n)
            kept += block[:n]
            draft.propose([9])
            wanted = oracle.propose_logits(oracle_features(pair, kept, oracle), 9, len(kept), 16)
            assert cosine(draft.logits()[1:], wanted[1:]) >= COSINE


@pytest.mark.parametrize("kind", ["full", "sliding and full"])
def test_the_cut_of_the_prompt_does_not_change_a_proposal(pair_of: PairOf, kind: str) -> None:
    pair = pair_of(**KINDS[kind])
    tokens = tokens_for(pair, 70)
    logits = []
    for width in (1, 5, 16):
        session, draft = pair.open()
        with session, draft:
            fill(session, draft, tokens, width)
            draft.propose([3])
            logits.append(draft.logits())
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_a_long_context_costs_a_sliding_layer_its_window_only(pair_of: PairOf) -> None:
    pair = pair_of(layers=3, window=24)
    session, draft = pair.open(4096)
    with session, draft:
        by_window = dict(zip(draft._windows.windows, draft._windows.capacities))
        assert by_window[24] <= 24 + 16 + 32
        assert by_window[0] >= 4096
        tokens = tokens_for(pair, 700)
        fill(session, draft, tokens, 512)
        oracle = DraftReference(pair.draft_path, pair.target_path)
        draft.propose([7])
        wanted = oracle.propose_logits(oracle_features(pair, tokens, oracle), 7, len(tokens), 16)
        # Prefill's kernels sum in another order over 700 tokens of a random, sensitive model.
        assert cosine(draft.logits()[1:], wanted[1:]) >= COSINE


def test_proposing_again_gives_the_same_bits(pair_of: PairOf) -> None:
    pair = pair_of(layers=3, window=24)
    session, draft = pair.open()
    with session, draft:
        fill(session, draft, tokens_for(pair, 40), 16)
        draft.propose([5])
        first = draft.logits()
        draft.propose([6])
        assert not np.array_equal(draft.logits(), first)
        draft.propose([5], 3)  # a block of fewer rows
        draft.propose([5])
        assert np.array_equal(draft.logits(), first)


@pytest.mark.parametrize(("count", "rows"), [(1, 2), (2, 4), (3, 4), (7, 8), (8, 16)])
def test_a_short_block_is_for_a_cpu_and_leaves_nothing_behind(pair_of: PairOf, count: int, rows: int) -> None:
    """On CUDA: tests/models/test_cuda.py."""
    pair = pair_of(layers=3, window=24)
    tokens = tokens_for(pair, 40)
    oracle = DraftReference(pair.draft_path, pair.target_path)
    features = oracle_features(pair, tokens, oracle)
    session, draft = pair.open()
    with session, draft:
        fill(session, draft, tokens, 16)
        for _ in range(2):
            proposal = draft.propose([5], count)
            got = draft.logits()
            assert (len(proposal), len(got)) == (count + 1, rows)
            assert cosine(got[1:], oracle.propose_logits(features, 5, 40, rows)[1:]) >= COSINE
            assert proposal.ids[1:].tolist() == got[1 : count + 1].argmax(axis=1).tolist()
            draft.propose([5])
            assert cosine(draft.logits()[1:], oracle.propose_logits(features, 5, 40, 16)[1:]) >= COSINE


def test_the_override_of_causality_reaches_every_layer(pair_of: PairOf) -> None:
    pair = pair_of(layers=3, window=24)
    tokens = tokens_for(pair, 30)
    for causal in (True, False):
        oracle = DraftReference(pair.draft_path, pair.target_path, causal=causal)
        wanted = oracle.propose_logits(oracle_features(pair, tokens, oracle), 7, 30, 16)
        with load_draft(pair.draft_path, pair.model, causal=causal) as other:
            session = Session(pair.model, 256, "f32", "f32", capture=other.config.taps)
            draft = DraftSession(other, session)
            with session, draft:
                fill(session, draft, tokens, 16)
                draft.propose([7])
                assert cosine(draft.logits()[1:], wanted[1:]) >= COSINE


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_the_target_must_capture_what_the_draft_reads(pair_of: PairOf) -> None:
    pair = pair_of()
    with (
        Session(pair.model, 64, capture=(0,)) as session,
        pytest.raises(ConfigError, match=r"captures layers \[0\], the draft needs"),
    ):
        DraftSession(pair.draft, session)


@pytest.mark.parametrize(("anchor", "count"), [(-1, None), (320, None), (1, 0), (1, 16), (1, -3)])
def test_a_proposal_outside_the_limits_is_refused(pair_of: PairOf, anchor: int, count: int | None) -> None:
    pair = pair_of()
    session, draft = pair.open(64)
    with session, draft:
        fill(session, draft, [1, 2, 3], 16)
        with pytest.raises((ConfigError, ShapeError), match=r"count is|token id"):
            draft.propose([anchor], count)
        draft.propose([1])


def test_a_draft_that_is_behind_its_target_says_so(pair_of: PairOf) -> None:
    pair = pair_of()
    session, draft = pair.open(64)
    with session, draft:
        with pytest.raises(StateError, match="nothing has been proposed yet"):
            draft.logits()
        session.forward([1, 2, 3])
        with pytest.raises(StateError, match="3 pending; commit to both first"):
            draft.propose([1])
        with pytest.raises(StateError, match=r"commit\(3\): the draft holds 0 positions and the target 0"):
            draft.commit(3)
        session.commit(3)
        with pytest.raises(StateError, match="the draft holds 0 positions, the target 3"):
            draft.propose([1])
        draft.commit(3)
        session.forward([4] * 17)
        session.commit(17)
        with pytest.raises(StateError, match=r"3 rows kept earlier still wait; call flush"):
            draft.commit(17)


def test_rows_wait_over_several_forwards_for_one_injection(pair_of: PairOf) -> None:
    """Steps of any width between proposals; more than 16 rows, and more than the ring of features holds."""
    pair, widths = pair_of(), [1, 1, 2, 1, 16, 1, 1, 16, 3] + [1] * 20
    tokens, proposals = tokens_for(pair, sum(widths)), []
    for at_once in (False, True):
        session, draft = pair.open(128, chunk=32)
        with session, draft:
            done = 0
            for width in widths:
                session.forward(tokens[done : done + width])
                session.commit(width)
                draft.commit(width)
                done += width
                if at_once:
                    draft.flush()
            draft.propose([7])
            proposals.append(draft.logits())
    assert np.array_equal(*proposals)


def test_a_closed_draft_session_says_so(pair_of: PairOf) -> None:
    pair = pair_of()
    session, draft = pair.open(64)
    draft.close()
    draft.close()
    for call in (lambda: draft.propose([1]), lambda: draft.commit(0), draft.reset):
        with pytest.raises(SessionClosed):
            call()
    session.close()


@pytest.mark.parametrize(("what", "count"), [("commit", 20), ("flush", 10)])  # 20 rows are injected at once
def test_a_draft_session_is_not_closed_in_the_middle_of_a_call(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch, what: str, count: int
) -> None:
    pair = pair_of()
    session, draft = pair.open(64)
    entered, seen = threading.Event(), []

    def follow_slowly() -> None:
        """Part of each call, between its check and its work on the device."""
        entered.set()
        time.sleep(0.2)
        seen.append(draft.closed)
        assert not draft.closed

    with session:
        session.forward(tokens_for(pair, count))
        session.commit(count)
        if what == "flush":
            draft.commit(count)
        monkeypatch.setattr(draft, "_follow", follow_slowly)
        worker = threading.Thread(target=getattr(draft, what), args=(count,) if what == "commit" else ())
        worker.start()
        entered.wait(20)
        draft.close()
        worker.join()
    assert seen == [False]
    assert draft.closed


def test_what_a_closed_draft_session_proposed_is_gone(pair_of: PairOf) -> None:
    pair = pair_of()
    session, draft = pair.open(64)
    with session:
        proposal = draft.propose([1])
        session.forward(proposal)  # from now on there is a graph that reads it
        session.commit(0)
        draft.close()
        for call in (draft.logits, lambda: proposal.ids, lambda: session.forward(proposal)):
            with pytest.raises(SessionClosed, match="draft session"):
                call()
        session.forward([1])


def test_a_session_of_a_closed_model_or_draft_says_so(pair_of: PairOf) -> None:
    pair = pair_of()
    model = load_model(pair.target_path, "cpu", threads=1)
    draft = load_draft(pair.draft_path, model)
    session = Session(model, 64, capture=draft.config.taps)
    drafting = DraftSession(draft, session)
    drafting.propose([1])
    draft.close()
    for call in (lambda: drafting.propose([1]), drafting.logits, drafting.snapshot):
        with pytest.raises(SessionClosed, match="the draft or the model of this draft session was closed"):
            call()
    output = session.forward([1])
    model.close()
    for call in (lambda: output.logits, lambda: session.commit(1), session.snapshot):
        with pytest.raises(SessionClosed, match=r"(the model of this session|device 'cpu') was closed.*load"):
            call()
    drafting.close()
    session.close()


def test_a_draft_belongs_to_the_model_that_it_was_loaded_for(pair_of: PairOf) -> None:
    pair = pair_of()
    with load_model(pair.target_path, "cpu", threads=1) as other:
        session = Session(other, 64, capture=pair.draft.config.taps)
        with session, pytest.raises(ConfigError, match="another model than the session's"):
            DraftSession(pair.draft, session)


def test_a_forward_of_which_features_were_overwritten_cannot_be_kept(pair_of: PairOf) -> None:
    pair = pair_of()
    session, draft = pair.open(256, chunk=32)
    tokens = tokens_for(pair, 33)
    with session, draft:
        session.forward(tokens, "none")
        session.commit(33)
        with pytest.raises(StateError, match=r"commit\(33\): the target has the features of only its last 32 rows"):
            draft.commit(33)
        session.reset()
        session.forward(tokens[:32], "none")
        session.commit(32)
        draft.commit(32)
        draft.propose([1])
