"""Several sequences with one memory, and steps of several of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydflash.arguments import an_instance, an_integer, an_iterable, shown
from pydflash.config import SessionConfig
from pydflash.errors import ConfigError, SessionClosed, ShapeError, StateError
from pydflash.limits import EXACT_ROWS, STEP_ROWS
from pydflash.models import Model
from pydflash.native import DeviceLock, closing, exclusive
from pydflash.runtime.output import Output
from pydflash.runtime.proposal import DeviceProposal, Proposal
from pydflash.runtime.runner import Head
from pydflash.runtime.session import Session, forward_together
from pydflash.runtime.shared import Shared, size_for

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["SessionPool"]


class SessionPool:
    """Memory for several sessions of one model, and steps of several of them at once.

    K and V of all sessions lie in pages of 256 positions, which a session takes as it grows and gives back when it is
    reset or closed. ``max_sequences``: sessions that can be open at once. ``cache_tokens``: positions that they hold
    together. Whatever runs beside it, a session computes the bits that it computes in a pool of its own: in steps of up
    to 16 rows those of a ``Session`` opened alone, whose attention in wider steps is ggml's and no exact one.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int | None = None,
        cache_tokens: int | None = None,
        max_context: int = SessionConfig.max_context,
        cache_k: str = SessionConfig.cache_k,
        cache_v: str = SessionConfig.cache_v,
        k_rotation: str = SessionConfig.k_rotation,
        v_rotation: str = SessionConfig.v_rotation,
        fused: bool = SessionConfig.fused,
        chunk: int = SessionConfig.chunk,
        capture: Sequence[int] = (),
    ) -> None:
        """SessionConfig describes the settings; ``max_context`` is that of the longest session. By default, a quarter
        of the free memory is used, and at most 16 sessions can be open.

        Raises ConfigError, OutOfMemory; DeviceError for more than one session on a device that does not page K and V.
        """
        if an_instance(model, Model, "model").weights.closed:
            raise SessionClosed("the model was closed; load it again")
        settings = SessionConfig(max_context, cache_k, cache_v, k_rotation, v_rotation, fused, chunk)
        size = size_for(model, settings, max_sequences, cache_tokens)
        self.model = model
        paged = model.backend.traits.paged
        self._shared = Shared(model, settings, capture, slots=size.sequences, pages=size.pages, paged=paged)

    @property
    def lock(self) -> DeviceLock:
        """Whose turn it is on the device."""
        return self.model.backend.lock

    @property
    def max_sequences(self) -> int:
        """Sessions that can be open at once."""
        return self._shared.memory.slots

    @property
    def cache_tokens(self) -> int:
        """Positions that all sessions hold together."""
        return self._shared.memory.positions

    @property
    def max_context(self) -> int:
        """Positions of the longest session."""
        return self._shared.settings.max_context

    @exclusive
    def session(self, max_context: int | None = None) -> Session:
        """An empty session, of at most ``max_context`` positions (default: the pool's).

        Raises ConfigError for more than the pool's, StateError when ``max_sequences`` are open, SessionClosed.
        """
        self._check_open()
        longest = self.max_context
        chosen = longest if max_context is None else an_integer(max_context, "max_context", 1, longest)
        return Session.sharing(self._shared, chosen)

    @exclusive
    def forward(
        self,
        rows: Sequence[tuple[Session, Sequence[int] | npt.NDArray[np.integer] | Proposal]],
        logits: Head = "last",
    ) -> list[Output]:
        """Compute the next positions of several sessions in one step, and leave them pending in each.

        At most 16 tokens a session and 64 in all. ``logits``, and the outputs, which are those of each session in
        turn: see ``Session.forward``. Raises what it raises, for the first session that cannot; ShapeError for too many
        tokens or none, StateError for a session of another pool or one that is given twice, OutOfMemory when the cache
        lacks pages. Nothing has changed then.
        """
        self._check_open()
        pairs = list(an_iterable(rows, "rows"))
        self._check_pairs(pairs)
        batch = [
            (session, session.rows_of(tokens.ids if isinstance(tokens, DeviceProposal) else tokens, logits))
            for session, tokens in pairs
        ]
        counts = [len(given.ids) for _, given in batch]
        if max(counts) > EXACT_ROWS or sum(counts) > STEP_ROWS:
            raise ShapeError(
                f"a step of {sum(counts)} rows, {max(counts)} of one session; there can be {STEP_ROWS} in all and "
                f"{EXACT_ROWS} of each, so take several steps, and Session.forward for a prompt"
            )
        self._shared.memory.grow([(given.memory, given.start + len(given.ids)) for _, given in batch])
        return forward_together(batch, logits)

    def sizes(self) -> Mapping[str, int]:
        """Bytes on the device, by what they are for."""
        return self._shared.sizes()

    @closing
    def close(self) -> None:
        """Free everything, after the step that runs; sessions of the pool are closed. Safe to call twice."""
        self._shared.close()

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._shared.closed:
            raise SessionClosed("this pool was closed; open a new one")

    def _check_pairs(self, pairs: Sequence[object]) -> None:
        if not pairs:
            raise ShapeError("forward needs at least one session and its tokens; found an empty list")
        sessions: list[Session] = []
        for i, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"rows[{i}] is {shown(pair)}; expected a session and its tokens")
            sessions.append(an_instance(pair[0], Session, f"rows[{i}][0]"))
        for session in sessions:
            if session.shared is not self._shared:
                raise StateError("a session of another pool cannot take part in a step of this one; use its own pool")
        if len(set(map(id, sessions))) < len(sessions):
            raise StateError("a session is given twice; give each all of its tokens at once")
