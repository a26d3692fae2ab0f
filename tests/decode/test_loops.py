"""Greedy decoding with a draft yields the bytes of decoding without one, whatever the draft proposes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, Stats, Step, autoregressive, collect, speculative
from pydflash.drafts import CycleCosts, DraftSession, ProposalLength, Proposer
from pydflash.errors import ConfigError, ContextFull, PydflashError, ShapeError, StateError
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena
from pydflash.runtime import DeviceProposal, Output, Session
from tests.helpers import Pair, run_chunks
from tests.reference.dflash import DraftReference, speculative_reference
from tests.reference.qwen35 import Array, Reference

PairOf = Callable[..., Pair]
Choose = Callable[[int, int], list[int]]
"""(position of the first proposed token, count) to the tokens to propose."""

VOCAB = 320
PROMPT: list[int] = np.random.default_rng(0).integers(0, VOCAB, 21).tolist()
TOKENS = 70


class Scripted:
    """A Proposer without a model: it proposes what it is told, and holds the loop to the protocol."""

    limit = 15

    def __init__(self, session: Session, choose: Choose) -> None:
        self._target, self._choose, self.length = session, choose, 0
        self._arena = Arena(session.model.backend, {"tokens": ((16,), GGMLType.I32)}, "a scripted proposal")
        self.made: list[int] = []

    def propose(self, history: Sequence[int], count: int) -> DeviceProposal:
        assert len(history) - 1 == self.length == self._target.length
        assert 1 <= count <= self.limit
        ids = np.zeros(16, np.int32)
        ids[: count + 1] = [history[-1], *self._choose(self.length + 1, count)]
        self._target.model.backend.write(self._arena["tokens"], ids)
        self.made.append(count)
        return DeviceProposal(self._arena, count + 1)

    def commit(self, n: int) -> None:
        self.length += n
        assert self.length == self._target.length

    def flush(self) -> None:
        pass

    def reset(self) -> None:
        self.length = 0

    def sizes(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._arena.close()


def greedy() -> Sampler:
    return Sampler(SamplingParams(), VOCAB)


def alone(pair: Pair, prompt: list[int], count: int, **options: object) -> list[int]:
    """The autoregressive text."""
    with Session(pair.model, 256, "f32", "f32") as session:
        steps = autoregressive(session, prompt, greedy(), max_tokens=count, **options)  # type: ignore[arg-type]
        return [token for step in steps for token in step.tokens]


def proposals(text: list[int]) -> dict[str, Choose]:
    """Drafts of every kind for a target that continues the prompt with ``text[len(PROMPT):]``."""
    known = text + [0] * 32
    rng = np.random.default_rng(4)

    def right(first: int, count: int) -> list[int]:
        return known[first : first + count]

    def until(row: int) -> Choose:
        def choose(first: int, count: int) -> list[int]:
            return [t if i < row else (t + 1) % VOCAB for i, t in enumerate(right(first, count))]

        return choose

    def alternating(first: int, count: int) -> list[int]:
        return until(int(rng.integers(0, 16)))(first, count)

    scripts: dict[str, Choose] = {
        "right": right,
        "wrong": until(0),
        "random": lambda first, count: rng.integers(0, VOCAB, count).tolist(),
        "right again after a mistake": lambda first, count: [
            t if i != 3 else (t + 7) % VOCAB for i, t in enumerate(right(first, count))
        ],
        "any prefix": alternating,
        "one token over and over": lambda first, count: [known[first]] * count,
    }
    return scripts | {f"right until row {k}": until(k) for k in (1, 2, 3, 4, 7, 8, 14)}


SCRIPTS = list(proposals([]))


def run(session: Session, draft: Proposer, prompt: list[int], count: int, **options: object) -> tuple[list[int], Stats]:
    return collect(speculative(session, draft, prompt, greedy(), max_tokens=count, **options))  # type: ignore[arg-type]


def check_stats(stats: Stats, tokens: list[int]) -> None:
    """The counters that say the same thing twice agree."""
    assert stats.tokens == len(tokens)
    assert stats.steps == len(stats.trace)
    assert stats.accepted == sum(stats.trace) == sum(stats.accepted_per_position)
    assert stats.drafted == sum(stats.drafted_per_position)
    assert stats.tokens == 1 + stats.accepted + stats.steps
    assert all(a <= d for a, d in zip(stats.accepted_per_position, stats.drafted_per_position))
    assert tuple(sorted(stats.accepted_per_position, reverse=True)) == stats.accepted_per_position
    if stats.steps:
        assert stats.acceptance_length == pytest.approx((stats.tokens - 1) / stats.steps)
        parts = stats.draft_seconds + stats.verify_seconds + stats.accept_seconds
        assert stats.decode_seconds == pytest.approx(parts, rel=1e-6)
    assert stats.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("name", "types", "k", "v"), [("equal", "f32", "f32", "f32"), ("odd", "q8_0", "q4_0", "q8_0")])
def test_any_draft_gives_the_autoregressive_text(
    pair_of: PairOf, name: str, types: str, k: str, v: str, script: str
) -> None:
    pair = pair_of(name, types)
    with Session(pair.model, 256, k, v) as plain:
        wanted = [t for s in autoregressive(plain, PROMPT, greedy(), max_tokens=TOKENS) for t in s.tokens]
    choose = proposals(PROMPT + wanted)[script]
    with Session(pair.model, 256, k, v) as session:
        draft = Scripted(session, choose)
        tokens, stats = run(session, draft, PROMPT, TOKENS)
        assert tokens == wanted
        check_stats(stats, wanted)
        assert session.length == len(PROMPT) + TOKENS - 1
        if script == "right":
            assert stats.trace == (15, 15, 15, 15, 4)
            assert stats.acceptance_length == (TOKENS - 1) / 5
        if script == "wrong":
            assert set(stats.trace) == {0}
        draft.close()


@pytest.mark.parametrize(("count", "drafted"), [(16, 14), (17, 15), (18, 15), (19, 16), (20, 17)])
def test_nothing_is_proposed_for_the_place_of_the_last_bonus_token(pair_of: PairOf, count: int, drafted: int) -> None:
    pair = pair_of()
    wanted = alone(pair, PROMPT, TOKENS)
    with Session(pair.model, 256, "f32", "f32") as session:
        draft = Scripted(session, proposals(PROMPT + wanted)["right"])
        tokens, stats = run(session, draft, PROMPT, count)
        assert tokens == wanted[:count]
        assert (stats.drafted, stats.accepted, stats.fallback) == (drafted, drafted, None)
        check_stats(stats, wanted[:count])
        draft.close()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("draft_max", range(1, 16))
def test_every_draft_max_gives_the_autoregressive_text(pair_of: PairOf, draft_max: int, adaptive: bool) -> None:
    pair = pair_of()
    wanted = alone(pair, PROMPT, TOKENS)
    with Session(pair.model, 256, "f32", "f32") as session:
        draft = Scripted(session, proposals(PROMPT + wanted)["any prefix"])
        length = ProposalLength(CycleCosts()) if adaptive else None
        tokens, stats = run(session, draft, PROMPT, TOKENS, draft_max=draft_max, length=length)
        assert tokens == wanted
        assert max(draft.made) <= draft_max
        check_stats(stats, wanted)
        draft.close()


class OneHot:
    """The scripted draft as the reference of speculative decoding wants it: logits whose argmax is the script."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def features(self, hidden: dict[int, Array]) -> Array:
        return hidden[0]

    def propose_logits(self, _features: Array, _anchor: int, start: int, rows: int) -> Array:
        return np.eye(VOCAB)[[0, *self._choose(start + 1, rows - 1)]]


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in ("random", "any prefix")])
def test_accepted_lengths_are_those_of_the_algorithm(pair_of: PairOf, script: str) -> None:
    pair = pair_of()
    wanted = alone(pair, PROMPT, TOKENS)
    choose = proposals(PROMPT + wanted)[script]
    text, lengths = speculative_reference(Reference(pair.target_path), OneHot(choose), PROMPT, 40, 16)
    with Session(pair.model, 256, "f32", "f32") as session:
        draft = Scripted(session, choose)
        tokens, stats = run(session, draft, PROMPT, 40)
        assert tokens == text == wanted[:40]
        # The reference counts the last verify in full; the engine proposes no more than max_tokens leaves.
        assert [n + 1 for n in stats.trace[:-1]] == lengths[:-1]
        assert stats.trace[-1] + 1 <= lengths[-1]
        draft.close()


@pytest.mark.parametrize(
    "options",
    [{"layers": 2}, {"layers": 3, "window": 24}, {"layers": 2, "causal": True}, {"layers": 2, "layout": "fork"}],
    ids=str,
)
def test_a_random_draft_gives_the_text_and_the_accepted_lengths_of_the_oracles(
    pair_of: PairOf, options: dict[str, object]
) -> None:
    pair = pair_of(**options)
    draft_oracle = DraftReference(pair.draft_path, pair.target_path)
    text, lengths = speculative_reference(Reference(pair.target_path), draft_oracle, PROMPT, 24, 16)
    session, draft = pair.open()
    with session, draft:
        tokens, stats = run(session, draft, PROMPT, 24)
        assert tokens == text == alone(pair, PROMPT, 24)
        assert [n + 1 for n in stats.trace[:-1]] == lengths[:-1]


@pytest.mark.parametrize("chunk", [32, 64, 512])
def test_a_prompt_of_several_chunks_hands_every_feature_to_the_draft(pair_of: PairOf, chunk: int) -> None:
    pair = pair_of(layers=3, window=24)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()
    proposed = []
    for width in (16, chunk):
        session, draft = pair.open(chunk=chunk)
        with session, draft:
            if width == 16:
                for start in range(0, 100, 16):
                    draft.flush()
                    session.forward(prompt[start : start + 16], "none")
                    session.commit(len(prompt[start : start + 16]))
                    draft.commit(len(prompt[start : start + 16]))
            else:
                next(speculative(session, draft, prompt, greedy(), max_tokens=1))
            draft.propose([5])
            proposed.append(draft.logits()[1:])
    assert np.abs(proposed[0] - proposed[1]).max() < 1e-2 * proposed[0].std()


@pytest.mark.parametrize("speculate", [False, True])
def test_a_prompt_read_in_turns_with_another_sequence_changes_nothing(pair_of: PairOf, speculate: bool) -> None:
    """Another sequence of the same model is read and decoded in between, as two arms of ab are."""
    pair = pair_of(layers=3, window=24)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()
    (session, draft), (other, others_draft) = pair.open(chunk=32), pair.open(chunk=64)

    def steps(session: Session, draft: DraftSession, prompt: list[int]) -> Iterator[Step]:
        if speculate:
            return speculative(session, draft, prompt, greedy(), max_tokens=40)
        return autoregressive(session, prompt, greedy(), max_tokens=40)

    def read(session: Session, draft: DraftSession) -> Iterator[Step | int]:
        """The count of each chunk of the prompt but the last, then the steps."""
        head = (len(prompt) - 1) // session.chunk * session.chunk
        for output in session.prefill(prompt[:head]):
            draft.commit(output.count)
            yield output.count
        yield from steps(session, draft, prompt[head:])

    with session, draft, other, others_draft:
        whole = list(steps(session, draft, prompt))
        session.reset()
        draft.reset()
        found, beside = [], read(other, others_draft)
        for step in read(session, draft):
            found.append(step)
            next(beside, None)
        assert found[:3] == [32, 32, 32]
        seen = [step for step in found if isinstance(step, Step)]
        assert [(s.tokens, s.accepted, s.finish_reason) for s in seen] == [
            (s.tokens, s.accepted, s.finish_reason) for s in whole
        ]
        assert seen[-1].stats.trace == whole[-1].stats.trace


def test_every_step_carries_the_stats_of_its_moment(pair_of: PairOf) -> None:
    pair = pair_of(layers=3, window=24)
    session, draft = pair.open()
    with session, draft:
        steps = list(speculative(session, draft, PROMPT, greedy(), max_tokens=40))
    for count, step in enumerate(steps):
        check_stats(step.stats, [t for s in steps[: count + 1] for t in s.tokens])
        assert step.stats.trace == tuple(s.accepted for s in steps[1 : count + 1])
    assert [s.finish_reason for s in steps] == [None] * (len(steps) - 1) + ["length"]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_generation_is_cancelled_between_chunks_of_its_prompt(
    pair_of: PairOf, speculate: bool, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, cancel = pair_of(), threading.Event()
    prompt = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()
    forward, seen = Session.forward, []

    def counted(self: Session, *args: Any) -> Output:
        seen.append(len(args[0]))
        if len(seen) == chunks:
            cancel.set()
        return forward(self, *args)

    monkeypatch.setattr(Session, "forward", counted)
    session, draft = pair.open(chunk=32)
    with session, draft:
        if speculate:
            steps = list(speculative(session, draft, prompt, greedy(), cancel=cancel))
        else:
            steps = list(autoregressive(session, prompt, greedy(), cancel=cancel))
        assert seen == [32] * chunks
        assert [(s.tokens, s.finish_reason) for s in steps] == [((), "cancelled")]
        assert steps[0].stats.prompt_tokens == 32 * chunks


# --- cuts -------------------------------------------------------------------------------------------------------------


def continues_like_a_fresh_run(pair: Pair, session: Session, text: list[int]) -> None:
    """The session holds ``text`` but its last token, and goes on as one that never speculated."""
    assert session.length == len(text) - 1
    assert session.pending == 0
    with Session(pair.model, 256, "f32", "f32") as fresh:
        fresh.forward(PROMPT, "none")  # in one piece: a wide step need not be bit-equal to narrow ones
        fresh.commit(len(PROMPT))
        run_chunks(fresh, text[len(PROMPT) : -1], 16)
        follow = [text[-1], 5, 6]
        assert np.array_equal(session.forward(follow, "all").logits, fresh.forward(follow, "all").logits)
    session.commit(0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 18, 30])
@pytest.mark.parametrize("script", ["right", "right until row 4", "wrong"])
def test_max_tokens_cuts_exactly_inside_a_block(pair_of: PairOf, script: str, count: int) -> None:
    pair = pair_of()
    wanted = alone(pair, PROMPT, TOKENS)
    with Session(pair.model, 256, "f32", "f32") as session:
        draft = Scripted(session, proposals(PROMPT + wanted)[script])
        tokens, stats = run(session, draft, PROMPT, count)
        assert tokens == wanted[:count]
        check_stats(stats, wanted[:count])
        continues_like_a_fresh_run(pair, session, PROMPT + wanted[:count])
        draft.close()


@pytest.mark.parametrize("place", [0, 1, 2, 7, 15, 16, 17, 31, 40])
@pytest.mark.parametrize("script", ["right", "right until row 4", "wrong"])
def test_a_stop_token_cuts_exactly_inside_a_block(pair_of: PairOf, script: str, place: int) -> None:
    pair = pair_of()
    wanted = alone(pair, PROMPT, TOKENS)
    stop = wanted[place]
    end = wanted.index(stop) + 1
    assert alone(pair, PROMPT, TOKENS, stop_ids=frozenset([stop])) == wanted[:end]
    with Session(pair.model, 256, "f32", "f32") as session:
        draft = Scripted(session, proposals(PROMPT + wanted)[script])
        tokens, stats = run(session, draft, PROMPT, TOKENS, stop_ids=frozenset([stop, VOCAB + 5]))
        assert tokens == wanted[:end]
        check_stats(stats, wanted[:end])
        continues_like_a_fresh_run(pair, session, PROMPT + wanted[:end])
        draft.close()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_cancelling_leaves_a_session_that_goes_on(pair_of: PairOf, steps: int) -> None:
    pair = pair_of(layers=3, window=24)
    wanted = alone(pair, PROMPT, TOKENS)
    session, draft = pair.open()
    with session, draft:
        generator = speculative(session, draft, PROMPT, greedy())
        seen = [token for step in islice(generator, steps) for token in step.tokens]
        generator.close()
        assert seen == wanted[: len(seen)]
        assert draft.length == session.length
        continues_like_a_fresh_run(pair, session, PROMPT + seen)
        # The same session takes the text up again, in the middle of a sequence.
        more, _ = run(session, draft, seen[-1:], 20)
        assert more == wanted[len(seen) : len(seen) + 20]


@pytest.mark.parametrize("room", range(1, 20))
def test_a_block_larger_than_the_context_left_fills_it_exactly(pair_of: PairOf, room: int) -> None:
    pair = pair_of()
    context = len(PROMPT) + room
    with Session(pair.model, context, "f32", "f32") as plain:
        wanted = [t for s in autoregressive(plain, PROMPT, greedy()) for t in s.tokens]
        assert plain.length == context
    assert len(wanted) == room + 1
    with Session(pair.model, context, "f32", "f32") as session:
        draft = Scripted(session, proposals(PROMPT + wanted)["right until row 4"])
        steps = list(speculative(session, draft, PROMPT, greedy()))
        assert [t for s in steps for t in s.tokens] == wanted
        assert [s.finish_reason for s in steps] == [None] * (len(steps) - 1) + ["context"]
        assert session.length == context
        draft.close()


def test_speculation_that_has_no_room_says_so(pair_of: PairOf) -> None:
    pair = pair_of()
    session, draft = pair.open(len(PROMPT) + 1)
    with session, draft:
        tokens, stats = collect(speculative(session, draft, PROMPT, greedy()))
        assert len(tokens) == 2
        assert stats.fallback is not None
        assert "context" in stats.fallback
        assert stats.drafted == 0


def test_a_full_context_ends_a_real_pair_as_it_ends_the_target_alone(pair_of: PairOf) -> None:
    pair = pair_of(layers=3, window=24)
    with Session(pair.model, 60, "f32", "f32") as plain:
        wanted = [t for s in autoregressive(plain, PROMPT, greedy()) for t in s.tokens]
    session, draft = pair.open(60)
    with session, draft:
        assert [t for s in speculative(session, draft, PROMPT, greedy()) for t in s.tokens] == wanted


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [False, True])
def test_a_prompt_that_cannot_be_run_changes_nothing(pair_of: PairOf, speculate: bool) -> None:
    pair = pair_of()
    session, draft = pair.open(32)

    def steps(prompt: list[int]) -> list[Step]:
        if speculate:
            return list(speculative(session, draft, prompt, greedy(), max_tokens=2))
        return list(autoregressive(session, prompt, greedy(), max_tokens=2))

    with session, draft:
        with pytest.raises(ShapeError, match="the prompt is empty"):
            steps([])
        with pytest.raises(ContextFull, match="max_context >= 33"):
            steps([1] * 33)
        with pytest.raises(ShapeError, match="token id 999 is outside"):
            steps([1, 999])
        assert (session.length, session.pending, draft.length) == (0, 0, 0)
        assert len(steps([1, 2, 3])) >= 1


@pytest.mark.parametrize("draft_max", [0, -1])
def test_a_draft_max_below_one_is_refused(pair_of: PairOf, draft_max: int) -> None:
    session, draft = pair_of().open(64)
    with session, draft, pytest.raises(ConfigError, match=f"draft_max is {draft_max}"):
        list(speculative(session, draft, [1], greedy(), draft_max=draft_max, max_tokens=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 65}, "max_context >= 65"),
        ({"prompt": [VOCAB]}, f"token id {VOCAB} is outside"),
        ({"session": None}, "session is None; expected an instance of Session"),
        ({"sampler": Sampler(SamplingParams(), 5)}, f"the sampler is for 5 tokens, the session's model has {VOCAB}"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop_ids": 5}, "stop_ids is 5; expected a sequence or a set"),
        ({"cancel": True}, "cancel is True; expected an instance of Event"),
    ],
)
@pytest.mark.parametrize("speculate", [False, True])
def test_arguments_are_checked_by_the_call_before_any_step(
    pair_of: PairOf, speculate: bool, changes: dict[str, Any], words: str
) -> None:
    session, draft = pair_of().open(64)
    arguments: dict[str, Any] = {"session": session, "prompt": [1], "sampler": greedy()} | changes
    with session, draft:
        with pytest.raises(PydflashError, match=words):
            speculative(proposer=draft, **arguments) if speculate else autoregressive(**arguments)
        assert (session.length, session.pending) == (0, 0)


def test_rows_that_are_pending_are_told_by_the_call(pair_of: PairOf) -> None:
    session, draft = pair_of().open(64)
    with session, draft:
        session.forward([1])
        with pytest.raises(StateError, match="1 positions are pending"):
            autoregressive(session, [1], greedy())
        with pytest.raises(ConfigError, match="proposer is 'ngram'"):
            speculative(session, "ngram", [1], greedy())  # type: ignore[arg-type]
