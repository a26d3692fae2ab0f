"""A session: one sequence, its caches, and the graphs that extend it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pydflash.backend import Arena
from pydflash.config import SessionConfig
from pydflash.device_lock import DeviceLock, closing, exclusive
from pydflash.errors import ConfigError, ContextFull, NothingPending, SessionClosed, ShapeError, StateError
from pydflash.ggml_types import GGMLType
from pydflash.graph import Graph
from pydflash.kv_format import CACHE_TYPES, k_basis, v_basis
from pydflash.limits import EXACT_ROWS, WIDTHS
from pydflash.models import Model
from pydflash.ops import argmax, get_rows, set_rows
from pydflash.snapshot import FORMAT, Fingerprint, Place, Snapshot, check_fingerprint, host_arrays
from pydflash.state import DeltaState, KVCache, StepInputs, check_pair
from pydflash.tensor import Tensor

__all__ = ["Head", "Output", "Proposal", "Session", "width_for"]

Head = Literal["last", "all", "none"]
"""Rows that the LM head runs for."""

_NOWHERE = Place("", 0)  # where a text that no snapshot began comes from
_WIDE_GRAPHS_KEPT = 8  # prefill graphs are large; a long prompt uses them in order of their spans


def width_for(rows: int) -> int:
    """The graph width that holds ``rows``: few distinct ones, so that graphs are reused."""
    return next(w for w in WIDTHS if w >= rows)


class Proposal:
    """Tokens that lie on the device: an anchor and what a draft proposes after it. ``len()`` counts both."""

    def __init__(self, arena: Arena, count: int) -> None:
        """The first ``count`` of ``arena["tokens"]``, which belongs to the draft session."""
        self.arena, self._count = arena, count
        self._ids: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """(len,) int32, copied from the device when first asked for; valid until the draft's next proposal."""
        if self._ids is None:
            self.check_open()
            self._ids = np.empty(self._count, np.int32)
            self.arena.backend.read(self.arena["tokens"], self._ids)
        return self._ids

    def check_open(self) -> None:
        """SessionClosed when the draft session was closed: the tokens are gone then."""
        if self.arena.closed:
            raise SessionClosed("the draft session of this proposal was closed; propose with one that is open")


class Output:
    """What a forward computed for the rows it was asked for; valid until the session's next forward.

    ``logits``: (rows, vocab) float32, copied from the device when first asked for. ``argmax``: (rows,) int32, the most
    likely token of each row, the first of equal ones; -1 where a logit is NaN or the largest is infinite. ``count``:
    tokens that the step computed.
    """

    def __init__(self, session: Session, graph: _StepGraph, count: int, head: Head) -> None:
        self._session, self._graph, self._serial = session, None if head == "none" else graph, session.serial
        self.count = count
        self._rows = count if head == "all" else 1
        self._logits: npt.NDArray[np.float32] | None = None
        self._argmax: npt.NDArray[np.int32] | None = None

    @property
    def lock(self) -> DeviceLock:
        return self._session.lock

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        if self._logits is None:
            rows = np.empty((self._rows, self._session.model.config.vocab), np.float32)
            self._read("logits", rows)
            self._logits = rows
        return self._logits

    @property
    def argmax(self) -> npt.NDArray[np.int32]:
        if self._argmax is None:
            ids = np.empty(self._rows, np.int32)
            self._read("argmax", ids)
            self._argmax = ids
        return self._argmax

    @exclusive
    def _read(self, name: Literal["logits", "argmax"], out: npt.NDArray[Any]) -> None:
        if self._graph is None:
            raise StateError("the forward ran with logits='none'; ask for 'last' or 'all'")
        self._session.check_open()
        if self._serial != self._session.serial:
            raise StateError("this output belongs to an earlier forward; read logits before the next one")
        self._session.model.backend.read(self._graph.logits if name == "logits" else self._graph.argmax, out)


@dataclass
class _StepGraph:
    """A persistent graph for one (width, span, head, keep)."""

    graph: Graph
    inputs: Tensor  # (3 + (3 + taps) T,) int32: counts, output row, tokens, positions, cache rows, feature rows
    mask: Tensor | None
    logits: Tensor
    argmax: Tensor
    width: int

    def __post_init__(self) -> None:
        self.values = np.zeros(self.inputs.shape, np.int32)  # what the next run's inputs are written from
        rows = self.values[3:].reshape(-1, self.width)
        self.tokens, self.positions, self.rows = rows[:3]
        self.features = rows[3:]  # one row a tap


class Session:
    """A sequence of tokens and everything the model remembers of it.

    ``forward(tokens)`` computes ``len(tokens)`` positions and leaves them pending; ``commit(n)`` keeps the first n of
    them and forgets the rest. At most 16 rows can be kept in part; a wider forward is committed whole.
    ``length``: committed positions. ``pending``: positions computed and not committed. ``capture``: layers whose
    residual stream is left in ``features`` (rows, layers, hidden) for a draft. ``sequence``: a name of its own for each
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
        model. Raises ConfigError, OutOfMemory.
        """
        config, backend = model.config, model.backend
        settings = SessionConfig(max_context, cache_k, cache_v, k_rotation, v_rotation, fused, chunk)
        if not all(0 <= layer < config.layers for layer in capture):
            raise ConfigError(f"capture is {tuple(capture)}; the model has layers 0..{config.layers - 1}")
        k_type, v_type = CACHE_TYPES[settings.cache_k], CACHE_TYPES[settings.cache_v]
        check_pair(k_type, v_type, backend.is_cuda)
        basis = k_basis(k_type, config.head_size, settings.k_rotation)
        v_rotated = v_basis(config.head_size, settings.v_rotation)
        self.model, self.capture = model, tuple(capture)
        self.max_context, self.chunk = settings.max_context, settings.chunk
        self.cache = KVCache(
            backend, config, -(-self.max_context // 256) * 256, k_type, v_type, basis, v_rotated, fused=settings.fused
        )
        self.delta = DeltaState(backend, config)
        self._features = (
            Arena(
                backend,
                {"features": ((self.chunk + 1, len(self.capture), config.hidden), GGMLType.F32)},
                "captured features",
            )
            if self.capture
            else None
        )
        self._taps = np.arange(len(self.capture), dtype=np.int32)[:, None]
        # By width, span, head, keep, and the arena of a proposal: the arena itself, since another one may get its id.
        self._graphs: dict[tuple[int, int, Head, bool, Arena | None], _StepGraph] = {}
        self.length = self.pending = 0
        self.serial = 0  # counts steps, so that an Output knows whether it is still valid
        self._replay = 0  # rows of the last step that the next one replays into the delta-net state
        self._whole = False  # the pending rows are in the delta-net state already
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
        """Compute the next positions and leave them pending. A Proposal is read where it lies, on the device.

        ``logits``: the rows the LM head runs for: 'last', 'all' or 'none'. Raises ShapeError for an empty list or a
        token outside the vocabulary, ContextFull, StateError when rows are pending already, SessionClosed.
        """
        self._check(len(tokens), logits)
        if isinstance(tokens, Proposal):
            tokens.check_open()
            output = self._step(np.zeros(len(tokens), np.int32), 0, logits, keep=True, proposal=tokens)
            self.pending = len(tokens)
            return output
        ids = self._ids(tokens)
        if len(ids) <= EXACT_ROWS:
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

    def prefill(self, tokens: Sequence[int]) -> Iterator[Output]:
        """Read a prompt: forward and commit it, ``chunk`` tokens at a time, yielding the Output of each chunk.

        The last one has the logits of the last token, those before it none; ``output.count`` tokens were committed.
        Raises ShapeError for an empty prompt, ContextFull before the first chunk when it does not fit.
        """
        if not len(tokens):
            raise ShapeError("the prompt is empty; give at least one token")
        self.check_room(len(tokens))
        for start in range(0, len(tokens), self.chunk):
            piece = tokens[start : start + self.chunk]
            output = self.forward(piece, "last" if start + len(piece) == len(tokens) else "none")
            self.commit(len(piece))
            yield output

    @exclusive
    def reset(self) -> None:
        """Back to an empty sequence; the graphs are kept."""
        self.check_open()
        self.delta.arena.clear()
        self.length = self.pending = self._replay = 0
        self._whole = False
        self._begin(_NOWHERE)

    @closing
    def close(self) -> None:
        """Free the caches and the graphs, after the step that runs. Safe to call twice."""
        if not self.closed:
            for step in self._graphs.values():
                step.graph.close()
            self._graphs.clear()
            for arena in (self.cache, self.delta, self._features):
                if arena is not None:
                    arena.close()
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
        config, cache = self.model.config, self.cache
        return Fingerprint(
            format=FORMAT,
            model=self.model.digest,
            cache_k=cache.k_type.name.lower(),
            cache_v=cache.v_type.name.lower(),
            k_basis=cache.basis.name,
            v_basis=cache.v_basis.name,
            rope_base=config.rope_base,
            rope_dims=config.rope_dims,
            attention_layers=config.attention_layers,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            delta_layers=config.delta_layers,
            k_heads=config.k_heads,
            v_heads=config.v_heads,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
        )

    @exclusive
    def snapshot(self) -> Snapshot:
        """What the session remembers, copied to the host: K and V of the committed positions and the delta-net state.

        It holds no logits, so that what is restored goes on with a forward; nor what is a sampler's or a draft's, see
        ``Sampler.state`` and ``DraftSession.snapshot``. Raises StateError while rows are pending, SessionClosed.
        """
        self.check_open()
        if self.pending:
            raise StateError(f"snapshot: {self.pending} positions are pending; commit(n) or commit(0) them first")
        fingerprint = self.fingerprint
        arrays = host_arrays(fingerprint.layout(self.length, self._replay))
        for name, values in arrays.items():
            self.model.backend.read(self._remembered(name), values)
        return Snapshot(fingerprint, self.sequence, self.length, self._replay, arrays)

    @exclusive
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, of this or another session or process; the text so far and pending rows are gone.

        What follows has the same bits as if the other session had gone on, on the same kind of device. ``max_context``,
        ``chunk`` and ``capture`` may differ. A draft session beside this one needs its own snapshot restored next.
        Raises SnapshotMismatch that names the first field of the fingerprint to differ, ContextFull, SessionClosed; the
        session is then as it was.
        """
        self.check_open()
        check_fingerprint(snapshot.fingerprint, self.fingerprint)
        if snapshot.length > self.max_context:
            raise ContextFull(
                f"restore: the snapshot holds {snapshot.length:,} positions and this session {self.max_context:,} at "
                f"most; open it with max_context >= {snapshot.length:,}"
            )
        for name, values in snapshot.arrays.items():
            self.model.backend.write(self._remembered(name), values)
        self.model.backend.synchronize()
        self.length, self._replay = snapshot.length, snapshot.replay
        self.pending, self._whole = 0, False
        self._begin(snapshot.place)

    def stands_at(self, place: Place) -> bool:
        """Whether the committed text is the one that ``place`` names: reached here, or restored and not continued."""
        return self.length == place.length and place in (Place(self.sequence, self.length), self.origin)

    def _remembered(self, name: str) -> Tensor:
        """The tensor of a snapshot's array, which fills the beginning of it."""
        return (self.delta if name.startswith(("state", "window")) else self.cache).arena[name]

    def _begin(self, origin: Place) -> None:
        self.sequence, self.origin = uuid.uuid4().hex, origin

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.closed:
            raise SessionClosed("this session was closed; open a new one")
        if self.model.weights.closed:
            raise SessionClosed("the model of this session was closed; load it again and open a new session")

    def _check(self, count: int, logits: Head) -> None:
        self.check_open()
        if self.pending:
            raise StateError(
                f"{self.pending} positions are pending; commit(n) or commit(0) them before the next forward"
            )
        if logits not in ("last", "all", "none"):
            raise ConfigError(f"logits is {logits!r}; valid values are 'last', 'all', 'none'")
        self.check_room(count)

    def check_room(self, count: int) -> None:
        """ContextFull unless ``count`` more positions fit."""
        if self.length + count > self.max_context:
            raise ContextFull(
                f"{self.length:,} of {self.max_context:,} positions are used and {count:,} more were asked for; "
                f"open the session with max_context >= {self.length + count:,}"
            )

    def _ids(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ShapeError(f"forward needs a non-empty list of token ids; found shape {ids.shape}, dtype {ids.dtype}")
        vocab = self.model.config.vocab
        if ids.min() < 0 or ids.max() >= vocab:
            bad = int(ids[(ids < 0) | (ids >= vocab)][0])
            raise ShapeError(f"token id {bad} is outside the vocabulary of {vocab} tokens")
        return ids.astype(np.int32)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _chunks(self, ids: npt.NDArray[np.int32], logits: Head) -> Output:
        """A wide forward: chunk after chunk, each applied to the state at once."""
        if logits == "all":
            return self._all_logits(ids)
        done = 0
        while True:
            piece = ids[done : done + self.chunk]
            last = done + len(piece) == len(ids)
            output = self._step(piece, done, logits if last else "none", keep=False)
            done += len(piece)
            if last:
                return output

    def _all_logits(self, ids: npt.NDArray[np.int32]) -> Output:
        """A wide forward that keeps every row's logits, on the host."""
        rows: list[npt.NDArray[np.float32]] = []
        likely: list[npt.NDArray[np.int32]] = []
        for done in range(0, len(ids), self.chunk):
            output = self._step(ids[done : done + self.chunk], done, "all", keep=False)
            rows.append(output.logits)
            likely.append(output.argmax)
        output._logits, output._argmax = np.concatenate(rows), np.concatenate(likely)
        return output

    def _step(
        self, ids: npt.NDArray[np.int32], offset: int, head: Head, *, keep: bool, proposal: Proposal | None = None
    ) -> Output:
        """Run one graph for ``ids`` at position ``length + offset``."""
        count = len(ids)
        width = width_for(count)
        start = self.length + offset
        step = self._graph(width, self._span(width, start + count), head, keep, proposal)
        step.values[:3] = self._replay, count, count - 1
        step.tokens[:count] = ids
        step.positions[:count] = step.rows[:count] = np.arange(start, start + count)
        if count < width:
            step.tokens[count:], step.positions[count:], step.rows[count:] = ids[0], -1, self.cache.padding_row
        if self.capture:
            places = step.positions % self.chunk
            places[count:] = self.chunk
            np.add(places * len(self.capture), self._taps, out=step.features)
        backend = self.model.backend
        backend.write(step.inputs, step.values)
        if step.mask is not None:
            backend.write(step.mask, _causal_mask(step.positions, step.mask.shape[1]))
        step.graph.run()
        self.serial += 1
        if not keep:
            self._replay = 0
        return Output(self, step, count, head)

    def _span(self, width: int, needed: int) -> int:
        """Cache rows that the graph for ``needed`` positions spans: few distinct values, so that graphs are reused."""
        if width <= EXACT_ROWS and not self.model.backend.is_cuda:
            return self.cache.capacity  # the CPU's exact attention stops at the row's own position
        unit = max(256, 1 << max(0, needed.bit_length() - 3))
        return min(-(-needed // unit) * unit, self.cache.capacity)

    def _graph(self, width: int, span: int, head: Head, keep: bool, proposal: Proposal | None) -> _StepGraph:
        key = (width, span, head, keep, None if proposal is None else proposal.arena)
        if key not in self._graphs:
            wide = [k for k in self._graphs if k[0] > EXACT_ROWS]
            if width > EXACT_ROWS and len(wide) >= _WIDE_GRAPHS_KEPT:
                self._graphs.pop(wide[0]).graph.close()
            self._graphs[key] = self._build(width, span, head, keep, proposal)
        return self._graphs[key]

    def _build(self, width: int, span: int, head: Head, keep: bool, proposal: Proposal | None) -> _StepGraph:
        graph = Graph(self.model.backend)
        inputs = graph.input((3 + (3 + len(self.capture)) * width,), GGMLType.I32)
        counts, row = inputs.slice(0, 0, 2), inputs.slice(0, 2, 3)
        tokens, positions, rows, *feature_rows = (
            inputs.slice(0, start, start + width) for start in range(3, inputs.shape[0], width)
        )
        if proposal is not None:
            tokens = proposal.arena["tokens"].within(graph).slice(0, 0, width)
        masked = width > EXACT_ROWS and self.model.config.attention_layers
        mask = graph.input((width, span), GGMLType.F16) if masked else None
        step = StepInputs(graph, positions, rows, counts, span, keep, mask)
        network = self.model.network
        x, captured = network.forward(tokens, step, self.cache, self.delta, self.capture)
        for residual, ring_rows in zip(captured, feature_rows):
            ring = self.features.within(graph).reshape((self.chunk + 1) * len(self.capture), residual.shape[1])
            graph.effect(set_rows(ring, ring_rows, residual))
        graph.effect(x)
        logits = ids = x
        if head != "none":
            logits = network.head(x if head == "all" else get_rows(x, row))
            ids = argmax(logits)
            graph.output(logits)
            graph.output(ids)
        graph.finish()
        return _StepGraph(graph, inputs, mask, logits, ids, width)


def _causal_mask(positions: npt.NDArray[np.int32], span: int) -> npt.NDArray[np.float16]:
    """0 where a row may look, -inf elsewhere; padding looks at slot 0, so that its softmax is defined."""
    reach = np.maximum(positions, 0)[:, None]
    mask: npt.NDArray[np.float16] = np.where(np.arange(span)[None, :] <= reach, np.float16(0), np.float16(-np.inf))
    return mask
