"""What every draft offers to the decode loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydflash.runtime import Proposal

__all__ = ["Proposer"]


class Proposer(Protocol):
    """Proposes tokens for one target session, and is told what became of them."""

    @property
    def limit(self) -> int:
        """The most tokens of a proposal."""

    def propose(self, history: Sequence[int], count: int) -> Proposal | None:
        """Up to ``count`` tokens, 1 to ``limit``, after ``history``, all tokens so far; None for none.

        The last of the history, the anchor, is the first of the proposal; the target has not seen it yet.
        """

    def commit(self, n: int) -> None:
        """The first ``n`` rows of the target's last forward were committed."""

    def flush(self) -> None:
        """Take up what waits for the next proposal, before a target forward of more than 16 rows."""

    def reset(self) -> None:
        """Forget the text, together with the target's reset."""

    def close(self) -> None:
        """Free what it has. Safe to call twice."""
