"""Sampling with a draft follows the target's own law: the distribution of whole sequences, penalties and all.

The target is a table of logits by last token, so that its law is known exactly and 100,000 draws take seconds;
everything between the logits and the tokens is the real code. A sequence of DEPTH tokens has a probability that the
sampler itself states, token by token. Penalties make every factor depend on all tokens before it, so a draw that sees a
wrong history shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from pydflash.decode import Law, Sampler, SamplingParams, Stats, autoregressive, collect, loops, speculative
from pydflash.drafts import Proposer
from pydflash.runtime import HostProposal, Session
from tests.reference.qwen35 import Array

VOCAB, DEPTH, SEQUENCES = 6, 4, 26_000  # 104,000 draws
PROMPT = [2, 0, 2]
LAW = {
    "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2,
}  # fmt: skip
SEED = 20_261_124
TABLE = np.random.default_rng(1).normal(0.0, 1.2, (VOCAB, VOCAB)).astype(np.float32)

Sequence_ = tuple[int, ...]


@dataclass
class Rows:
    """The logits of a forward, as an Output has them."""

    logits: Array
    count: int

    @property
    def argmax(self) -> Array:
        return self.logits.argmax(axis=1)


class TableSession(Session):
    """The part of a session that decoding uses, without a model. The logits after a token are its row of TABLE."""

    max_context, chunk = 1000, 512
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB))

    def __init__(self) -> None:
        self.length = 0

    def prefill(self, tokens: Sequence[int]) -> Iterator[Rows]:  # type: ignore[override]
        yield self.forward(tokens)
        self.commit(len(tokens))

    def forward(self, tokens: Any, logits: str = "last") -> Rows:
        ids = tokens.ids if isinstance(tokens, HostProposal) else np.asarray(tokens)
        return Rows(TABLE[ids if logits == "all" else ids[-1:]], len(ids))

    def commit(self, n: int) -> None:
        self.length += n


class TableDraft:
    """Proposes the most likely chain (``likely``) or anything at all, as a draft knows nothing of penalties."""

    limit = DEPTH

    def __init__(self, likely: bool) -> None:
        self._likely, self._rng = likely, np.random.default_rng(7)

    def propose(self, history: Sequence[int], count: int) -> HostProposal:
        ids = [history[-1]]
        for _ in range(count):
            ids.append(int(TABLE[ids[-1]].argmax() if self._likely else self._rng.integers(VOCAB)))
        return HostProposal(ids)

    def commit(self, n: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class RememberingSampler(Sampler):
    """The sampler, which works out the law after a history once: a few hundred histories make 100,000 draws."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[tuple[bytes, Sequence_], Law] = {}

    def _law(self, logits: Array, history: Sequence[int]) -> Law:
        key = (logits.tobytes(), tuple(history))
        if key not in self._known:
            self._known[key] = super()._law(logits, history)
        return self._known[key]


def expected_law() -> dict[Sequence_, float]:
    """Probability of every sequence of DEPTH tokens after the prompt, by the sampler's own statement of its law."""
    sampler = Sampler(SamplingParams(**LAW, seed=0), VOCAB)
    law: dict[Sequence_, float] = {(): 1.0}
    for _ in range(DEPTH):
        longer = {}
        for sequence, probability in law.items():
            history = PROMPT + list(sequence)
            ids, weights = sampler.probabilities(TABLE[history[-1]], history)
            longer.update({(*sequence, int(i)): probability * float(w) for i, w in zip(ids, weights)})
        law = longer
    return law


def sequences(draft: Proposer | None, seen: list[Stats], count: int) -> Iterator[Sequence_]:
    """``count`` sequences; ``seen`` gets the stats of each."""
    sampler = RememberingSampler(SamplingParams(**LAW, seed=SEED), VOCAB)
    for _ in range(count):
        session: Any = TableSession()
        if draft is None:
            steps = autoregressive(session, PROMPT, sampler, max_tokens=DEPTH)
        else:
            steps = speculative(session, draft, PROMPT, sampler, max_tokens=DEPTH)
        tokens, stats = collect(steps)
        seen.append(stats)
        yield tuple(tokens)


def p_value(draft: TableDraft | None, count: int = SEQUENCES, seen: list[Stats] | None = None) -> float:
    """Chi-square of the sequences against the law; what is expected fewer than five times is one class."""
    law = expected_law()
    counts = dict.fromkeys(law, 0)
    for sequence in sequences(draft, [] if seen is None else seen, count):
        if sequence not in law:
            return 0.0  # the target cannot say this
        counts[sequence] += 1
    wanted = np.array(list(law.values())) * count
    seen = np.array([counts[sequence] for sequence in law])
    rare = wanted < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (seen, wanted)]
    keep = pooled[1] > 0
    return float(chisquare(pooled[0][keep], pooled[1][keep] * count / pooled[1].sum()).pvalue)


def test_the_law_is_one_worth_testing() -> None:
    law = expected_law()
    assert sum(law.values()) == pytest.approx(1.0)
    assert len(law) >= 100
    assert len(law) < VOCAB**DEPTH  # top-p removes some
    assert DEPTH * SEQUENCES >= 100_000


def test_drawing_one_token_a_step_follows_the_law() -> None:
    assert p_value(None, 8000) >= 0.01


@pytest.mark.parametrize("likely", [True, False], ids=["good draft", "random draft"])
def test_drawing_with_a_draft_follows_the_law(likely: bool) -> None:
    seen: list[Stats] = []
    assert p_value(TableDraft(likely), seen=seen) >= 0.01
    accepted, drafted = sum(stats.accepted for stats in seen), sum(stats.drafted for stats in seen)
    assert accepted > 5000  # it did speculate
    assert accepted < drafted


def accept_by_chance(proposal: Any, output: Any, sampler: Sampler, history: list[int]) -> list[int]:
    """Keeps a proposed token with its probability, and draws anew from the whole law where it does not."""
    proposed = [] if proposal is None else proposal.ids[1:].tolist()
    tokens: list[int] = []
    for row in range(len(proposed) + 1):
        ids, weights = sampler.probabilities(output.logits[row], history + tokens)
        chance = float(weights[ids == proposed[row]].sum()) if row < len(proposed) else 0.0
        if sampler._generator.random() < chance:
            tokens.append(proposed[row])
            continue
        tokens.append(sampler.draw(output.logits[row], history + tokens))
        break
    return tokens


def forget_the_accepted_prefix(proposal: Any, output: Any, sampler: Sampler, history: list[int]) -> list[int]:
    """Penalises every row of a block by the history before the block."""
    proposed = [] if proposal is None else proposal.ids[1:].tolist()
    tokens: list[int] = []
    for row in range(len(proposed) + 1):
        tokens.append(sampler.draw(output.logits[row], history))
        if row == len(proposed) or tokens[-1] != proposed[row]:
            break
    return tokens


def redraw_where_the_draft_was_wrong(proposal: Any, output: Any, sampler: Sampler, history: list[int]) -> list[int]:
    """Draws a second time on a rejection, which favours what the draft proposes."""
    tokens = original_accept(proposal, output, sampler, history)
    if proposal is not None and len(tokens) < len(proposal):
        row = len(tokens) - 1
        tokens[-1] = sampler.draw(output.logits[row], history + tokens[:-1])
    return tokens


original_accept: Callable[..., list[int]] = loops._accept


@pytest.mark.parametrize(
    "broken", [accept_by_chance, forget_the_accepted_prefix, redraw_where_the_draft_was_wrong], ids=lambda f: f.__name__
)
def test_a_broken_acceptance_rule_is_caught(monkeypatch: pytest.MonkeyPatch, broken: Callable[..., list[int]]) -> None:
    monkeypatch.setattr(loops, "_accept", broken)
    assert p_value(TableDraft(likely=True), 8000) < 1e-6
