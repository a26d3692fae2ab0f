"""What a generation gives: chunks as they come, or a completion in one piece."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydflash.decode import FinishReason, Stats, Step
from pydflash.text import TextStream

__all__ = ["Chunk", "Completion", "Piece", "chunk_of"]


@dataclass(frozen=True)
class Piece:
    """Text that became final with one token. ``accepted``: the draft had proposed that token."""

    text: str
    accepted: bool


@dataclass(frozen=True)
class Chunk:
    """What one step added. ``accepted`` says of each token whether the draft had proposed it.

    ``text`` can lag behind ``tokens``: an incomplete character and text that may turn into a stop string are held back.
    ``pieces`` is ``text`` token by token. ``stats`` are those of the generation up to here. ``finish_reason`` is set on
    the last chunk only.
    """

    text: str
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    stats: Stats
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation. ``tokens`` include the token or the stop string that ended it, ``text`` does not."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


def chunk_of(step: Step, text: TextStream) -> Chunk:
    """The chunk of a step, cut at the first stop string; a token that ends the generation is no part of the text."""
    pieces: list[Piece] = []
    tokens, stats, reason = step.tokens, step.stats, step.finish_reason
    for i, token in enumerate(step.tokens):
        certain, stopped = text.push(token, last=reason == "stop" and i == len(step.tokens) - 1)
        pieces.append(Piece(certain, i < step.accepted))
        if stopped:
            tokens, reason = tokens[: i + 1], "stop"
            stats = replace(stats, tokens=stats.tokens - len(step.tokens) + len(tokens))
            break
    else:
        if reason is not None:
            last = pieces.pop() if pieces else Piece("", False)
            pieces.append(Piece(last.text + text.flush(), last.accepted))
    accepted = tuple(i < step.accepted for i in range(len(tokens)))
    return Chunk("".join(p.text for p in pieces), tokens, accepted, tuple(pieces), stats, reason)
