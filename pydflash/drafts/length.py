"""How many tokens to propose: what each length is expected to yield against what it costs."""

from __future__ import annotations

from collections import deque

from pydflash.native import Backend
from pydflash.runtime import width_for

__all__ = ["CycleCosts", "ProposalLength", "adapts"]

_REMEMBERED = 8  # cycles; a slowdown counts when it affects all of them
_TRUSTED = 2  # cycles before a measurement counts: one alone may have been interrupted
# The least share of a cycle's cost that does not depend on its rows (docs/log.md, "The cost of widths not measured
# yet"); on a GPU it is larger.
_FIXED = 0.1
_STALE = 128  # a measurement is dropped after this many cycles of other widths
# Acceptance changes from one passage of a text to the next. These three were chosen by replaying the shipped pair's
# proposals at every position of 200 texts; neighbouring values are within 1 % of them.
_FORGETTING = 0.8  # per proposal
_FADING = 0.9  # per single step
_BEFORE = (1.8, 2.0)  # accepted tokens, of tokens examined, that are assumed before the first


def adapts(asked: bool | None, backend: Backend) -> bool:
    """Whether proposals are of adaptive length: as asked, else only where every verified row costs time (on a CPU)."""
    return not backend.traits.cheap_rows if asked is None else asked


class CycleCosts:
    """Measured seconds of whole cycles, by the width of the graph that verified them; width 1 is a step without a
    proposal.

    They hold from one generation to the next, on the same device with the same draft.
    """

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._unused: dict[int, int] = {}  # cycles since the last one of a width

    def add(self, proposed: int, seconds: float) -> None:
        """A cycle that verified ``proposed`` tokens. The first of a width built its graph and does not count."""
        width = width_for(proposed + 1)
        if width in self._recent:
            self._recent[width].append(seconds)
        else:
            self._recent[width] = deque(maxlen=_REMEMBERED)
        for other, recent in self._recent.items():
            self._unused[other] = 0 if other == width else self._unused[other] + 1
            if self._unused[other] >= _STALE:
                recent.clear()

    def seconds(self, proposed: int) -> float | None:
        """The fastest recent cycle of the width that verifies ``proposed`` tokens, or of a wider one.

        A width without enough measurements is assumed to cost as little as it can, given the next wider one: a tenth of
        that, and its share of the rows of the rest. So it is tried as soon as it might pay. None until this width or a
        wider one has enough.
        """
        width = width_for(proposed + 1)
        known = {w: min(recent) for w, recent in self._recent.items() if w >= width and len(recent) >= _TRUSTED}
        if not known:
            return None
        next_wider = min(known)
        if next_wider == width:
            return min(known.values())
        return known[next_wider] * (_FIXED + (1 - _FIXED) * width / next_wider)


class ProposalLength:
    """The length of each proposal of one generation.

    Each proposed token is assumed to be accepted with the same probability h, if all before it were: the recent share
    of accepted tokens among those that the target examined. A proposal of n then yields 1 + h + h^2 + ... + h^n
    tokens and takes the seconds that CycleCosts knows; the n with the most tokens per second wins. It may be 0, a
    single step. What is known of h fades with single steps too, so that proposals are tried again.
    """

    def __init__(self, costs: CycleCosts) -> None:
        self._costs = costs
        self._accepted = self._examined = 0.0

    def choose(self, longest: int) -> int:
        """How many tokens to propose, 0 to ``longest``; ``longest`` until its cost is known."""
        accepted, examined = _BEFORE
        h = (self._accepted + accepted) / (self._examined + examined)
        best, best_rate = longest, 0.0
        for n in _lengths(longest):
            seconds = self._costs.seconds(n)
            if seconds is None:
                return longest
            rate = sum(h**i for i in range(n + 1)) / seconds
            if rate > best_rate:
                best, best_rate = n, rate
        return best

    def record(self, proposed: int, accepted: int, seconds: float) -> None:
        """A cycle: tokens proposed and accepted, and what it took."""
        self._costs.add(proposed, seconds)
        examined = min(accepted + 1, proposed)  # the target saw no token after the first that it refused
        kept = _FORGETTING if proposed else _FADING
        self._accepted = kept * self._accepted + accepted
        self._examined = kept * self._examined + examined


def _lengths(longest: int) -> list[int]:
    """The lengths that fill a graph together with the anchor, and the longest."""
    return [n for n in range(longest) if width_for(n + 1) == n + 1] + [longest]
