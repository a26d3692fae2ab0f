"""Decoding: one token a step, or a proposed block a step. Both are generators of ``Step`` with the same signature.

Speculation changes no output. A proposal is verified in one forward; a proposed token is kept iff it is the token that
the target itself draws at that row, given everything before it. With a greedy sampler the text is therefore the
autoregressive one; with any other sampler every token is one draw from the target's own law.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydflash.draft import DraftSession
from pydflash.errors import ConfigError
from pydflash.sampling import Sampler, numerics_failed
from pydflash.session import Output, Proposal, Session
from pydflash.width import Width

__all__ = ["FinishReason", "Stats", "Step", "autoregressive", "collect", "speculative"]

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""A stop string or an end-of-turn token; ``max_tokens``; a full context; cancelled by another thread."""


@dataclass(frozen=True)
class Stats:
    """What a generation has cost so far. Times are seconds of wall clock.

    ``steps``: target forwards after the prompt. ``drafted``, ``accepted``: proposed tokens and those kept.
    ``accepted_per_position[i]``: how often proposal i was kept, ``drafted_per_position[i]`` how often it was made.
    ``fallback``: why speculation did not run for some or all steps, or None.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    drafted_per_position: tuple[int, ...] = ()
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    decode_seconds: float = 0.0
    fallback: str | None = None
    _log: list[int] = field(default_factory=list, repr=False, compare=False)  # later stats append to the same list

    @property
    def trace(self) -> tuple[int, ...]:
        """Accepted tokens of each step."""
        return tuple(self._log[: self.steps])

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify, the bonus token counted: 1 to block_size. 0 before the first."""
        return (self.accepted + self.steps) / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Proposed tokens that were kept, 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second of decoding."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    def after(
        self, drafted: int, accepted: int, times: tuple[float, float, float, float], fallback: str | None = None
    ) -> Stats:
        """These, and one more step that proposed ``drafted`` tokens and kept ``accepted`` of them.

        ``times``: of the clock at its beginning, after the proposal, after the verification and at its end.
        """
        begin, proposed, verified, end = times
        del self._log[self.steps :]
        self._log.append(accepted)
        return replace(
            self,
            tokens=self.tokens + accepted + 1,
            steps=self.steps + 1,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            accepted_per_position=_counted(self.accepted_per_position, accepted, drafted),
            drafted_per_position=_counted(self.drafted_per_position, drafted, drafted),
            draft_seconds=self.draft_seconds + proposed - begin,
            verify_seconds=self.verify_seconds + verified - proposed,
            accept_seconds=self.accept_seconds + end - verified,
            decode_seconds=self.decode_seconds + end - begin,
            fallback=fallback or self.fallback,
        )


def _counted(counts: tuple[int, ...], upto: int, length: int) -> tuple[int, ...]:
    """``counts``, at least ``length`` of them, with 1 added to the first ``upto``."""
    if not length:
        return counts
    counts += (0,) * (length - len(counts))
    return (*(count + 1 for count in counts[:upto]), *counts[upto:])


@dataclass(frozen=True)
class Step:
    """Tokens that one step decided. ``accepted`` of them were proposed; the last one never is (the bonus token).

    ``finish_reason`` says why no step follows, None that one does. ``stats`` are those of the generation up to here.
    The last step of a cancelled generation can be one without tokens.
    """

    tokens: tuple[int, ...]
    accepted: int = 0
    drafted: int = 0
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats, repr=False, compare=False)


def collect(steps: Iterable[Step]) -> tuple[list[int], Stats]:
    """The tokens of all ``steps``, and the stats after the last one."""
    tokens: list[int] = []
    stats = Stats()
    for step in steps:
        tokens += step.tokens
        stats = step.stats
    return tokens, stats


@dataclass(frozen=True)
class _End:
    """When a generation ends."""

    session: Session
    max_tokens: int | None
    stop_ids: frozenset[int]
    cancel: threading.Event | None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()

    def reason(self, tokens: Sequence[int], count: int) -> FinishReason | None:
        """Why nothing follows ``tokens``, the last of ``count``, or None."""
        if tokens and tokens[-1] in self.stop_ids:
            return "stop"
        if tokens and self.max_tokens is not None and count >= self.max_tokens:
            return "length"
        if tokens and self.session.length >= self.session.max_context:
            return "context"
        return "cancelled" if self.cancelled else None


def autoregressive(
    session: Session,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    cancel: threading.Event | None = None,
) -> Iterator[Step]:
    """Generate after ``prompt``, one token a step, until ``max_tokens``, a token of ``stop_ids`` or a full context.

    The last token yielded is not in the session yet; everything before it is. ``cancel``: set by any thread, it ends
    the generation before the next step or chunk of the prompt. Raises ShapeError for an empty prompt, ContextFull when
    the prompt does not fit, NativeError when the model's numerics fail.
    """
    end = _End(session, max_tokens, stop_ids, cancel)
    history = list(prompt)
    stats = _prefill(session, None, prompt, sampler, history, end)
    tokens = history[len(prompt) :]
    while True:
        reason = end.reason(tokens, stats.tokens)
        yield Step(tuple(tokens), finish_reason=reason, stats=stats)
        if reason is not None:
            return
        if end.cancelled:
            tokens = []
            continue
        begin = time.perf_counter()
        output = session.forward(tokens)
        tokens = [next(_draws(output, sampler, history))]
        session.commit(1)
        history += tokens
        now = time.perf_counter()
        stats = stats.after(0, 0, (begin, begin, now, now))


def speculative(
    session: Session,
    draft: DraftSession,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    draft_max: int | None = None,
    adaptive: bool = False,
    cancel: threading.Event | None = None,
) -> Iterator[Step]:
    """Generate after ``prompt``, a proposed block a step; the same tokens as ``autoregressive`` with the same sampler.

    propose -> verify -> accept -> commit. ``draft_max`` limits a proposal (default: block_size - 1); ``adaptive``
    chooses its length from live acceptance and measured cost, and leaves it out where a single step is expected to be
    faster. Generation is cut exactly at ``max_tokens`` or a token of ``stop_ids``, in the middle of a block too; the
    session then holds everything but the last token. ``cancel`` and errors: see ``autoregressive``; ConfigError for a
    ``draft_max`` below 1.
    """
    if draft_max is not None and draft_max < 1:
        raise ConfigError(f"draft_max is {draft_max}; it must be at least 1")
    longest = draft.block - 1 if draft_max is None else min(draft_max, draft.block - 1)
    width, rows = Width(draft.costs) if adaptive else None, draft.rows_for(longest)
    end = _End(session, max_tokens, stop_ids, cancel)
    history = list(prompt)
    stats = _prefill(session, draft, prompt, sampler, history, end)
    tokens, accepted, drafted = history[len(prompt) :], 0, 0
    while True:
        reason = end.reason(tokens, stats.tokens)
        yield Step(tuple(tokens), accepted, drafted, reason, stats)
        if reason is not None:
            return
        if end.cancelled:
            tokens, accepted, drafted = [], 0, 0
            continue
        anchor = tokens[-1]
        begin = time.perf_counter()
        fallback = None
        drafted = min(longest, session.max_context - session.length - 1)
        if drafted < 1:
            fallback = "the context has room for one more token only"
        if max_tokens is not None:
            drafted = min(drafted, max_tokens - stats.tokens - 1)  # the bonus token comes after them
        if width is not None and drafted >= 1:
            drafted = width.choose(drafted)
            rows = draft.rows_for(drafted)
            if not drafted:
                fallback = "adaptive: single steps were expected to be faster than a proposal"
        proposal = draft.propose(anchor, drafted, rows) if drafted >= 1 else None
        proposed = time.perf_counter()
        output = session.forward(proposal or [anchor], "all")
        tokens = _cut(_accept(proposal, output, sampler, history), stop_ids)
        verified = time.perf_counter()
        accepted = len(tokens) - 1
        session.commit(len(tokens))
        draft.keep(len(tokens))
        history += tokens
        now = time.perf_counter()
        if width is not None:
            width.record(drafted, accepted, now - begin)
        stats = stats.after(drafted, accepted, (begin, proposed, verified, now), fallback)


def _prefill(
    session: Session,
    draft: DraftSession | None,
    prompt: Sequence[int],
    sampler: Sampler,
    history: list[int],
    end: _End,
) -> Stats:
    """Read the prompt, hand its features to the draft, and append the first token to ``history``."""
    begin = time.perf_counter()
    if draft is not None:
        draft.flush()  # of an earlier generation in the same session
    for output in session.prefill(prompt):
        if draft is not None:
            draft.keep(output.count)
        if end.cancelled:
            return Stats(prompt_tokens=session.length, prefill_seconds=time.perf_counter() - begin)
    history.append(next(_draws(output, sampler, history)))
    return Stats(len(prompt), 1, prefill_seconds=time.perf_counter() - begin)


def _draws(output: Output, sampler: Sampler, history: Sequence[int]) -> Iterator[int]:
    """The target's own token at each row, after ``history`` and those that it drew at the rows before."""
    position = len(history) - 1
    for row, token in enumerate(output.argmax.tolist()):
        if token < 0:
            raise numerics_failed(position + row)
        if sampler.needs_logits:
            token = sampler.draw(output.logits[row], history)
            history = [*history, token]
        yield token


def _accept(proposal: Proposal | None, output: Output, sampler: Sampler, history: Sequence[int]) -> list[int]:
    """The target's tokens row by row, as long as the proposal agrees; the last one is the bonus token."""
    draws, tokens = _draws(output, sampler, history), []
    for proposed in [] if proposal is None else proposal.ids[1:].tolist():
        tokens.append(next(draws))
        if tokens[-1] != proposed:
            return tokens
    return [*tokens, next(draws)]


def _cut(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """``tokens`` up to the first of ``stop_ids``, which is kept."""
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens) - 1)
    return tokens[: end + 1]
