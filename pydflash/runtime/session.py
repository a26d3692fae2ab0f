"""A session: one sequence and the protocol that extends it."""

from __future__ import annotations

import uuid
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.arguments import an_instance, an_integer, shown
from pydflash.config import SessionConfig
from pydflash.errors import ConfigError, ContextFull, ContextWarning, NothingPending, SessionClosed, StateError
from pydflash.limits import EXACT_ROWS, MOST_POSITIONS, PAGE
from pydflash.models import Model
from pydflash.native import DeviceLock, Tensor, closing, exclusive
from pydflash.runtime.features import Features
from pydflash.runtime.output import Output
from pydflash.runtime.proposal import DeviceProposal, HostProposal, Proposal
from pydflash.runtime.runner import Head, Rows, StepReplay
from pydflash.runtime.shared import Shared
from pydflash.runtime.tokens import token_ids
from pydflash.state import FORMAT, Fingerprint, Place, Snapshot, check_fingerprint, host_arrays, pages_for

__all__ = ["Session", "forward_together"]

_NOWHERE = Place("", 0)  # the origin of a text that did not begin with a snapshot


class Session:
    """A sequence of tokens and everything the model remembers of it.

    ``forward(tokens)`` computes ``len(tokens)`` positions and leaves them pending; ``commit(n)`` keeps the first n of
    them and forgets the rest. At most 16 rows can be kept in part; a wider forward is committed whole.
    ``length``: committed positions. ``pending``: positions computed and not committed. ``capture``: layers whose
    residual stream is left in ``features`` (rows, layers, hidden) for a draft. ``sequence``: a unique name of the
    text, new after a reset or a restore. ``origin``: the place of the snapshot that the text began with.
    """

    def __init__(
        self,
        model: Model,
        max_context: int = SessionConfig.max_context,
        cache_k: str = SessionConfig.cache_k,
        cache_v: str = SessionConfig.cache_v,
        k_rotation: str = SessionConfig.k_rotation,
        v_rotation: str = SessionConfig.v_rotation,
        *,
        fused: bool = SessionConfig.fused,
        chunk: int = SessionConfig.chunk,
        capture: Sequence[int] = (),
    ) -> None:
        """SessionConfig describes the settings. An f32 cache, a basis or a capture must also suit the device and the
        model. Raises ConfigError, OutOfMemory. Warns (ContextWarning) of more positions than the model was trained on.
        """
        an_instance(model, Model, "model")
        if model.weights.closed:
            raise SessionClosed("the model was closed; load it again")
        settings = SessionConfig(max_context, cache_k, cache_v, k_rotation, v_rotation, fused, chunk)
        _warn_beyond(model, settings.max_context)
        shared = Shared(model, settings, capture)
        self._join(shared, settings.max_context, alone=True)

    @classmethod
    def sharing(cls, shared: Shared, max_context: int) -> Session:
        """A session of a pool. StateError when all of its sequences are open."""
        session = cls.__new__(cls)
        session._join(shared, max_context, alone=False)
        return session

    def _join(self, shared: Shared, max_context: int, *, alone: bool) -> None:
        self.shared, self._alone, self._closed = shared, alone, False
        self.model, self.capture, self.cache_format = shared.model, shared.capture, shared.cache_format
        self.max_context, self.chunk, self.fused = max_context, shared.settings.chunk, shared.settings.fused
        self.state = shared.memory.state
        self._memory = shared.memory.open(self)
        self.length = self.pending = 0
        self.serial = 0  # counts steps, so that an Output knows whether it is still valid
        self._replay = 0  # rows of the last step that the next one replays into the delta-net state
        self._whole = False  # whether the pending rows are already in the delta-net state
        self._begin(_NOWHERE)

    @property
    def closed(self) -> bool:
        return self._closed or self.shared.closed

    @property
    def capacity(self) -> int:
        """Positions that its pages can hold."""
        return pages_for(self.max_context) * PAGE

    @property
    def features(self) -> Tensor:
        """(rows, layers, hidden) f32 on the device: captured rows, for whose places ``feature_rows`` is asked.

        A session alone has a ring of ``chunk`` rows, that of position p in row p % chunk. The last row takes padding.
        """
        return self._features.tensor

    def feature_rows(self, start: int, count: int) -> npt.NDArray[np.int32]:
        """Where the features of ``count`` positions from ``start`` on lie, those of the last forward. StateError when
        another session of the pool has overwritten them."""
        return self._features.found(start, count, self._memory)

    @property
    def _features(self) -> Features:
        if self.shared.features is None:
            raise StateError("this session captures no features; open it with capture=<layers>")
        return self.shared.features

    @property
    def lock(self) -> DeviceLock:
        """Whose turn it is on the device: each method is one step there, or waits for one."""
        return self.model.backend.lock

    # --- the protocol -----------------------------------------------------------------------------------------------

    @exclusive
    def forward(self, tokens: Sequence[int] | npt.NDArray[np.integer] | Proposal, logits: Head = "last") -> Output:
        """Compute the next positions and leave them pending. A Proposal is read on the device.

        ``logits``: the rows the LM head runs for: 'last', 'all' or 'none'. Raises ShapeError for an empty list or a
        token outside the vocabulary, ContextFull, StateError when rows are pending already, SessionClosed.
        """
        rows = self.rows_of(tokens, logits)
        self.shared.memory.grow([(self._memory, self.length + len(rows.ids))])
        if isinstance(rows.ids, DeviceProposal) or len(rows.ids) <= EXACT_ROWS:
            (output,) = forward_together([(self, rows)], logits)
            return output
        self._whole = True
        output = self._chunks(rows.ids, logits)
        self.pending = len(rows.ids)
        return output

    def commit(self, n: int) -> None:
        """Keep the first ``n`` pending positions and forget the rest; 0 discards them all.

        Raises NothingPending, or StateError when n is out of range or part of a forward wider than 16 rows.
        """
        self.check_open()
        n = an_integer(n, "n", -MOST_POSITIONS, MOST_POSITIONS)
        if not self.pending:
            raise NothingPending(f"commit({n}) without a forward; nothing is pending")
        if not 0 <= n <= self.pending:
            raise StateError(f"commit({n}): {self.pending} positions are pending; n must lie in 0..{self.pending}")
        if self._whole and n != self.pending:
            raise StateError(
                f"commit({n}): a forward of {self.pending} rows can only be committed whole; "
                f"forward at most {EXACT_ROWS} tokens at a time to be able to keep a part"
            )
        self.length += n
        self._replay = 0 if self._whole else n
        self.pending, self._whole = 0, False

    def prefill(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> Iterator[Output]:
        """Read a prompt: forward and commit it, ``chunk`` tokens at a time, yielding the Output of each chunk.

        The last one has the logits of the last token, those before it none; ``output.count`` tokens were committed.
        The call itself raises what :meth:`check_prompt` does, StateError when rows are pending already, and computes
        nothing yet.
        """
        self._check_ready()
        ids = self.check_prompt(tokens)
        self._reserve(len(ids))
        return self._prefill(ids)

    def _prefill(self, ids: npt.NDArray[np.int32]) -> Iterator[Output]:
        for start in range(0, len(ids), self.chunk):
            piece = ids[start : start + self.chunk]
            output = self.forward(piece, "last" if start + len(piece) == len(ids) else "none")
            self.commit(len(piece))
            yield output

    @exclusive
    def reset(self) -> None:
        """Back to an empty sequence; the graphs are kept."""
        self.check_open()
        self.shared.memory.clear(self._memory)
        self.length = self.pending = self._replay = 0
        self._whole = False
        self._begin(_NOWHERE)

    @closing
    def close(self) -> None:
        """Free the memory, or give it back to the pool, after the step that runs. Safe to call twice."""
        self._closed = True
        self.shared.memory.release(self._memory)
        if self._alone:
            self.shared.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- snapshots --------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that decides what the bytes of a snapshot mean. The first time, it reads a few MiB of the model's
        file."""
        return Fingerprint(FORMAT, self.model.digest, "", (), self.state.specs)

    @exclusive
    def snapshot(self) -> Snapshot:
        """What the session remembers, copied to the host: K and V of the committed positions and the delta-net state.

        It holds no logits: a restored session goes on with a forward. A sampler and a draft session have their own
        state, see ``Sampler.state`` and ``DraftSession.snapshot``. Raises StateError while rows are pending,
        SessionClosed.
        """
        self.check_open()
        if self.pending:
            raise StateError(f"snapshot: {self.pending} positions are pending; commit(n) or commit(0) them first")
        fingerprint = self.fingerprint
        arrays = host_arrays(fingerprint.layout(self.length, self._replay))
        for tensor, offset, piece in self._pieces(arrays, self.length):
            self.model.backend.read(tensor, piece, offset)
        return Snapshot(fingerprint, self.sequence, self.length, self._replay, arrays)

    @exclusive
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, of this or another session or process; the text so far and pending rows are gone.

        What follows has the same bits as if the other session had gone on, on the same kind of device. ``max_context``,
        ``chunk`` and ``capture`` may differ. A draft session beside this one needs its own snapshot restored next.
        Raises SnapshotMismatch, which names the first field of the fingerprint that differs, ContextFull,
        SessionClosed; the session is then unchanged.
        """
        self.check_open()
        check_fingerprint(an_instance(snapshot, Snapshot, "snapshot").fingerprint, self.fingerprint)
        if snapshot.length > self.max_context:
            raise ContextFull(
                f"restore: the snapshot holds {snapshot.length:,} positions and this session {self.max_context:,} at "
                f"most; open it with max_context >= {snapshot.length:,}"
            )
        self.shared.memory.grow([(self._memory, snapshot.length)])
        self.shared.memory.shrink(self._memory, snapshot.length)
        for tensor, offset, piece in self._pieces(snapshot.arrays, snapshot.length):
            self.model.backend.write(tensor, piece, offset)
        self.model.backend.synchronize()
        self.length, self._replay = snapshot.length, snapshot.replay
        self.pending, self._whole = 0, False
        self._begin(snapshot.place)

    def _pieces(
        self, arrays: Mapping[str, npt.NDArray[Any]], length: int
    ) -> Iterator[tuple[Tensor, int, npt.NDArray[np.uint8]]]:
        return self.state.pieces(arrays, length, self._memory.slot, self._memory.pages)

    def stands_at(self, place: Place) -> bool:
        """Whether the committed text is the one that ``place`` names: reached in this session, or restored and not
        continued."""
        an_instance(place, Place, "place")
        return self.length == place.length and place in (Place(self.sequence, self.length), self.origin)

    def _begin(self, origin: Place) -> None:
        self.sequence, self.origin = uuid.uuid4().hex, origin

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this session was closed; open a new one")
        self.shared.check_open()

    def check_prompt(
        self, tokens: Sequence[int] | npt.NDArray[np.integer], *, after: int | None = None
    ) -> npt.NDArray[np.int32]:
        """``tokens`` as (n,) int32, a prompt that fits ``after`` so many positions (default: the committed ones).

        Raises ShapeError for an empty prompt or a token outside the vocabulary, ContextFull, SessionClosed.
        """
        self.check_open()
        ids = token_ids(tokens, self.model.config.vocab, "prompt")
        self._check_room(len(ids), self.length if after is None else an_integer(after, "after", 0, MOST_POSITIONS))
        return ids

    def rows_of(self, tokens: Sequence[int] | npt.NDArray[np.integer] | Proposal, logits: Head) -> Rows:
        """The rows of a forward, once everything about it has been checked; nothing has changed yet."""
        self._check_ready()
        if not isinstance(logits, str) or logits not in ("last", "all", "none"):
            raise ConfigError(f"logits is {shown(logits)}; valid values are 'last', 'all', 'none'")
        if isinstance(tokens, DeviceProposal):
            tokens.check_usable(self.model.backend)
            ids: DeviceProposal | npt.NDArray[np.int32] = tokens
        else:
            ids = token_ids(tokens.ids if isinstance(tokens, HostProposal) else tokens, self.model.config.vocab)
        self._check_room(len(ids), self.length)
        return Rows(ids, self.length, self._replay, self._memory)

    @exclusive
    def _reserve(self, count: int) -> None:
        """Have pages for ``count`` more positions. OutOfMemory."""
        self.shared.memory.grow([(self._memory, self.length + count)])

    def _check_ready(self) -> None:
        self.check_open()
        if self.pending:
            raise StateError(
                f"{self.pending} positions are pending; commit(n) or commit(0) them before the next forward"
            )

    def _check_room(self, count: int, used: int) -> None:
        if used + count > self.max_context:
            raise ContextFull(
                f"{used:,} of {self.max_context:,} positions are used and {count:,} more were asked for; "
                f"open the session with max_context >= {used + count:,}"
            )

    # --- steps ------------------------------------------------------------------------------------------------------

    def _chunks(self, ids: npt.NDArray[np.int32], logits: Head) -> Output:
        """A wide forward: chunk by chunk, each applied to the state at once. All rows' logits come to the host."""
        outputs: list[Output] = []
        for done in range(0, len(ids), self.chunk):
            piece = ids[done : done + self.chunk]
            head = logits if logits == "all" or done + len(piece) == len(ids) else "none"
            self.serial += 1
            rows = Rows(piece, self.length + done, self._replay, self._memory)
            step = self.shared.runner.run([rows], head, keep=False)
            self._replay = 0
            outputs.append(_output(self, step, head, len(piece), 0))
            if logits == "all":
                outputs[-1].fetch()
        return Output.joined(outputs) if logits == "all" else outputs[-1]


def forward_together(batch: Sequence[tuple[Session, Rows]], head: Head) -> list[Output]:
    """One step of sessions that share memory, with at most 16 rows of each; they stay pending."""
    for session, _ in batch:
        session.serial += 1
    step = batch[0][0].shared.runner.run([rows for _, rows in batch], head, keep=True)
    outputs: list[Output] = []
    first = 0
    for i, (session, rows) in enumerate(batch):
        session.pending, session._whole = len(rows.ids), False
        outputs.append(_output(session, step, head, session.pending, first if head == "all" else i))
        first += session.pending
    return outputs


def _output(session: Session, step: StepReplay, head: Head, count: int, first: int) -> Output:
    output = Output(session, step, head, count, first)
    if head != "none":
        step.readers.append(weakref.ref(output))
    return output


def _warn_beyond(model: Model, max_context: int) -> None:
    """Say once, when a session opens, that positions beyond the trained context give worse text."""
    trained = model.config.context
    if 0 < trained < max_context:
        message = (
            f"max_context is {max_context:,}; {model.path} was trained on {trained:,} positions, beyond which its text "
            "gets worse"
        )
        warnings.warn(message, ContextWarning, stacklevel=3)
