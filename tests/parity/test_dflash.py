"""Speculation by llama.cpp's own DFlash on the same pair and prompts: same text, same proposals, same counts.

What is compared is every proposed token, not only the counts. A proposal follows from the text before it, so wherever
both engines propose at the same position of the same text, all 15 tokens must be equal, near-ties apart; where none of
them differs, the numbers of accepted and of drafted tokens are equal too.

Two rules differ, and are made equal here:

- Inside a block, llama.cpp lets every row see every other one unless the draft file has ``attention.causal``; we, like
  the draft's authors, let rows of sliding layers see earlier rows only. A file without the key is therefore loaded with
  ``causal=False`` here, and a copy with the key set is compared as it is.
- Flash attention is off in llama.cpp: on the CPU it sums V in f16. With f32 weights the draft's context is f32 too.

The package `xllamacpp` does not say which commit of llama.cpp it was built from (its build info is "unknown"); its
version names build 11549. That need not be the commit that vendor/ggml.toml pins.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, Stats, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.ggml_types import GGMLType
from pydflash.models import load_model
from pydflash.runtime import DeviceProposal, Session
from pydflash.state import Ring
from tests.helpers import Array, dequantised, run_chunks
from tests.parity.peer_dflash import DRAFT_MAX, Generation, peer_speculation
from tests.shipped import DRAFT, TARGET, held_out_prompts, needs_pair
from tests.tiny import GEOMETRIES, write_draft, write_target

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None,
        reason="the peer is not installed: pip install xllamacpp==2026.10.11549",
    ),
]

PROMPTS, COUNT = 10, 64
# With f32 weights and caches: between the logits of two candidates. Logits are 10 or so, sums of a few hundred products
# after a dozen layers differ by some 1e-6 of that.
FLOAT_TIE = 1e-4
SEEN = 0.1
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32},
}


@dataclass
class Ours:
    """One prompt's new tokens, its statistics, and by the anchor's position the logits (15, vocab) of the proposal."""

    ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    logits: dict[int, Array] = field(default_factory=dict)


class Recording:
    """A Proposer: a draft session, and the logits of what it proposed, by the anchor's position."""

    def __init__(self, session: DraftSession) -> None:
        self._session, self.seen = session, dict[int, Array]()
        self.limit = session.limit
        self.commit, self.flush, self.reset = session.commit, session.flush, session.reset
        self.sizes, self.close = session.sizes, session.close

    def propose(self, history: Sequence[int], count: int) -> DeviceProposal:
        proposal = self._session.propose(history, count)
        self.seen[self._session.length] = self._session.logits()[1:]
        return proposal


@pytest.fixture
def float_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of the draft's context are f32: as f16, a last bit of the target decides how some of them round."""
    monkeypatch.setattr(Ring, "dtype", GGMLType.F32)


def our_speculation(
    target: Path, draft_path: Path, prompts: Sequence[Sequence[int]], count: int, causal: bool | None = None
) -> list[Ours]:
    results = []
    with load_model(target, "cpu", threads=1) as model, load_draft(draft_path, model, causal=causal) as draft:
        greedy, stops = Sampler(SamplingParams(), model.config.vocab), model.tokenizer.eos_ids
        for prompt in prompts:
            session = Session(model, 1024, "f32", "f32", capture=draft.config.taps)
            with session, DraftSession(draft, session) as drafting:
                recording = Recording(drafting)
                steps = speculative(session, recording, prompt, greedy, max_tokens=count, stop_ids=stops)
                results.append(Ours(*collect(steps), recording.seen))
    return results


@dataclass(frozen=True)
class Tie:
    """A token that we prefer to llama.cpp's by ``gap`` in our logits: row ``row`` of a proposal, or of the text."""

    position: int
    row: int | None
    here: int
    there: int
    gap: float


def fork_of_texts(target: Path, prompt: list[int], here: list[int], there: list[int]) -> Tie | None:
    """The first token where two texts differ."""
    at = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), None)
    if at is None:
        assert here == there
        return None
    with load_model(target, "cpu", threads=1) as model, Session(model, 1024, "f32", "f32") as session:
        row = session.forward(prompt).logits[-1]
        session.commit(len(prompt))
        if at:
            row = run_chunks(session, here[:at], 16)[-1]
    return Tie(len(prompt) + at, None, here[at], there[at], float(row[here[at]] - row[there[at]]))


def forks_of_proposals(ours: Ours, theirs: Generation, end: int) -> list[Tie]:
    """Proposed tokens that differ, at the positions before ``end`` where both engines propose."""
    found = []
    for position in shared(ours, theirs, end):
        for i, (row, candidates) in enumerate(zip(ours.logits[position], theirs.proposals[position])):
            here, there = int(row.argmax()), candidates[0][0]
            if here != there:
                found.append(Tie(position, i, here, there, float(row[here] - row[there])))
    return found


def shared(ours: Ours, theirs: Generation, end: int) -> list[int]:
    return sorted(p for p in ours.logits.keys() & theirs.proposals.keys() if p < end)


def compare(
    target: Path, prompts: list[list[int]], ours: list[Ours], theirs: list[Generation], count: int, tie: float
) -> str:
    """Assert that two engines agree, near-ties of up to ``tie`` apart; a report of counts and near-ties."""
    rows, near_ties = 0, []
    for prompt, here, there in zip(prompts, ours, theirs):
        fork = fork_of_texts(target, prompt, here.ids, there.ids)
        end = len(prompt) + count if fork is None else fork.position
        ties = forks_of_proposals(here, there, end) + ([fork] if fork else [])
        assert all(t.gap <= tie for t in ties), ties
        if not ties:
            assert there.accepted == here.stats.accepted
            assert there.drafted == here.stats.drafted
        rows += DRAFT_MAX * len(shared(here, there, end))
        near_ties += ties
    assert rows >= len(prompts) * DRAFT_MAX
    texts = sum(t.row is None for t in near_ties)
    return (
        f"accepted here {[o.stats.accepted for o in ours]}, there {[t.accepted for t in theirs]}; {texts} texts of "
        f"{len(ours)} and {len(near_ties) - texts} of {rows} proposed tokens fork at near-ties (up to {tie:.2g}), "
        f"the widest {max(near_ties, key=lambda t: t.gap, default=None)}"
    )


def shipped_prompts() -> list[list[int]]:
    with load_model(TARGET, "cpu", threads=1) as model:
        return [model.tokenizer.encode(text) for text in held_out_prompts(PROMPTS)]


@needs_pair
@pytest.mark.parametrize("causal", [False, True])
def test_the_shipped_pair_as_f32_drafts_what_llama_cpp_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], float_context: None, causal: bool
) -> None:
    target = dequantised(TARGET, tmp_path / "target.gguf")
    draft = dequantised(DRAFT, tmp_path / "draft.gguf", {"dflash.attention.causal": True} if causal else {})
    prompts = shipped_prompts()
    theirs = peer_speculation(target, draft, prompts, COUNT, tmp_path, float_draft=True)
    ours = our_speculation(target, draft, prompts, COUNT, causal=None if causal else False)
    report = compare(target, prompts, ours, theirs, COUNT, FLOAT_TIE)
    with capsys.disabled():
        print(f"\nf32 pair, causal {causal}: {report}")
    assert [o.stats.accepted for o in ours] == [t.accepted for t in theirs]


def spread(one: list[Generation], other: list[Generation]) -> float:
    """By how much the log-odds of llama.cpp's own two best candidates change from one run to another.

    Only probabilities of SEEN and more count: they are printed with three decimals.
    """
    changes = [0.0]
    for a, b in zip(one, other):
        if a.ids != b.ids:
            continue
        for position in a.proposals.keys() & b.proposals.keys():
            for ((first, p), (second, q), _), moved in zip(a.proposals[position], b.proposals[position]):
                there = dict(moved)
                r, t = there.get(first, 0.0), there.get(second, 0.0)
                if min(q, r, t) >= SEEN:
                    changes.append(abs(math.log(p / q) - math.log(r / t)))
    return max(changes)


@needs_pair
def test_the_shipped_pair_drafts_what_llama_cpp_drafts_near_ties_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Activations are rounded to 8 bits, so a last bit is worth much; how much is seen in llama.cpp when its prompt
    is cut differently, which changes nothing but the order of its sums."""
    prompts = shipped_prompts()
    theirs, again = (peer_speculation(TARGET, DRAFT, prompts, COUNT, tmp_path, prompt_rows=rows) for rows in (512, 17))
    own = spread(theirs, again)
    ours = our_speculation(TARGET, DRAFT, prompts, COUNT, causal=False)
    report = compare(TARGET, prompts, ours, theirs, COUNT, own)
    with capsys.disabled():
        print(f"\nshipped pair: {report}; accepted there with prompts cut: {[t.accepted for t in again]}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["gqa6", "tied", "odd"])
def test_random_drafts_propose_what_llama_cpp_proposes(
    tmp_path: Path, float_context: None, name: str, causal: bool
) -> None:
    """Sliding windows shorter than the text, so that their edge is compared too."""
    geometry = GEOMETRIES[name]
    target = write_target(tmp_path / "target.gguf", geometry, seed=3)
    draft = write_draft(tmp_path / "draft.gguf", geometry, layers=3, window=24, causal=causal, seed=4)
    random_prompts_agree(target, draft, geometry.vocab, tmp_path)


@pytest.mark.parametrize("name", SCALED)
def test_drafts_with_scaled_positions_propose_what_llama_cpp_proposes(
    tmp_path: Path, float_context: None, name: str
) -> None:
    geometry, keys = GEOMETRIES["gqa6"], SCALED[name]
    target = write_target(tmp_path / "target.gguf", geometry, seed=3, keys=keys)
    draft = write_draft(tmp_path / "draft.gguf", geometry, layers=3, window=24, causal=True, seed=4, keys=keys)
    random_prompts_agree(target, draft, geometry.vocab, tmp_path)


def random_prompts_agree(target: Path, draft: Path, vocab: int, folder: Path) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, vocab, n).tolist() for n in (3, 40)]
    ours = our_speculation(target, draft, prompts, 12)
    theirs = peer_speculation(target, draft, prompts, 12, folder, float_draft=True)
    compare(target, prompts, ours, theirs, 12, FLOAT_TIE)
