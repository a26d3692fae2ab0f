"""A session: one sequence and the protocol that extends it."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pydflash.arguments import an_instance, an_integer, an_iterable, shown
from pydflash.config import SessionConfig
from pydflash.errors import ConfigError, ContextFull, ContextWarning, NothingPending, SessionClosed, StateError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES, k_basis, v_basis
from pydflash.limits import EXACT_ROWS, MOST_POSITIONS
from pydflash.models import Model
from pydflash.native import Arena, DeviceLock, Tensor, closing, exclusive
from pydflash.runtime.output import Output
from pydflash.runtime.proposal import DeviceProposal, HostProposal, Proposal
from pydflash.runtime.runner import Head, Rows, Runner
from pydflash.runtime.tokens import token_ids
from pydflash.state import (
    FORMAT,
    CacheFormat,
    Fingerprint,
    LayerState,
    Place,
    Room,
    SequenceState,
    Snapshot,
    check_fingerprint,
    check_pair,
    host_arrays,
)

__all__ = ["Session"]

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
        config, backend = an_instance(model, Model, "model").config, model.backend
        if model.weights.closed:
            raise SessionClosed("the model was closed; load it again")
        settings = SessionConfig(max_context, cache_k, cache_v, k_rotation, v_rotation, fused, chunk)
        _warn_beyond(model, settings.max_context)
        layers = _layers(capture, config.layers)
        k_type, v_type = CACHE_TYPES[settings.cache_k], CACHE_TYPES[settings.cache_v]
        check_pair(k_type, v_type, backend.traits.cache_types)
        self.cache_format = CacheFormat(
            settings.cache_k,
            settings.cache_v,
            k_basis(k_type, config.head_size, settings.k_rotation).name,
            v_basis(config.head_size, settings.v_rotation).name,
        )
        self.model, self.capture = model, layers
        self.max_context, self.chunk, self.fused = settings.max_context, settings.chunk, settings.fused
        self.capacity = -(-self.max_context // 256) * 256
        self.state: SequenceState[LayerState] = SequenceState(
            backend, model.network.remembers(self.cache_format), Room(self.capacity, settings.fused)
        )
        self._features = _features(model, self.chunk, len(self.capture)) if self.capture else None
        self._runner = Runner(
            model, self.state, self.capacity, self.capture, self.features if layers else None, self.chunk
        )
        self.length = self.pending = 0
        self._serial = 0  # counts steps, so that an Output knows whether it is still valid
        self._replay = 0  # rows of the last step that the next one replays into the delta-net state
        self._whole = False  # whether the pending rows are already in the delta-net state
        self._begin(_NOWHERE)
        self.closed = False

    @property
    def features(self) -> Tensor:
        """(chunk + 1, layers, hidden) f32 on the device: a ring of captured rows, that of position p in row p % chunk.

        The last row takes padding.
        """
        if self._features is None:
            raise StateError("this session captures no features; open it with capture=<layers>")
        return self._features["features"]

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
        self._check_ready()
        if not isinstance(logits, str) or logits not in ("last", "all", "none"):
            raise ConfigError(f"logits is {shown(logits)}; valid values are 'last', 'all', 'none'")
        if isinstance(tokens, DeviceProposal):
            tokens.check_usable(self.model.backend)
            ids: DeviceProposal | npt.NDArray[np.int32] = tokens
        else:
            ids = token_ids(tokens.ids if isinstance(tokens, HostProposal) else tokens, self.model.config.vocab)
        self._check_room(len(ids), self.length)
        if isinstance(ids, DeviceProposal) or len(ids) <= EXACT_ROWS:
            output = self._step(ids, 0, logits, keep=True)
        else:
            self._whole = True
            output = self._chunks(ids, logits)
        self.pending = len(ids)
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
        self.state.clear()
        self.length = self.pending = self._replay = 0
        self._whole = False
        self._begin(_NOWHERE)

    @closing
    def close(self) -> None:
        """Free the caches and the graphs, after the step that runs. Safe to call twice."""
        if not self.closed:
            self._runner.close()
            self.state.close()
            if self._features is not None:
                self._features.close()
            self.closed = True

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
        for name, values in arrays.items():
            self.model.backend.read(self.state.tensor(name), values)
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
        for name, values in snapshot.arrays.items():
            self.model.backend.write(self.state.tensor(name), values)
        self.model.backend.synchronize()
        self.length, self._replay = snapshot.length, snapshot.replay
        self.pending, self._whole = 0, False
        self._begin(snapshot.place)

    def stands_at(self, place: Place) -> bool:
        """Whether the committed text is the one that ``place`` names: reached in this session, or restored and not
        continued."""
        an_instance(place, Place, "place")
        return self.length == place.length and place in (Place(self.sequence, self.length), self.origin)

    def _begin(self, origin: Place) -> None:
        self.sequence, self.origin = uuid.uuid4().hex, origin

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.closed:
            raise SessionClosed("this session was closed; open a new one")
        if self.model.weights.closed:
            raise SessionClosed("the model of this session was closed; load it again and open a new session")

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
            outputs.append(self._step(piece, done, head, keep=False))
            if logits == "all":
                outputs[-1].fetch()
        return Output.joined(outputs) if logits == "all" else outputs[-1]

    def _step(self, ids: npt.NDArray[np.int32] | DeviceProposal, offset: int, head: Head, *, keep: bool) -> Output:
        """Run one graph for ``ids`` at position ``length + offset``."""
        step = self._runner.run(Rows(ids, self.length + offset, self._replay, head, keep))
        self._serial += 1
        if not keep:
            self._replay = 0
        return Output(self.lock, step, len(ids), head, partial(self._check_current, self._serial))

    def _check_current(self, serial: int) -> None:
        self.check_open()
        if serial != self._serial:
            raise StateError("this output belongs to an earlier forward; read logits before the next one")


def _layers(capture: Iterable[int], layers: int) -> tuple[int, ...]:
    """The layers that ``capture`` names, of ``layers``."""
    named = tuple(an_iterable(capture, "capture"))
    if not all(isinstance(layer, int | np.integer) and 0 <= layer < layers for layer in named):
        raise ConfigError(f"capture is {shown(capture)}; the model has layers 0..{layers - 1}")
    return tuple(map(int, named))


def _features(model: Model, chunk: int, layers: int) -> Arena:
    specs = {"features": ((chunk + 1, layers, model.config.hidden), GGMLType.F32)}
    return Arena(model.backend, specs, "captured features")


def _warn_beyond(model: Model, max_context: int) -> None:
    """Say once, when a session opens, that positions beyond the trained context give worse text."""
    trained = model.config.context
    if 0 < trained < max_context:
        message = (
            f"max_context is {max_context:,}; {model.path} was trained on {trained:,} positions, beyond which its text "
            "gets worse"
        )
        warnings.warn(message, ContextWarning, stacklevel=3)
