"""Decoding: one token a step, or a proposed block a step. Both give ``Step`` after ``Step`` and have one signature.

The calls check their arguments and compute nothing; the first step reads the prompt.

Speculation changes no output. A proposal is verified in one forward; a proposed token is kept iff it is the token that
the target itself draws at that row, given everything before it. With a greedy sampler the text is therefore the
autoregressive one; with any other sampler every token is one draw from the target's own distribution.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydflash.arguments import an_instance, an_integer, an_iterable
from pydflash.decode.sampling import Sampler, numerics_failed
from pydflash.decode.stats import FinishReason, Stats, Step
from pydflash.drafts import ProposalLength, Proposer
from pydflash.errors import ConfigError
from pydflash.limits import MOST_POSITIONS
from pydflash.runtime import Output, Proposal, Session

__all__ = ["autoregressive", "speculative"]


@dataclass(frozen=True)
class _Request:
    """What a generation is asked for, checked. ``outputs``: what reading ``prompt`` gives, chunk by chunk."""

    session: Session
    prompt: list[int]
    outputs: Iterator[Output]
    sampler: Sampler
    max_tokens: int | None
    stop_ids: frozenset[int]
    cancel: threading.Event | None

    @classmethod
    def checked(
        cls,
        session: Session,
        prompt: Sequence[int],
        sampler: Sampler,
        max_tokens: int | None,
        stop_ids: Iterable[int],
        cancel: threading.Event | None,
    ) -> _Request:
        """From a call's arguments. Raises ConfigError, and what ``Session.prefill`` does."""
        vocab = an_instance(session, Session, "session").model.config.vocab
        if an_instance(sampler, Sampler, "sampler").vocab_size != vocab:
            raise ConfigError(f"the sampler is for {sampler.vocab_size:,} tokens, the session's model has {vocab:,}")
        outputs = session.prefill(prompt)
        most = None if max_tokens is None else an_integer(max_tokens, "max_tokens", 1, sys.maxsize)
        given = an_iterable(stop_ids, "stop_ids")
        stops = frozenset(an_integer(token, "a token of stop_ids", 0, sys.maxsize) for token in given)
        event = None if cancel is None else an_instance(cancel, threading.Event, "cancel")
        return cls(session, [int(token) for token in prompt], outputs, sampler, most, stops, event)

    def room(self, count: int) -> int:
        """Tokens that may be proposed after ``count``: the anchor and the bonus token need a place too."""
        room = self.session.max_context - self.session.length - 1
        if self.max_tokens is not None:
            room = min(room, self.max_tokens - count - 1)
        return max(room, 0)

    def no_proposal(self, room: int, wanted: int) -> str | None:
        """Why nothing was proposed, or None where that needs no word."""
        if not room:
            full = self.session.length + 1 >= self.session.max_context
            return "the context has room for only one more token" if full else None
        return None if wanted else "adaptive: single steps were expected to be faster than a proposal"

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
    the generation before the next step or chunk of the prompt. The call raises ShapeError for an empty prompt or a
    token outside the vocabulary, ContextFull when the prompt does not fit, ConfigError, StateError, SessionClosed; a
    step raises NativeError when the model's numerics fail.
    """
    return _single_steps(_Request.checked(session, prompt, sampler, max_tokens, stop_ids, cancel))


def _single_steps(request: _Request) -> Iterator[Step]:
    session, sampler, history = request.session, request.sampler, list(request.prompt)
    stats = _prefill(request, None, history)
    tokens = history[len(request.prompt) :]
    while True:
        reason = request.reason(tokens, stats.tokens)
        yield Step(tuple(tokens), finish_reason=reason, stats=stats)
        if reason is not None:
            return
        if request.cancelled:
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
    proposer: Proposer,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    draft_max: int | None = None,
    length: ProposalLength | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Step]:
    """Generate after ``prompt``, a proposed block a step; the same tokens as ``autoregressive`` with the same sampler.

    propose -> verify -> accept -> commit. ``draft_max`` limits a proposal (default: ``proposer.limit``); ``length``
    chooses how long it is, and leaves it out where a single step is expected to be faster. Generation is cut exactly at
    ``max_tokens`` or a token of ``stop_ids``, in the middle of a block too; the session then holds everything but the
    last token. ``cancel`` and errors: see ``autoregressive``; ConfigError for a ``draft_max`` below 1.
    """
    longest = an_instance(proposer, Proposer, "proposer").limit
    if draft_max is not None:
        longest = min(an_integer(draft_max, "draft_max", 1, MOST_POSITIONS), longest)
    if length is not None:
        an_instance(length, ProposalLength, "length")
    request = _Request.checked(session, prompt, sampler, max_tokens, stop_ids, cancel)
    return _block_steps(request, proposer, longest, length)


def _block_steps(request: _Request, proposer: Proposer, longest: int, length: ProposalLength | None) -> Iterator[Step]:
    session, history = request.session, list(request.prompt)
    stats = _prefill(request, proposer, history)
    tokens, accepted, drafted = history[len(request.prompt) :], 0, 0
    while True:
        reason = request.reason(tokens, stats.tokens)
        yield Step(tuple(tokens), accepted, drafted, reason, stats)
        if reason is not None:
            return
        if request.cancelled:
            tokens, accepted, drafted = [], 0, 0
            continue
        begin = time.perf_counter()
        room = min(longest, request.room(stats.tokens))
        wanted = longest if length is None else length.choose(room) if room else 0
        fallback = request.no_proposal(room, wanted)
        proposal = _propose(proposer, history, wanted, room)
        proposed = time.perf_counter()
        output = session.forward(tokens[-1:] if proposal is None else proposal, "all")
        tokens = _cut(_accept(proposal, output, request.sampler, history), request.stop_ids)
        verified = time.perf_counter()
        drafted, accepted = 0 if proposal is None else len(proposal) - 1, len(tokens) - 1
        session.commit(len(tokens))
        proposer.commit(len(tokens))
        history += tokens
        now = time.perf_counter()
        if length is not None:
            length.record(drafted, accepted, now - begin)
        stats = stats.after(drafted, accepted, (begin, proposed, verified, now), fallback)


def _propose(proposer: Proposer, history: Sequence[int], wanted: int, room: int) -> Proposal | None:
    """A proposal of ``wanted`` tokens, of which the first ``room`` are verified; None for none."""
    proposal = proposer.propose(history, wanted) if wanted >= 1 and room >= 1 else None
    return None if proposal is None else proposal.first(1 + room)


def _prefill(request: _Request, proposer: Proposer | None, history: list[int]) -> Stats:
    """Read the prompt, tell the proposer, and append the first token to ``history``."""
    begin = time.perf_counter()
    if proposer is not None:
        proposer.flush()  # of an earlier generation in the same session
    for output in request.outputs:
        if proposer is not None:
            proposer.commit(output.count)
        if request.cancelled:
            return Stats(prompt_tokens=request.session.length, prefill_seconds=time.perf_counter() - begin)
    history.append(next(_draws(output, request.sampler, history)))
    return Stats(len(request.prompt), 1, prefill_seconds=time.perf_counter() - begin)


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
