"""What a generation decides step by step, and what it has cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["FinishReason", "Stats", "Step", "collect"]

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
