"""What every draft offers to the decode loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydflash.runtime import Proposal, Session

__all__ = ["LoadedDraft", "Proposer"]


@runtime_checkable
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

    def sizes(self) -> Mapping[str, int]:
        """Bytes on the device, by what they are for."""

    def close(self) -> None:
        """Free what it has. Safe to call twice."""


@runtime_checkable
class LoadedDraft(Protocol):
    """A draft of some kind for one model, from which every target session gets a proposer of its own.

    ``path``: its file, or its name where it has none. ``limit``: the most tokens of a proposal. ``taps``: the target's
    layers that a session must capture for it.
    """

    @property
    def path(self) -> Path | str: ...
    @property
    def limit(self) -> int: ...
    @property
    def taps(self) -> tuple[int, ...]: ...

    def open(self, session: Session) -> Proposer:
        """A proposer beside ``session``, which was opened with ``capture=taps``."""

    def describe(self) -> Sequence[tuple[str, str, str]]:
        """(name, value, where it comes from) of what a user may want to know."""

    def close(self) -> None:
        """Free it. Safe to call twice."""
