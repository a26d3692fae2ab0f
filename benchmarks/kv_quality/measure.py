"""What a model says over a text with one cache, and how much of what it says with another cache is left.

Everything is teacher forced in steps of 16 rows: the kernels of decoding and verifying, whose rows do not depend on
the width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from benchmarks.kv_quality.metrics import agreement, kl_divergence, percentile, perplexity, relative_error
from benchmarks.kv_quality.texts import Needle, Text
from pydflash import ops
from pydflash.decode import Sampler, SamplingParams, speculative
from pydflash.drafts import Draft, DraftSession
from pydflash.ggml_types import GGMLType
from pydflash.measure.bench import feed
from pydflash.models import Model
from pydflash.native import Arena, Tensor
from pydflash.runtime import Session
from pydflash.state import Batch, KVCache

__all__ = ["REFERENCE", "AcceptancePlaces", "Caches", "Observed", "Quality", "Yardstick", "grid", "observe"]

ROWS = 16


@dataclass(frozen=True)
class Caches:
    """Types of K and V, and the basis of each."""

    k: str
    v: str
    k_rotation: str = "none"
    v_rotation: str = "none"

    def __str__(self) -> str:
        return f"K {self.k} {self.k_rotation}  V {self.v} {self.v_rotation}"

    def open(self, model: Model, context: int, capture: Sequence[int] = ()) -> Session:
        """A session of ``context`` positions with these caches."""
        return Session(model, context, self.k, self.v, self.k_rotation, self.v_rotation, capture=capture)


REFERENCE = Caches("f16", "f16")
"""What the other caches are compared with."""
EXACT = Caches("f32", "f32")
"""What attention outputs are compared with; the CPU alone has it, on CUDA it is the reference."""


def grid(
    k_types: Sequence[str], v_types: Sequence[str], k_rotations: Sequence[str], v_rotations: Sequence[str]
) -> list[Caches]:
    """Every combination: K type by K type, basis by basis."""
    return [
        Caches(k, v, k_rotation, v_rotation)
        for k, k_rotation, v_rotation, v in product(k_types, k_rotations, v_rotations, v_types)
    ]


# --- one cache --------------------------------------------------------------------------------------------------------


class AttentionTap:
    """Stands in a session where the cache of one layer was, and keeps what its attention gives: (rows, H * D) f32."""

    def __init__(self, session: Session, layer: int) -> None:
        """To be put there before the first graph is built."""
        config = session.model.config
        self._session, self._cache = session, cast("KVCache", session.state.layers[layer])
        self.tensors = self._cache.tensors
        self._table = Arena(
            session.model.backend,
            {"outputs": ((session.capacity + 1, config.heads * config.head_size), GGMLType.F32)},
            "attention outputs",
        )
        session.state.layers[layer] = self  # type: ignore[call-overload]

    def attend(self, *arguments: Any) -> Tensor:
        output, batch, table = self._cache.attend(*arguments), cast("Batch", arguments[-1]), self._table["outputs"]
        rows = output.reshape(output.shape[0], table.shape[1])
        batch.graph.effect(ops.set_rows(table.within(batch.graph), batch.rows, rows))
        return output

    def read(self) -> npt.NDArray[np.float32]:
        """The outputs of the committed positions."""
        table = self._table["outputs"]
        out = np.empty(table.shape, np.float32)
        self._session.model.backend.read(table, out)
        return out[: self._session.length]

    def close(self) -> None:
        self._table.close()


@dataclass(frozen=True)
class Observed:
    """One text under one cache.

    logits: (tokens, vocab) of every row. attention: (tokens, H * D) outputs of the first attention layer, whose Q, K
    and V no cache has changed yet. recalled: whether each needle's code is what greedy decoding answers.
    """

    text: Text
    logits: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32]
    recalled: tuple[bool, ...]


def observe(model: Model, caches: Caches, texts: Sequence[Text]) -> Iterator[Observed]:
    """What ``model`` says over each text, one after the other."""
    context = max(len(text.ids) for text in texts) + ROWS
    with (
        caches.open(model, context) as session,
        closing(AttentionTap(session, model.config.attention_layers[0])) as tap,
    ):
        for text in texts:
            session.reset()
            logits = _forced(session, text.ids)
            attention = tap.read()
            yield Observed(text, logits, attention, tuple(_recalls(session, needle) for needle in text.needles))


def _forced(session: Session, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits (len(ids), vocab) of a text that is forwarded and committed 16 rows at a time."""
    rows = []
    for start in range(0, len(ids), ROWS):
        piece = ids[start : start + ROWS]
        rows.append(session.forward(piece, "all").logits)
        session.commit(len(piece))
    return np.concatenate(rows)


def _recalls(session: Session, needle: Needle) -> bool:
    """Whether greedy decoding would answer the question; the session is left as it was."""
    chosen = session.forward(needle.question, "all").argmax
    session.commit(0)
    return tuple(chosen[-len(needle.answer) :].tolist()) == needle.answer


# --- against the reference --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """A cache against the reference.

    kld_mean, kld_999: mean and 99.9 % percentile of KL(reference || cache) over ``rows`` rows, in nats. top1: share of
    rows with the reference's most likely token. perplexity: of the text. attention_error: of the outputs of the first
    attention layer, relative to an f32 cache. recall: (tokens, depth, recalled) of each needle.
    """

    rows: int
    kld_mean: float
    kld_999: float
    top1: float
    perplexity: float
    attention_error: float
    recall: tuple[tuple[int, float, bool], ...]

    @property
    def recalled(self) -> int:
        """Needles that were recalled."""
        return sum(found for _, _, found in self.recall)


class Yardstick:
    """A model's texts under the reference cache, and under the exact one: what any other cache is measured with."""

    def __init__(self, model: Model, texts: Sequence[Text]) -> None:
        self.model, self.texts = model, texts
        self._reference = list(observe(model, REFERENCE, texts))
        exact = REFERENCE if model.backend.is_cuda else EXACT
        self._attention = np.concatenate([seen.attention for seen in observe(model, exact, texts)])

    def measure(self, caches: Caches) -> Quality:
        """Run the texts with ``caches``."""
        divergences, same, logits, following, attention = [], [], [], [], []
        recall: list[tuple[int, float, bool]] = []
        for before, now in zip(self._reference, observe(self.model, caches, self.texts)):
            divergences.append(kl_divergence(before.logits, now.logits))
            same.append(agreement(before.logits, now.logits) * len(now.logits))
            logits.append(now.logits[:-1])
            following.append(np.array(now.text.ids[1:]))
            attention.append(now.attention)
            needles = zip(now.text.needles, now.recalled)
            recall += [(len(now.text.ids), needle.depth, found) for needle, found in needles]
        values = np.concatenate(divergences)
        return Quality(
            rows=len(values),
            kld_mean=float(values.mean()),
            kld_999=percentile(values, 99.9),
            top1=sum(same) / len(values),
            perplexity=perplexity(np.concatenate(logits), np.concatenate(following)),
            attention_error=relative_error(np.concatenate(attention), self._attention),
            recall=tuple(recall),
        )


# --- with a draft -----------------------------------------------------------------------------------------------------


class AcceptancePlaces:
    """Places where the draft proposes: every 16 tokens of what the target writes after a few prompts.

    The text is that of the reference cache, and so are the places: caches differ in what the draft sees of the text
    and in what the target accepts, not in where they are asked.
    """

    def __init__(self, model: Model, draft: Draft, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """``tokens``: of each prompt's continuation, greedy."""
        self.model, self.draft, self.prompts = model, draft, prompts
        self.context = max(map(len, prompts)) + tokens + ROWS
        greedy = Sampler(SamplingParams(), model.config.vocab)
        self._continuations: list[list[int]] = []
        with self._open(REFERENCE) as session, DraftSession(draft, session) as proposer:
            for prompt in prompts:
                session.reset()
                proposer.reset()
                steps = speculative(session, proposer, prompt, greedy, max_tokens=tokens)
                self._continuations.append([token for step in steps for token in step.tokens])

    def measure(self, caches: Caches) -> float:
        """Tokens per verify at these places, the bonus token counted: 1 to block_size."""
        lengths: list[int] = []
        with self._open(caches) as session, DraftSession(self.draft, session) as proposer:
            for prompt, continuation in zip(self.prompts, self._continuations):
                session.reset()
                proposer.reset()
                feed(session, prompt, proposer)
                for start in range(0, len(continuation), ROWS):
                    proposal = proposer.propose([continuation[start]])
                    chosen = session.forward(proposal, "all").argmax
                    lengths.append(1 + int((chosen[:-1] == proposal.ids[1:]).cumprod().sum()))
                    session.commit(0)
                    piece = continuation[start : start + ROWS]
                    session.forward(piece, "none")
                    session.commit(len(piece))
                    proposer.commit(len(piece))
        return float(np.mean(lengths))

    def _open(self, caches: Caches) -> Session:
        return caches.open(self.model, self.context, self.draft.config.taps)
