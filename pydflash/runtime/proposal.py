"""Proposals: an anchor, the last token of a text, and the tokens that a draft expects after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pydflash.errors import ConfigError, SessionClosed
from pydflash.native import Arena, Backend

__all__ = ["DeviceProposal", "HostProposal", "Proposal"]


class Proposal(Protocol):
    """What ``Session.forward`` takes to verify. ``len()`` counts the anchor as well."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """(len,) int32: the anchor, then the proposed tokens."""

    def first(self, count: int) -> Proposal:
        """Of these, the first ``count``."""


class HostProposal:
    """Tokens that the host knows."""

    def __init__(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        self.ids = np.asarray(ids, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> HostProposal:
        return HostProposal(self.ids[:count])


class DeviceProposal:
    """Tokens that lie on the device, where the target reads them."""

    def __init__(self, arena: Arena, count: int) -> None:
        """The first ``count`` of ``arena["tokens"]``, which belongs to the draft session."""
        self.arena, self._count = arena, count
        self._ids: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Copied from the device when first asked for; valid until the draft's next proposal. SessionClosed when the
        draft session was closed."""
        self._check_open()
        if self._ids is None:
            with self.arena.lock.step():  # so that nobody closes the draft session between the check and the copy
                self._check_open()
                ids = np.empty(self._count, np.int32)
                self.arena.backend.read(self.arena["tokens"], ids)
            self._ids = ids
        return self._ids

    def arrived(self, tokens: npt.NDArray[np.int32]) -> None:
        """The step that verified them has copied them to the host: (at least len,) int32."""
        self._ids = tokens[: self._count].copy()

    def first(self, count: int) -> DeviceProposal:
        return DeviceProposal(self.arena, min(count, self._count))

    def check_usable(self, backend: Backend) -> None:
        """ConfigError unless the tokens lie on ``backend``, SessionClosed when the draft session was closed."""
        if self.arena.backend is not backend:
            raise ConfigError("the proposal belongs to another model; forward it in the session that it was made for")
        self._check_open()

    def _check_open(self) -> None:
        if self.arena.closed:
            raise SessionClosed("the draft session of this proposal was closed; propose with one that is open")
