"""Whatever runs beside it, a session of a pool computes the bits that it computes alone."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from pydflash import SessionPool
from pydflash.decode import Sampler, SamplingParams, autoregressive, speculative
from pydflash.drafts import DraftSession
from pydflash.errors import (
    ConfigError,
    ContextFull,
    DeviceError,
    NothingPending,
    OutOfMemory,
    SessionClosed,
    ShapeError,
    StateError,
)
from pydflash.kv_format import CACHE_TYPES
from pydflash.limits import EXACT_ROWS, PAGE, STEP_ROWS
from pydflash.models import Model
from pydflash.native.traits import CUDA
from pydflash.runtime import Session
from tests.helpers import Pair

Load = Callable[..., Model]
PairOf = Callable[..., Pair]
Ids = list[int]


def draw(model: Model, count: int, rng: np.random.Generator) -> Ids:
    ids: Ids = rng.integers(0, model.config.vocab, count).tolist()
    return ids


def alone(model: Model, max_context: int, **settings: Any) -> Session:
    """A session in a pool of its own."""
    pool = SessionPool(model, max_sequences=1, cache_tokens=max_context, max_context=max_context, **settings)
    return pool.session()


class Twin:
    """A session of a pool and one alone, to which the same happens."""

    def __init__(self, pool: SessionPool, **settings: Any) -> None:
        self.pooled = pool.session()
        self.alone = alone(pool.model, pool.max_context, **settings)

    def read(self, ids: Ids) -> None:
        for session in (self.pooled, self.alone):
            for _ in session.prefill(ids):
                pass

    def commit(self, n: int) -> None:
        self.pooled.commit(n)
        self.alone.commit(n)

    def close(self) -> None:
        self.pooled.close()
        self.alone.close()


def cut(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """``total`` rows for ``parts`` sessions: 1 to 16 each."""
    counts = [1] * parts
    while sum(counts) < total:
        counts[int(rng.choice([i for i, n in enumerate(counts) if n < EXACT_ROWS]))] += 1
    return counts


def step_of(pool: SessionPool, twins: list[Twin], counts: list[int], rng: np.random.Generator, head: Any) -> bool:
    """A step of these sessions and the same of each alone, of which any number of rows is kept; whether all bits are
    equal."""
    given = [draw(pool.model, count, rng) for count in counts]
    outputs = pool.forward([(twin.pooled, ids) for twin, ids in zip(twins, given)], head)
    equal = True
    for twin, ids, output in zip(twins, given, outputs):
        alone = twin.alone.forward(ids, head)
        assert (output.count, twin.pooled.pending) == (len(ids), len(ids))
        if head != "none":
            equal &= np.array_equal(output.logits, alone.logits) and np.array_equal(output.argmax, alone.argmax)
        twin.commit(int(rng.integers(0, len(ids) + 1)))
    return equal


@pytest.mark.parametrize(
    ("name", "types", "settings"),
    [
        *(("odd", "f32", {"cache_k": k, "cache_v": v}) for k, v in zip(CACHE_TYPES, reversed(CACHE_TYPES))),
        ("gqa6", "q4_k_m", {"cache_k": "q8_0", "cache_v": "q4_0", "k_rotation": "signed-128"}),
        ("ratio3", "q8_0", {"cache_k": "q4_0", "cache_v": "q4_0", "v_rotation": "hadamard-64"}),
        ("all_attention", "f16", {}),
        ("all_recurrent", "bf16", {}),
        ("moe", "q4_k_m", {}),
        ("odd", "f32", {"fused": False}),
    ],
    ids=str,
)
def test_rows_of_several_sequences_have_the_bits_of_each_alone(
    model_of: Load, name: str, types: str, settings: dict[str, Any]
) -> None:
    model, rng = model_of(name, types), np.random.default_rng(5)
    with SessionPool(model, max_sequences=16, cache_tokens=16 * 512, max_context=512, **settings) as pool:
        twins = [Twin(pool, **settings) for _ in range(16)]
        for twin in twins[::3]:
            twin.read(draw(model, int(rng.integers(1, 300)), rng))
        for total in (1, 2, 15, 16, 17, 31, 33, 48, 63, 64):
            parts = int(rng.integers(-(-total // EXACT_ROWS), min(total, 16) + 1))
            chosen = [twins[i] for i in rng.permutation(16)[:parts]]
            head = ("all", "last", "none")[int(rng.integers(0, 3))] if total < 64 else "all"
            assert step_of(pool, chosen, cut(total, parts, rng), rng, head), (total, parts)
        assert step_of(pool, twins, cut(40, 16, rng), rng, "all")
        for twin in twins:
            twin.close()


def test_every_number_of_rows_and_of_sequences(model_of: Load) -> None:
    model, rng = model_of("odd"), np.random.default_rng(6)
    with SessionPool(model, max_sequences=16, cache_tokens=16 * PAGE * 3, max_context=3 * PAGE) as pool:
        twins = [Twin(pool) for _ in range(16)]
        for total in range(1, STEP_ROWS + 1):
            parts = min(max(1 + total % 16, -(-total // EXACT_ROWS)), total)
            chosen = [twins[i] for i in rng.permutation(16)[:parts]]
            assert step_of(pool, chosen, cut(total, parts, rng), rng, "all"), (total, parts)
        for twin in twins:
            twin.close()


def test_long_texts_whose_pages_lie_anywhere(model_of: Load) -> None:
    """Sessions are opened and closed in random order until no one's pages lie in order."""
    model, rng = model_of("odd"), np.random.default_rng(7)
    settings = {"cache_k": "q8_0", "cache_v": "f16"}
    with SessionPool(model, max_sequences=6, cache_tokens=36 * PAGE, max_context=3000, **settings) as pool:
        twins = [Twin(pool, **settings) for _ in range(6)]
        for _ in range(12):
            i = int(rng.integers(0, 6))
            twins[i].close()
            twins[i] = Twin(pool, **settings)
            for twin in (twins[i], twins[int(rng.integers(0, 6))]):
                room = min(pool._shared.memory.pages.free * PAGE, 2900 - twin.alone.length)
                if room > 1:
                    twin.read(draw(model, int(rng.integers(1, min(room, 700))), rng))
        pages = [twin.pooled._memory.pages for twin in twins]
        assert any(np.diff(of_one).min(initial=1) < 0 for of_one in pages)
        assert max(twin.alone.length for twin in twins) > 4 * PAGE
        for _ in range(4):
            assert step_of(pool, twins, cut(24, 6, rng), rng, "all")
        for twin in twins:
            twin.close()


def test_a_page_entry_that_is_wrong_by_one_is_seen(model_of: Load) -> None:
    """What the tests above compare depends on every entry of the page tables."""
    model, rng = model_of("odd"), np.random.default_rng(8)
    with SessionPool(model, max_sequences=2, cache_tokens=8 * PAGE, max_context=4 * PAGE) as pool:
        twins = [Twin(pool), Twin(pool)]
        for twin in twins:
            twin.read(draw(model, 600, rng))
        assert step_of(pool, twins, [3, 5], rng, "all")
        tables = pool._shared.memory.tables
        assert tables is not None
        for entry in range(3):
            table = np.empty(tables.shape, np.int32)
            model.backend.read(tables, table)
            right = table.copy()
            table[1, entry] ^= 1
            model.backend.write(tables, table)
            assert not step_of(pool, twins, [3, 5], rng, "all"), entry
            model.backend.write(tables, right)
        for twin in twins:
            twin.close()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_sessions_give_everything_back(model_of: Load) -> None:
    model, rng = model_of("odd"), np.random.default_rng(9)
    with SessionPool(model, max_sequences=4, cache_tokens=8 * PAGE, max_context=2 * PAGE) as pool:
        open_ones: list[Session] = []
        for n in range(10_000):
            if len(open_ones) == 4 or (open_ones and rng.integers(0, 2)):
                open_ones.pop(int(rng.integers(0, len(open_ones)))).close()
            open_ones.append(pool.session())
            if n % 50 == 0:
                open_ones[-1].forward([1, 2, 3], "none")
            if n == 1000:
                gc.collect()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for session in open_ones:
            session.close()
        memory = pool._shared.memory
        assert (memory.free_slots, memory.pages.free) == (4, 8)
        gc.collect()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


def test_a_reset_gives_pages_back(model_of: Load) -> None:
    with SessionPool(model_of("odd"), max_sequences=2, cache_tokens=2 * PAGE, max_context=2 * PAGE) as pool:
        one, other = pool.session(), pool.session()
        one.forward([1] * (PAGE + 1), "none")
        one.commit(PAGE + 1)
        with pytest.raises(OutOfMemory, match="0 of 2 pages free and 1 more"):
            other.forward([1])
        assert (other.length, other.pending) == (0, 0)
        one.reset()
        other.forward([1])
        other.commit(1)


def test_a_prompt_for_which_pages_lack_is_refused_whole(model_of: Load) -> None:
    with SessionPool(model_of("odd"), max_sequences=2, cache_tokens=3 * PAGE, max_context=3 * PAGE, chunk=32) as pool:
        one, other = pool.session(), pool.session()
        list(one.prefill([1] * 300))
        with pytest.raises(OutOfMemory, match="1 of 3 pages free and 2 more"):
            list(other.prefill([1] * 300))
        assert other.length == 0
        list(other.prefill([1] * 200))


def test_the_sizes_are_those_that_were_asked_for(model_of: Load) -> None:
    model = model_of("odd")
    with SessionPool(model, max_sequences=3, cache_tokens=1000, max_context=600) as pool:
        assert (pool.max_sequences, pool.cache_tokens, pool.max_context) == (3, 4 * PAGE, 600)
        sizes = pool.sizes()
    with SessionPool(model, max_sequences=3, cache_tokens=1000, max_context=600, capture=(0, 1)) as pool:
        assert pool.sizes().keys() - sizes.keys() == {"captured features"}
        assert {"delta-net state", "rollback tape", "K/V cache", "page tables"} == sizes.keys()


def test_a_pool_takes_no_more_pages_than_its_sessions_could_use(model_of: Load) -> None:
    with SessionPool(model_of("odd"), max_sequences=2, cache_tokens=100_000, max_context=600) as pool:
        assert pool.cache_tokens == 2 * 3 * PAGE


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_without_sizes_a_quarter_of_the_free_memory_is_used(
    model_of: Load, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """``share``: of what 16 sequences of full length would take."""
    model = model_of("odd")
    with SessionPool(model, max_sequences=16, cache_tokens=16 * 1024, max_context=1024) as full:
        needed = sum(full.sizes().values())
    real = model.backend.memory()
    with monkeypatch.context() as patch:
        patch.setattr(model.backend, "memory", lambda: (int(4 * share * needed), real[1]))
        patch.setattr(model.backend, "check_free", lambda *_: None)
        with SessionPool(model, max_context=1024) as pool:
            taken = sum(pool.sizes().values())
            assert 1 <= pool.max_sequences <= 16
            assert pool.cache_tokens >= 1024
            assert taken <= max(share * needed, needed / 15)
            assert taken >= 0.8 * share * needed


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_k": "q4_0", "cache_v": "q8_0"}, {"cache_k": "q8_0", "cache_v": "bf16", "k_rotation": "none"}],
    ids=str,
)
def test_a_snapshot_goes_from_a_pool_to_a_session_alone_and_back(model_of: Load, settings: dict[str, Any]) -> None:
    model, rng = model_of("odd"), np.random.default_rng(10)
    ids, more = draw(model, 600, rng), draw(model, 7, rng)
    with ExitStack() as undo:
        pool = undo.enter_context(
            SessionPool(model, max_sequences=3, cache_tokens=12 * PAGE, max_context=4 * PAGE, **settings)
        )
        twin, beside = Twin(pool, **settings), pool.session()
        for start in (0, 250, 500):  # the two take turns, so that no one's pages lie in order
            beside.forward(draw(model, 200, rng), "none")
            beside.commit(200)
            twin.read(ids[start : start + 250])
        assert step_of(pool, [twin], [9], rng, "all")  # leaves rows to replay
        assert sorted(twin.pooled._memory.pages) != list(range(3))
        taken, alone = twin.pooled.snapshot(), twin.alone.snapshot()
        assert (taken.length, taken.replay) == (alone.length, alone.replay)
        for name, values in alone.arrays.items():
            assert np.array_equal(taken.arrays[name], values), name
        third = pool.session()
        third.restore(alone)
        twin.alone.reset()
        twin.alone.restore(taken)
        wanted = twin.pooled.forward(more, "all").logits
        assert np.array_equal(third.forward(more, "all").logits, wanted)
        assert np.array_equal(twin.alone.forward(more, "all").logits, wanted)
        twin.close()


def test_a_snapshot_for_which_pages_lack_changes_nothing(model_of: Load) -> None:
    model = model_of("odd")
    with SessionPool(model, max_sequences=2, cache_tokens=3 * PAGE, max_context=3 * PAGE) as pool:
        one, other = pool.session(), pool.session()
        list(one.prefill([1] * 300))
        snapshot = one.snapshot()
        list(other.prefill([2] * 10))
        with pytest.raises(OutOfMemory):
            other.restore(snapshot)
        with Session(model, 256) as alone:
            list(alone.prefill([2] * 10))
            assert np.array_equal(alone.forward([3]).logits, other.forward([3]).logits)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_an_output_outlives_the_steps_of_other_sessions(model_of: Load) -> None:
    model = model_of("odd")
    with SessionPool(model, max_sequences=3, cache_tokens=3 * PAGE, max_context=PAGE) as pool:
        one, two, three = (pool.session() for _ in range(3))
        first, second = one.forward([5]), two.forward([6])
        third = pool.forward([(three, [7])])[0]
        with Session(model, PAGE) as alone:
            for token, output in ((5, first), (6, second), (7, third)):
                assert np.array_equal(output.logits, alone.forward([token]).logits)
                assert np.array_equal(output.argmax, output.logits.argmax(-1))
                alone.commit(0)
        one.commit(1)
        unread = one.forward([8])
        one.commit(0)
        one.forward([9])
        with pytest.raises(StateError, match="earlier forward"):
            _ = unread.logits


def test_an_output_of_a_step_without_a_head_has_nothing(model_of: Load) -> None:
    with SessionPool(model_of("odd"), max_sequences=2, cache_tokens=2 * PAGE, max_context=PAGE) as pool:
        for output in pool.forward([(pool.session(), [1]), (pool.session(), [2, 3])], "none"):
            with pytest.raises(StateError, match="logits='none'"):
                _ = output.logits


def test_graphs_are_few(model_of: Load) -> None:
    """One for each bucket of rows and of sequences, wherever the sequences stand."""
    rng = np.random.default_rng(11)
    with SessionPool(model_of("odd"), max_sequences=5, cache_tokens=40 * PAGE, max_context=8 * PAGE) as pool:
        sessions = [pool.session() for _ in range(5)]
        for length in (1, 300, 700):
            for session in sessions:
                list(session.prefill([1] * length))
            for count in (3, 4):
                for session, _ in zip(sessions, pool.forward([(s, [1] * 2) for s in sessions[:count]])):
                    session.commit(int(rng.integers(0, 3)))
        runner = pool._shared.runner
        assert len([step for step in runner.narrow if step.graph.exact_rows == STEP_ROWS]) == 2  # 1 row of 1, 8 of 4
        assert len(list(runner.wide)) == 3  # 300 rows in 512, of 700 the first 512 without a head and 188 in 256


# --- threads ----------------------------------------------------------------------------------------------------------


def test_two_threads_with_a_session_each(model_of: Load) -> None:
    model = model_of("odd")
    rng = np.random.default_rng(12)
    texts = [draw(model, 120, rng) for _ in range(2)]
    found: list[list[Any]] = [[], []]

    def run(session: Session, text: Ids, rows: list[Any]) -> None:
        for start in range(0, 120, 4):
            rows.append(session.forward(text[start : start + 4], "all").logits)
            session.commit(4)

    with SessionPool(model, max_sequences=2, cache_tokens=2 * PAGE, max_context=PAGE) as pool:
        threads = [threading.Thread(target=run, args=(pool.session(), texts[i], found[i])) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for text, rows in zip(texts, found):
        wanted: list[Any] = []
        with Session(model, PAGE) as alone:
            run(alone, text, wanted)
        assert np.array_equal(np.concatenate(rows), np.concatenate(wanted))


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(model_of: Load) -> Iterator[SessionPool]:
    with SessionPool(model_of("odd"), max_sequences=6, cache_tokens=6 * PAGE, max_context=PAGE) as pool:
        yield pool


def test_a_refused_step_changes_no_session(pool: SessionPool) -> None:
    sessions = [pool.session() for _ in range(6)]
    one, two = sessions[:2]
    with Session(pool.model, PAGE) as alone:
        for rows, error, words in (
            ([], ShapeError, "at least one session"),
            ([(one, [1]), (two, [])], ShapeError, "input is empty"),
            ([(one, [1]), (two, [10**6])], ShapeError, "outside the vocabulary"),
            ([(one, [1]), (two, [1] * 17)], ShapeError, "18 rows, 17 of one session; there can be 64 in all and 16"),
            ([(s, [1] * 16) for s in sessions], ShapeError, "96 rows, 16 of one session"),
            ([(one, [1]), (one, [2])], StateError, "given twice"),
            ([(one, [1]), (alone, [2])], StateError, "another pool"),
            ([(one, [1]), (two, [1] * 300)], ContextFull, "0 of 256 positions are used and 300 more"),
        ):
            with pytest.raises(error, match=words):
                pool.forward(rows)  # type: ignore[arg-type]
            assert [session.pending for session in sessions] == [0] * 6
    with pytest.raises(ConfigError, match="'last', 'all', 'none'"):
        pool.forward([(one, [1])], "some")  # type: ignore[arg-type]
    two.forward([1])
    with pytest.raises(StateError, match="1 positions are pending"):
        pool.forward([(one, [1]), (two, [2])])
    with pytest.raises(NothingPending):
        one.commit(1)


def test_a_full_pool_says_so(pool: SessionPool) -> None:
    sessions = [pool.session() for _ in range(6)]
    with pytest.raises(StateError, match="all 6 sequences of this pool are open; close one"):
        pool.session()
    sessions[3].close()
    sessions[3].close()
    pool.session().forward([1])
    with pytest.raises(SessionClosed, match="open a new one"):
        pool.forward([(sessions[0], [1]), (sessions[3], [1])])
    assert sessions[0].pending == 0


def test_a_session_that_nobody_closed_makes_room(pool: SessionPool) -> None:
    for _ in range(20):
        pool.session().forward([1], "none")
        gc.collect()


@pytest.mark.parametrize("context", [0, -1, PAGE + 1])
def test_a_session_is_no_longer_than_its_pool_allows(pool: SessionPool, context: int) -> None:
    with pytest.raises(ConfigError, match=f"max_context is {context}; allowed: an integer, 1 to 256"):
        pool.session(context)


def test_a_shorter_session_ends_where_it_was_told_to(pool: SessionPool) -> None:
    session = pool.session(10)
    session.forward([1] * 10)
    session.commit(10)
    with pytest.raises(ContextFull, match="10 of 10"):
        session.forward([1])


@pytest.mark.parametrize("name", ["max_sequences", "cache_tokens"])
@pytest.mark.parametrize("value", [0, -3, 1 << 60, 2.5, "4"])
def test_sizes_that_cannot_be_are_refused(model_of: Load, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*allowed: an integer, 1 to"):
        SessionPool(model_of("odd"), **{name: value})


def test_a_closed_pool_ends_its_sessions(model_of: Load) -> None:
    pool = SessionPool(model_of("odd"), max_sequences=2, cache_tokens=2 * PAGE, max_context=PAGE)
    session = pool.session()
    output = session.forward([1])
    pool.close()
    pool.close()
    assert session.closed
    for call in (lambda: session.forward([1]), pool.session, lambda: pool.forward([(session, [1])])):
        with pytest.raises(SessionClosed, match="closed; open a new one"):
            call()
    with pytest.raises(SessionClosed):
        _ = output.logits
    session.close()


def test_a_device_without_pages_takes_one_session(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("odd")
    monkeypatch.setattr(model.backend, "traits", CUDA)
    with pytest.raises(DeviceError, match="open a Session for each"):
        SessionPool(model, max_sequences=2, cache_tokens=2 * PAGE, max_context=PAGE)
    with SessionPool(model, max_context=PAGE) as pool:
        assert pool.max_sequences == 1


# --- drafts -----------------------------------------------------------------------------------------------------------


def greedy(model: Model) -> Sampler:
    return Sampler(SamplingParams(), model.config.vocab)


def spoken(pair: Pair, prompt: Ids, count: int) -> Ids:
    with Session(pair.model, PAGE * 2, "f32", "f32") as session:
        steps = autoregressive(session, prompt, greedy(pair.model), max_tokens=count)
        return [token for step in steps for token in step.tokens]


def test_speculation_in_turns_gives_what_each_says_alone(pair_of: PairOf) -> None:
    pair, rng = pair_of("gqa6", "q8_0", window=64), np.random.default_rng(13)
    prompts = [draw(pair.model, n, rng) for n in (3, 40, 16, 200)]
    settings = {"cache_k": "f32", "cache_v": "f32", "capture": pair.draft.taps}
    with SessionPool(pair.model, max_sequences=4, cache_tokens=8 * PAGE, max_context=2 * PAGE, **settings) as pool:
        running = {}
        for i, prompt in enumerate(prompts):
            session = pool.session()
            draft = DraftSession(pair.draft, session)
            running[i] = speculative(session, draft, prompt, greedy(pair.model), max_tokens=30)
        texts: list[Ids] = [[] for _ in prompts]
        while running:
            i = int(rng.choice(list(running)))
            step = next(running[i], None)
            if step is None:
                del running[i]
            else:
                texts[i] += step.tokens
    assert texts == [spoken(pair, prompt, 30) for prompt in prompts]


def test_proposals_verified_together_give_what_each_says_alone(pair_of: PairOf) -> None:
    """Propose for each, verify all in one step, commit to each; some proposals are right, from the answer itself."""
    pair, rng = pair_of("gqa6", "q8_0", window=64), np.random.default_rng(14)
    prompts = [draw(pair.model, n, rng) for n in (5, 70, 33)]
    answers = [spoken(pair, prompt, 60) for prompt in prompts]
    settings = {"cache_k": "f32", "cache_v": "f32", "capture": pair.draft.taps}
    with SessionPool(pair.model, max_sequences=3, cache_tokens=6 * PAGE, max_context=2 * PAGE, **settings) as pool:
        sessions = [pool.session() for _ in prompts]
        drafts = [DraftSession(pair.draft, session) for session in sessions]
        texts = []
        for session, draft, prompt in zip(sessions, drafts, prompts):
            for output in session.prefill(prompt):
                draft.commit(output.count)
            texts.append([int(output.argmax[0])])
        while max(map(len, texts)) < 40:
            proposals = [d.propose([*p, *t], int(rng.integers(1, 16))).ids for d, p, t in zip(drafts, prompts, texts)]
            for proposal, answer, text in zip(proposals, answers, texts):
                right = int(rng.integers(0, len(proposal)))
                proposal[1 : right + 1] = answer[len(text) : len(text) + right]
            outputs = pool.forward(list(zip(sessions, proposals)), "all")
            for session, draft, text, proposal, output in zip(sessions, drafts, texts, proposals, outputs):
                wrong = np.flatnonzero(output.argmax[:-1] != proposal[1:])
                kept = int(wrong[0]) + 1 if len(wrong) else len(proposal)
                session.commit(kept)
                draft.commit(kept)
                text += output.argmax[:kept].tolist()
    assert texts == [answer[: len(text)] for text, answer in zip(texts, answers)]


def test_a_draft_beside_a_pooled_session_proposes_as_beside_one_alone(pair_of: PairOf) -> None:
    """However many rows wait for it, from wide and narrow steps, with another session's steps in between."""
    pair, rng = pair_of("equal", "f32", window=64), np.random.default_rng(15)
    settings = {"cache_k": "f32", "cache_v": "f32", "capture": pair.draft.taps}
    with SessionPool(pair.model, max_sequences=2, cache_tokens=4 * PAGE, max_context=2 * PAGE, **settings) as pool:
        twin, beside = Twin(pool, **settings), pool.session()
        drafts = [DraftSession(pair.draft, session) for session in (twin.pooled, twin.alone)]
        for count in (40, 3, 9, 16, 1, 1, 15, 16, 16, 7, 30, 2):
            ids, kept = draw(pair.model, count, rng), count if count > EXACT_ROWS else int(rng.integers(1, count + 1))
            if count > EXACT_ROWS:
                for draft in drafts:
                    draft.flush()
            for session, draft in zip((twin.pooled, twin.alone), drafts):
                session.forward(ids, "none")
                session.commit(kept)
                draft.commit(kept)
                beside.forward(draw(pair.model, 16, rng), "none")
                beside.commit(0)
            if count in (9, 1, 7, 2):
                one, other = (draft.propose([5], 15).ids for draft in drafts)
                assert np.array_equal(one, other)
                assert np.array_equal(*(draft.logits()[1:] for draft in drafts))
        for draft in drafts:
            draft.close()
        twin.close()


def test_features_that_another_wide_forward_has_overwritten_are_refused(pair_of: PairOf) -> None:
    pair = pair_of("equal", "f32", window=64)
    with SessionPool(
        pair.model, max_sequences=2, cache_tokens=2 * PAGE, max_context=PAGE, capture=pair.draft.taps
    ) as pool:
        one, other = pool.session(), pool.session()
        draft = DraftSession(pair.draft, one)
        one.forward([1] * 20, "none")
        other.forward([2] * 20, "none")
        one.commit(20)
        with pytest.raises(StateError, match="features of 20 rows were overwritten by a forward of another session"):
            draft.commit(20)
        draft.close()
