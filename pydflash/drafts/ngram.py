"""Proposals from the text itself: what followed the last occurrence of the same few tokens (prompt lookup).

No model: a text that repeats itself (code that is edited, documents that are quoted) is proposed at no cost, any other
is left alone. Of all lengths of the ending that occurred before, the longest counts, as a suffix automaton would find
it among the lengths of interest (Saxena 2023, Prompt Lookup Decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydflash.arguments import an_instance, an_integer
from pydflash.limits import EXACT_ROWS
from pydflash.runtime import HostProposal, Session, token_ids

__all__ = ["NGramDraft", "NGramProposer"]

LONGEST = 8  # tokens of an ending: longer ones hardly ever decide differently
SHORTEST = 2  # one token occurs again by chance
_MOST_IDS = 2**31 - 1  # of any vocabulary


class NGramProposer:
    """A Proposer that remembers where each ending of ``SHORTEST`` to ``LONGEST`` tokens was seen last."""

    limit = EXACT_ROWS - 1

    def __init__(self) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram to the place after it

    def propose(self, history: Sequence[int], count: int) -> HostProposal | None:
        """What followed the longest ending of ``history`` that occurred before; None when none did."""
        an_integer(count, "count", 1, self.limit)
        self._read(history)
        for length in range(min(LONGEST, len(history)), SHORTEST - 1, -1):
            place = self._ends.get(tuple(history[-length:]))
            if place is not None:
                return HostProposal([history[-1], *self._continuation(place, count)])
        return None

    def _continuation(self, place: int, count: int) -> list[int]:
        """``count`` tokens from ``place``; where the text ends, the passage from ``place`` on repeats."""
        text, period = self._text, len(self._text) - place
        return [text[place + i % period] for i in range(count)]

    def _read(self, history: Sequence[int]) -> None:
        """Note the endings before the last token, whose continuations are known."""
        an_instance(history, Sequence, "history")
        known = len(self._text)
        if self._text[-LONGEST:] != list(history[max(known - LONGEST, 0) : known]):  # another text
            self.reset()
            known = 0
        if known < len(history):
            self._text += token_ids(history[known:], _MOST_IDS, "history").tolist()
        for end in range(max(known, 1), len(self._text)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(self._text[end - length : end])] = end

    def commit(self, n: int) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}

    def flush(self) -> None:
        pass

    def reset(self) -> None:
        self._text, self._ends = [], {}

    def close(self) -> None:
        pass


class NGramDraft:
    """The draft without a model, for any target."""

    path = "ngram"
    limit = NGramProposer.limit
    taps: tuple[int, ...] = ()

    def open(self, session: Session) -> NGramProposer:
        return NGramProposer()

    def describe(self) -> list[tuple[str, str, str]]:
        return [("endings looked up", f"{SHORTEST} to {LONGEST} tokens", "draft")]

    def close(self) -> None:
        pass
