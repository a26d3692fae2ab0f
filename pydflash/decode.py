"""Decoding: one token a step, or a proposed block a step. Both are generators of ``Step`` with the same signature.

Speculation changes no output. A proposal is verified in one forward; a proposed token is kept iff it is the token that
the target itself draws at that row, given everything before it. With a greedy sampler the text is therefore the
autoregressive one; with any other sampler every token is one draw from the target's own law.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from pydflash.draft import DraftSession
from pydflash.errors import ConfigError, ShapeError
from pydflash.sampling import Sampler
from pydflash.session import Output, Proposal, Session
from pydflash.width import Width

__all__ = ["Stats", "Step", "autoregressive", "speculative"]


@dataclass(frozen=True)
class Step:
    """Tokens that one step decided. ``accepted`` of them were proposed; the last one never is (the bonus token).

    No tokens: a chunk of the prompt was read (``by_chunk``).
    """

    tokens: tuple[int, ...]
    accepted: int = 0
    drafted: int = 0


@dataclass
class Stats:
    """What a generation cost. Times are seconds of wall clock.

    ``steps``: target forwards after the prompt. ``drafted``, ``accepted``: proposed tokens and those kept.
    ``accepted_per_position[i]``: how often proposal i was kept, ``drafted_per_position[i]`` how often it was made.
    ``trace``: accepted tokens of each step. ``fallback``: why speculation did not run for some or all steps, or None.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    trace: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    decode_seconds: float = 0.0
    fallback: str | None = None

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

    def record(self, drafted: int, accepted: int) -> None:
        """One verify of ``drafted`` proposals, of which the first ``accepted`` were kept."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        self.trace.append(accepted)
        for counts, upto in ((self.drafted_per_position, drafted), (self.accepted_per_position, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(upto):
                counts[i] += 1


def autoregressive(
    session: Session,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    stats: Stats | None = None,
    by_chunk: bool = False,
) -> Iterator[Step]:
    """Generate after ``prompt``, one token a step, until ``max_tokens``, a token of ``stop_ids`` or a full context.

    The last token yielded is not in the session yet; everything before it is. ``by_chunk``: yield a Step without tokens
    after each chunk of the prompt but the last as well, when the device is done with it. Raises ShapeError for an empty
    prompt, ContextFull when the prompt does not fit.
    """
    stats = stats if stats is not None else Stats()
    history = list(prompt)
    token = yield from _prefill(session, None, prompt, sampler, history, stats, by_chunk)
    while True:
        yield Step((token,))
        if _finished(session, stats, token, max_tokens, stop_ids):
            return
        begin = time.perf_counter()
        output = session.forward([token])
        token = next(_draws(output, sampler, history))
        session.commit(1)
        history.append(token)
        stats.record(0, 0)
        stats.tokens += 1
        stats.verify_seconds += time.perf_counter() - begin
        stats.decode_seconds += time.perf_counter() - begin


def speculative(
    session: Session,
    draft: DraftSession,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    stats: Stats | None = None,
    draft_max: int | None = None,
    adaptive: bool = False,
    by_chunk: bool = False,
) -> Iterator[Step]:
    """Generate after ``prompt``, a proposed block a step; the same tokens as ``autoregressive`` with the same sampler.

    propose -> verify -> accept -> commit. ``draft_max`` limits a proposal (default: block_size - 1); ``adaptive``
    chooses its length from live acceptance and measured cost, and leaves it out where a single step is expected to be
    faster. Generation is cut exactly at ``max_tokens`` or a token of ``stop_ids``, in the middle of a block too; the
    session then holds everything but the last token. ``by_chunk``: see ``autoregressive``. Raises ConfigError for a
    ``draft_max`` below 1.
    """
    if draft_max is not None and draft_max < 1:
        raise ConfigError(f"draft_max is {draft_max}; it must be at least 1")
    longest = draft.block - 1 if draft_max is None else min(draft_max, draft.block - 1)
    width, rows = Width(draft.costs) if adaptive else None, draft.rows_for(longest)
    stats = stats if stats is not None else Stats()
    history = list(prompt)
    anchor = yield from _prefill(session, draft, prompt, sampler, history, stats, by_chunk)
    tokens, accepted, drafted = [anchor], 0, 0
    while True:
        yield Step(tuple(tokens), accepted, drafted)
        if _finished(session, stats, anchor, max_tokens, stop_ids):
            return
        begin = time.perf_counter()
        drafted = min(longest, session.max_context - session.length - 1)
        if drafted < 1:
            stats.fallback = "the context has room for one more token only"
        if max_tokens is not None:
            drafted = min(drafted, max_tokens - stats.tokens - 1)  # the bonus token comes after them
        if width is not None and drafted >= 1:
            drafted = width.choose(drafted)
            rows = draft.rows_for(drafted)
            if not drafted:
                stats.fallback = "adaptive: single steps were expected to be faster than a proposal"
        proposal = draft.propose(anchor, drafted, rows) if drafted >= 1 else None
        proposed = time.perf_counter()
        output = session.forward(proposal or [anchor], "all")
        tokens = _accept(proposal, output, sampler, history)
        verified = time.perf_counter()
        tokens = _cut(tokens, stop_ids)
        accepted, anchor = len(tokens) - 1, tokens[-1]
        session.commit(len(tokens))
        draft.keep(len(tokens))
        history += tokens
        stats.tokens += len(tokens)
        stats.record(drafted, accepted)
        end = time.perf_counter()
        if width is not None:
            width.record(drafted, accepted, end - begin)
        stats.draft_seconds += proposed - begin
        stats.verify_seconds += verified - proposed
        stats.accept_seconds += end - verified
        stats.decode_seconds += end - begin


def _prefill(
    session: Session,
    draft: DraftSession | None,
    prompt: Sequence[int],
    sampler: Sampler,
    history: list[int],
    stats: Stats,
    by_chunk: bool,
) -> Generator[Step, None, int]:
    """Forward the prompt chunk by chunk, hand its features to the draft, and draw the first token."""
    if not len(prompt):
        raise ShapeError("the prompt is empty; give at least one token")
    session.check_room(len(prompt))
    for start in range(0, len(prompt), session.chunk):
        begin = time.perf_counter()
        chunk = prompt[start : start + session.chunk]
        last = start + len(chunk) == len(prompt)
        if draft is not None:
            draft.flush()  # of the chunk before, or of an earlier generation in the same session
        output = session.forward(chunk, "last" if last else "none")
        session.commit(len(chunk))
        if draft is not None:
            draft.keep(len(chunk))
        if last:
            token = next(_draws(output, sampler, history))
        elif by_chunk:
            session.model.backend.synchronize()
        stats.prompt_tokens += len(chunk)
        stats.prefill_seconds += time.perf_counter() - begin
        if by_chunk and not last:
            yield Step(())
    history.append(token)
    stats.tokens += 1
    return token


def _draws(output: Output, sampler: Sampler, history: Sequence[int]) -> Iterator[int]:
    """The target's own token at each row, after ``history`` and those that it drew at the rows before."""
    if not sampler.needs_logits:
        yield from output.argmax.tolist()
        return
    for row in output.logits:
        token = sampler.draw(row, history)
        yield token
        history = [*history, token]


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


def _finished(session: Session, stats: Stats, token: int, max_tokens: int | None, stop_ids: frozenset[int]) -> bool:
    if max_tokens is not None and stats.tokens >= max_tokens:
        return True
    return token in stop_ids or session.length >= session.max_context
