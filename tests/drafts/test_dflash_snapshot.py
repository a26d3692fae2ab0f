"""A restored pair proposes bit for bit as the one that the snapshots were taken of: same tokens, same acceptance."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pydflash import Sampler, SamplingParams, Snapshot
from pydflash.decode import collect, speculative
from pydflash.drafts import Draft, DraftSession, load_draft
from pydflash.errors import SessionClosed, SnapshotMismatch, StateError
from pydflash.models import Model, load_model
from pydflash.ops import Rope
from pydflash.runtime import Session
from pydflash.state import RingSpec, host_arrays
from tests.helpers import Pair
from tests.shipped import DRAFT, TARGET, held_out_prompts, needs_pair

PairOf = Callable[..., Pair]

KINDS: dict[str, dict[str, Any]] = {
    "full": {"layers": 2},
    "sliding and full": {"layers": 3, "window": 24},
    "sliding and full, not causal": {"layers": 3, "window": 24, "causal": False},
    "sliding only": {"layers": 2, "window": 9, "sliding": (True, True)},
    "window of one": {"layers": 2, "window": 1},
    "block of 5": {"layers": 2, "window": 24, "block_size": 5},
}


class Sessions(NamedTuple):
    """A target session and its draft's."""

    target: Session
    draft: DraftSession

    def snapshot(self) -> tuple[Snapshot, Snapshot]:
        return self.target.snapshot(), self.draft.snapshot()

    def restore(self, snapshots: tuple[Snapshot, Snapshot]) -> None:
        self.target.restore(snapshots[0])
        self.draft.restore(snapshots[1])


@pytest.fixture
def open_pair(pair_of: PairOf) -> Iterator[Callable[..., Sessions]]:
    """(kind, **options of Session) to open sessions, closed at the end."""
    opened: list[Sessions] = []

    def open_(kind: str = "full", **options: Any) -> Sessions:
        opened.append(Sessions(*pair_of(**KINDS[kind]).open(**options)))
        return opened[-1]

    yield open_
    for sessions in opened:
        sessions.draft.close()
        sessions.target.close()


def draw(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 320, count).tolist()
    return tokens


def extend(pair: Sessions, tokens: list[int], keep: int | None = None) -> None:
    """Forward ``tokens``, at most a chunk of them, and keep the first ``keep`` (default: all)."""
    if len(tokens) > 16:
        pair.draft.flush()
    pair.target.forward(tokens, "none")
    pair.target.commit(len(tokens) if keep is None else keep)
    pair.draft.commit(len(tokens) if keep is None else keep)


def cycles(pair: Sessions, *kept: int) -> None:
    """Propose, verify 16 rows and keep n of them, for each n: these wait for the next proposal."""
    for i, n in enumerate(kept):
        block = draw(16, 10 + i)
        pair.draft.propose([block[0]])
        pair.target.forward(block, "none")
        pair.target.commit(n)
        pair.draft.commit(n)


def trace(pair: Sessions, steps: int = 5) -> list[Any]:
    """Draft logits, target logits and tokens kept of some cycles, in which one more token of each proposal is kept."""
    found: list[Any] = []
    anchor = 3
    for step in range(steps):
        proposal = pair.draft.propose([anchor])
        found.append(pair.draft.logits()[1:])
        output = pair.target.forward(proposal, "all")
        found.append(output.logits.copy())
        anchor = int(output.argmax[step])
        pair.target.commit(step + 1)
        pair.draft.commit(step + 1)
    return found


def assert_goes_on(pair: Sessions, restored: Sessions) -> None:
    assert restored.draft.length == pair.draft.length == pair.target.length
    for here, there in zip(trace(restored), trace(pair)):
        assert np.array_equal(here, there)


def one_by_one(pair: Sessions) -> None:
    for token in draw(7, 2):
        extend(pair, [token])


def long(pair: Sessions) -> None:
    for seed in range(4):
        extend(pair, draw(32, seed))
    cycles(pair, 3, 16, 1, 9)


HISTORIES: dict[str, Callable[[Sessions], None]] = {
    "length 0": lambda pair: None,
    "length 1": lambda pair: extend(pair, draw(1, 1)),
    "one by one": one_by_one,
    "a chunk": lambda pair: extend(pair, draw(32, 3)),
    "chunks and cycles": long,
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_pair_proposes_the_same_bits(open_pair: Callable[..., Sessions], kind: str, history: str) -> None:
    pair, restored = open_pair(kind, chunk=32), open_pair(kind, chunk=32)
    HISTORIES[history](pair)
    restored.restore(pair.snapshot())
    assert_goes_on(pair, restored)


@pytest.mark.parametrize("n", range(17))
def test_every_number_of_kept_rows_is_restored(open_pair: Callable[..., Sessions], n: int) -> None:
    pair, restored = open_pair("sliding and full"), open_pair("sliding and full")
    extend(pair, draw(19, 1))
    cycles(pair, n)
    restored.restore(pair.snapshot())
    assert_goes_on(pair, restored)


@pytest.mark.parametrize("kind", ["full", "sliding and full"])
def test_sessions_of_other_sizes_with_another_text_are_restored(open_pair: Callable[..., Sessions], kind: str) -> None:
    pair = open_pair(kind, chunk=32)
    restored = open_pair(kind, context=900, chunk=128)
    long(pair)
    extend(restored, draw(100, 8))
    cycles(restored, 5, 11)
    restored.target.forward([1, 2], "none")  # pending rows and rows that wait are forgotten
    restored.restore(pair.snapshot())
    assert_goes_on(pair, restored)


@pytest.mark.parametrize("kind", ["full", "sliding and full", "sliding and full, not causal"])
def test_a_longer_text_leaves_nothing_behind(open_pair: Callable[..., Sessions], kind: str) -> None:
    pair, restored = open_pair(kind), open_pair(kind)
    extend(pair, draw(20, 1))
    extend(restored, draw(60, 2))
    restored.restore(pair.snapshot())
    assert_goes_on(pair, restored)


def test_taking_a_snapshot_changes_nothing(open_pair: Callable[..., Sessions]) -> None:
    pair, other = open_pair("sliding and full"), open_pair("sliding and full")
    for each in (pair, other):
        extend(each, draw(19, 1))
        cycles(each, 6, 2)
    snapshots = pair.snapshot()
    before = [{name: values.copy() for name, values in s.arrays.items()} for s in snapshots]
    assert_goes_on(other, pair)
    for snapshot, arrays in zip(snapshots, before):
        for name, values in snapshot.arrays.items():
            assert np.array_equal(values, arrays[name]), name


def test_a_pair_goes_back_as_often_as_it_likes(open_pair: Callable[..., Sessions]) -> None:
    pair = open_pair("sliding and full")
    extend(pair, draw(19, 1))
    cycles(pair, 6, 2)
    snapshots = pair.snapshot()
    wanted = trace(pair)
    for reset in (False, True):
        if reset:
            pair.target.reset()
            pair.draft.reset()
        pair.restore(snapshots)
        assert all(map(np.array_equal, trace(pair), wanted))


def test_a_sliding_layer_keeps_its_window_only(open_pair: Callable[..., Sessions]) -> None:
    pair = open_pair("sliding and full")
    extend(pair, draw(100, 1))
    arrays = pair.draft.snapshot().arrays
    row = pair.draft.draft.config.kv_heads * pair.draft.draft.config.head_size * 2
    assert {name: values.shape for name, values in arrays.items()} == {
        f"{side}.{layer}": (24 if layer < 2 else 100, row) for layer in range(3) for side in "kv"
    }


# --- refusals ---------------------------------------------------------------------------------------------------------

HALF = "the target session was reset or restored and its draft session was not; reset or restore both"


def test_a_target_restored_without_its_draft_is_noticed(open_pair: Callable[..., Sessions]) -> None:
    """Also where both have the same length by chance: the draft would propose for another text, and lose acceptance."""
    pair = open_pair()
    extend(pair, draw(20, 1))
    saved = pair.target.snapshot()
    pair.target.reset()
    pair.draft.reset()
    extend(pair, draw(13, 2))
    extend(pair, draw(7, 3))  # they wait in the ring of features
    pair.target.restore(saved)
    assert pair.target.length == pair.draft.length
    for call in (lambda: pair.draft.propose([3]), pair.draft.snapshot, pair.draft.flush):
        with pytest.raises(StateError, match=HALF):
            call()
    pair.target.forward([5])
    pair.target.commit(1)
    with pytest.raises(StateError, match=HALF):
        pair.draft.commit(1)
    pair.draft.reset()
    for call in (lambda: pair.draft.propose([3]), lambda: pair.draft.commit(21)):
        with pytest.raises(StateError, match=HALF):  # nor is an empty context that of a text from a snapshot
            call()
    pair.target.reset()
    extend(pair, [1, 2])
    pair.draft.propose([3])


def test_a_draft_is_restored_after_its_target(open_pair: Callable[..., Sessions]) -> None:
    pair, other = open_pair(), open_pair()
    extend(pair, draw(20, 1))
    snapshots = pair.snapshot()
    extend(other, draw(20, 2))
    with pytest.raises(StateError, match=r"belongs to 20 positions of another text .* restore the target first"):
        other.draft.restore(snapshots[1])
    alone = open_pair()
    extend(alone, draw(20, 2))
    assert_goes_on(alone, other)  # the refusal changed nothing
    other.target.restore(snapshots[0])
    other.target.forward([1])
    with pytest.raises(StateError, match=r"pending: 1"):
        other.draft.restore(snapshots[1])
    other.target.commit(1)
    with pytest.raises(StateError, match=r"20 positions of another text than the 21 of the target"):
        other.draft.restore(snapshots[1])
    other.target.restore(snapshots[0])
    other.draft.restore(snapshots[1])
    assert_goes_on(pair, other)


def test_snapshots_of_two_texts_make_no_pair(open_pair: Callable[..., Sessions]) -> None:
    pair, other = open_pair(), open_pair()
    extend(pair, draw(20, 1))
    saved = pair.snapshot()
    for token in (1, 2):  # two ways on from one place
        pair.restore(saved)
        extend(pair, [token])
        kept = pair.snapshot()
        if token == 1:
            first = kept
    other.target.restore(first[0])
    with pytest.raises(StateError, match="another text"):
        other.draft.restore(kept[1])
    other.draft.restore(first[1])


def test_a_second_draft_session_can_join_at_the_place_of_a_snapshot(open_pair: Callable[..., Sessions]) -> None:
    pair = open_pair("sliding and full")
    extend(pair, draw(20, 1))
    cycles(pair, 4)
    saved = pair.snapshot()
    with DraftSession(pair.draft.draft, pair.target) as second:
        second.restore(saved[1])
        proposed = second.propose([3]).ids.copy()
        assert np.array_equal(second.logits()[1:], (pair.draft.propose([3]), pair.draft.logits())[1][1:])
        assert np.array_equal(proposed, pair.draft.propose([3]).ids)


def test_a_draft_that_is_not_where_its_target_is_gives_no_snapshot(open_pair: Callable[..., Sessions]) -> None:
    pair = open_pair()
    extend(pair, draw(5, 1))
    pair.target.forward([1, 2], "none")
    with pytest.raises(StateError, match="snapshot: the draft holds 5 positions, the target 5 and 2 pending"):
        pair.draft.snapshot()
    pair.target.commit(2)
    with pytest.raises(StateError, match="snapshot: the draft holds 5 positions, the target 7 and 0 pending"):
        pair.draft.snapshot()
    pair.draft.commit(2)
    assert pair.draft.snapshot().length == 7


def test_each_kind_of_session_refuses_the_others_snapshot(open_pair: Callable[..., Sessions]) -> None:
    pair = open_pair()
    of_target, of_draft = pair.snapshot()
    with pytest.raises(SnapshotMismatch, match="the snapshot is that of a draft session, this is a session"):
        pair.target.restore(of_draft)
    with pytest.raises(SnapshotMismatch, match="the snapshot is that of a session, this is a draft session"):
        pair.draft.restore(of_target)


def test_closed_sessions_say_so(open_pair: Callable[..., Sessions]) -> None:
    pair, other = open_pair(), open_pair()
    saved = pair.draft.snapshot()
    pair.draft.close()
    other.target.close()
    for draft, words in ((pair.draft, "this draft session was closed"), (other.draft, "the target session of this")):
        for call in (draft.snapshot, lambda draft=draft: draft.restore(saved), lambda draft=draft: draft.propose([1])):
            with pytest.raises(SessionClosed, match=words):
                call()


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, Rope):
        return dataclasses.replace(value, base=2 * value.base)
    return (*value[1:], value[0]) if isinstance(value, tuple) else "other" if isinstance(value, str) else value * 2


@pytest.mark.parametrize("field", ["format", "model", "draft", "taps", *(f.name for f in dataclasses.fields(RingSpec))])
def test_every_field_of_the_fingerprint_and_of_a_layer_decides(open_pair: Callable[..., Sessions], field: str) -> None:
    pair, undisturbed = open_pair("sliding and full"), open_pair("sliding and full")
    for each in (pair, undisturbed):
        extend(each, draw(20, 1))
        cycles(each, 3)
    ours = pair.draft.fingerprint
    first, *rest = ours.layers
    mine = getattr(first if hasattr(first, field) else ours, field)
    changed = other_value(mine)
    if hasattr(first, field):
        theirs = dataclasses.replace(ours, layers=(dataclasses.replace(first, **{field: changed}), *rest))
    else:
        theirs = dataclasses.replace(ours, **{field: changed})
    foreign = Snapshot(theirs, pair.target.sequence, 23, 0, host_arrays(theirs.layout(23, 0)))
    with pytest.raises(SnapshotMismatch) as caught:
        pair.draft.restore(foreign)
    assert f"restore: {field} of the snapshot is {changed!r}" in str(caught.value)
    assert f"that of this draft session is {mine!r}; open the session as" in str(caught.value)
    assert_goes_on(undisturbed, pair)


# --- the shipped pair, whose acceptance is real -----------------------------------------------------------------------


def decode(target: Session, draft: DraftSession, token: int) -> tuple[list[int], tuple[int, ...]]:
    """Greedy tokens after ``token`` and how many of each proposal were accepted."""
    sampler = Sampler(SamplingParams(temperature=0.0), target.model.config.vocab)
    tokens, stats = collect(speculative(target, draft, [token], sampler, max_tokens=100))
    return tokens, stats.trace


def load_pair() -> tuple[Model, Draft]:
    model = load_model(TARGET, "cpu", threads=1)
    return model, load_draft(DRAFT, model)


def open_shipped(model: Model, draft: Draft, context: int) -> Sessions:
    session = Session(model, context, "q4_0", "q8_0", capture=draft.config.taps)
    return Sessions(session, DraftSession(draft, session))


PROGRAM = """
import json, sys
from pydflash import Snapshot
from tests.drafts.test_dflash_snapshot import decode, load_pair, open_shipped
pair = open_shipped(*load_pair(), 2048)
pair.restore((Snapshot.load(sys.argv[1]), Snapshot.load(sys.argv[2])))
print(json.dumps(decode(*pair, int(sys.argv[3]))))
"""


@needs_pair
def test_a_new_process_gives_the_same_tokens_and_accepts_as_many(tmp_path: Path) -> None:
    model, draft = load_pair()
    prompt = model.tokenizer.encode(held_out_prompts(1)[0])
    pair = open_shipped(model, draft, 1024)
    sampler = Sampler(SamplingParams(temperature=0.0), model.config.vocab)
    steps = speculative(*pair, prompt, sampler, max_tokens=60)
    anchor = [token for step in steps for token in step.tokens][-1]
    files = [tmp_path / "target", tmp_path / "draft"]
    for snapshot, path in zip(pair.snapshot(), files):
        snapshot.save(path)
    wanted = decode(*pair, anchor)
    command = [sys.executable, "-c", PROGRAM, *map(str, files), str(anchor)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*map(list, wanted)]
    assert len(wanted[0]) == 100
    assert sum(wanted[1]) > len(wanted[1])  # there is acceptance to lose
    for each in (pair.draft, pair.target, draft, model):
        each.close()
