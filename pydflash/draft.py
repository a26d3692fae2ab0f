"""A loaded draft, and the session that proposes with it beside a target session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash import ops
from pydflash.backend import Arena
from pydflash.device_lock import DeviceLock, closing, exclusive
from pydflash.errors import ConfigError, DraftMismatch, SessionClosed, ShapeError, StateError
from pydflash.ggml_types import GGMLType
from pydflash.gguf import GGUFFile
from pydflash.graph import Graph
from pydflash.models import Model
from pydflash.models.dflash import DFlash, DraftConfig, tensor_names
from pydflash.session import Proposal, Session, width_for
from pydflash.snapshot import FORMAT, DraftFingerprint, Snapshot, check_fingerprint, host_arrays
from pydflash.state import DraftCache, DraftInputs
from pydflash.tensor import Tensor
from pydflash.weights import Progress, Weights, find_tensors
from pydflash.width import Costs

__all__ = ["Draft", "DraftSession", "load_draft"]


class Draft:
    """A loaded draft: immutable weights on its target's device. ``close()`` (or ``with``) frees them."""

    def __init__(self, file: GGUFFile, target: Model, config: DraftConfig, weights: Weights, network: DFlash) -> None:
        self.file, self.target, self.config, self.weights, self.network = file, target, config, weights, network
        self.path = file.path

    @cached_property
    def digest(self) -> str:
        """:meth:`GGUFFile.fingerprint_digest` of the file: what a snapshot knows the draft by."""
        return self.file.fingerprint_digest()

    @property
    def lock(self) -> DeviceLock:
        return self.target.backend.lock

    @closing
    def close(self) -> None:
        """Free the weights, after the step that runs. Safe to call twice."""
        self.weights.close()
        self.file.close()

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load_draft(
    path: str | Path, target: Model, progress: Progress | None = None, *, causal: bool | None = None
) -> Draft:
    """Load a DFlash draft (GGUF) for ``target``, in llama.cpp's layout or the other one in the wild.

    ``causal`` overrides whether rows of a block see only earlier rows. Raises LoadError; DraftMismatch when it does not
    fit the target, naming both values.
    """
    file = GGUFFile.open(path)
    try:
        config = DraftConfig.read(file, causal)
        config.check_target(file.path, target.config.layers, target.config.hidden, target.config.vocab)
        _check_vocabulary(file, target)
        names = tensor_names(file, config.tensors())
        infos = find_tensors(file, {names[name]: shape for name, shape in config.tensors().items()})
        weights = Weights(file, infos, target.backend, progress)
        return Draft(file, target, config, weights, DFlash(config, weights, names))
    except BaseException:
        file.close()
        raise


def _check_vocabulary(file: GGUFFile, target: Model) -> None:
    """A draft that embeds its target's tokenizer must have been made for this vocabulary."""
    tokens = file.metadata.count("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in file.metadata else None
    vocab = target.config.vocab
    if tokens is not None and tokens != vocab:
        raise DraftMismatch(f"{file.path}: the draft's vocabulary holds {tokens} tokens, the target's {vocab}")


class DraftSession:
    """Proposes blocks for a target session opened with ``capture=draft.config.taps``.

    ``keep(n)`` tells it that the first n rows of the target's last forward were committed; ``propose(anchor)`` then
    fills the block that starts at the target's length. ``length``: positions whose features were injected or kept.
    ``costs``: what cycles with this draft took, by width.
    """

    def __init__(self, draft: Draft, target: Session) -> None:
        """Raises ConfigError when the draft was loaded for another model or the session does not capture its layers."""
        if target.model is not draft.target:
            raise ConfigError(
                f"the draft was loaded for {draft.target.path}, another model than the session's, {target.model.path}; "
                "call load_draft(path, session.model)"
            )
        if target.capture != draft.config.taps:
            raise ConfigError(
                f"the target session captures layers {list(target.capture)}, "
                f"the draft needs {list(draft.config.taps)}; "
                "open it with capture=draft.config.taps"
            )
        self.draft, self.target = draft, target
        self.block = draft.config.block_size
        backend = draft.target.backend
        self.cache = DraftCache(backend, draft.config, target.max_context + self.block, fused=target.cache.path.fused)
        self._proposal = Arena(backend, {"tokens": ((ops.EXACT_ROWS,), GGMLType.I32)}, "a proposal")
        self._graphs: dict[tuple[Any, ...], _DraftGraph] = {}
        self.length = 0
        self.costs = Costs()
        self._last: _DraftGraph | None = None
        self._kept = 0  # rows of the target's features that the next proposal injects
        self._sequence = ""  # the target's text that the context is of
        self.closed = False

    @property
    def lock(self) -> DeviceLock:
        """Whose turn it is on the target's device."""
        return self.target.lock

    # --- the context ------------------------------------------------------------------------------------------------

    @exclusive
    def keep(self, n: int) -> None:
        """The first ``n`` rows of the target's last forward were committed: their features become context.

        At most 16 rows wait for the next proposal, which injects them in the same graph; more are injected now.
        Raises StateError when the target has not committed them, has the features of the last of them only, or its last
        forward, of more than 16 rows, may have taken the place of rows that waited.
        """
        self._check_open()
        self._follow()
        if self.length + n != self.target.length:
            raise StateError(
                f"keep({n}): the draft holds {self.length} positions and the target {self.target.length}; "
                "call keep once after every commit, with its count"
            )
        if n > self.target.chunk:
            raise StateError(
                f"keep({n}): the target has the features of its last {self.target.chunk} rows only; forward at most so "
                "many at a time, or open it with a larger chunk"
            )
        if self._kept and n > ops.EXACT_ROWS:
            raise StateError(
                f"keep({n}): {self._kept} rows kept before still wait; call flush() before a forward of more than "
                f"{ops.EXACT_ROWS} rows"
            )
        if self._kept + n > ops.EXACT_ROWS:
            self.flush()
        if n > ops.EXACT_ROWS:
            self._inject(n, self.length)
        else:
            self._kept += n
        self.length += n

    @exclusive
    def flush(self) -> None:
        """Inject rows that wait, without proposing: before a target forward of more than 16 rows."""
        self._check_open()
        if self._kept:
            self._follow()
            self._inject(self._kept, self.length - self._kept)
            self._kept = 0

    def reset(self) -> None:
        """Back to an empty context, together with the target's reset."""
        self._check_open()
        self.length = self._kept = 0

    # --- snapshots --------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> DraftFingerprint:
        """Everything that decides what the bytes of a snapshot mean."""
        config = self.draft.config
        return DraftFingerprint(
            format=FORMAT,
            model=self.draft.target.digest,
            draft=self.draft.digest,
            taps=config.taps,
            windows=config.windows,
            causal=config.causal,
            rope_base=config.rope_base,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
        )

    @exclusive
    def snapshot(self) -> Snapshot:
        """The context, copied to the host, to be restored beside a snapshot that the target gives at the same place.

        Rows that wait for the next proposal are injected first, which changes no bit of it. Raises StateError when the
        context is not that of the target's committed positions, or rows are pending; SessionClosed.
        """
        self._check_open()
        self._check_beside("snapshot")
        self.flush()
        fingerprint = self.fingerprint
        arrays = host_arrays(fingerprint.layout(self.length, 0))
        for tensor, table, slots, values in self._tables(self.length, arrays):
            self.draft.target.backend.read(tensor, table)
            np.take(table, slots, axis=0, out=values)
        return Snapshot(fingerprint, self.target.sequence, self.length, 0, arrays)

    @exclusive
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, after the target was restored from the one taken at the same place.

        Proposals are then those that the other draft session would make. Raises SnapshotMismatch that names the first
        field of the fingerprint to differ, StateError when the target is not at that place, SessionClosed; nothing has
        changed then.
        """
        self._check_open()
        check_fingerprint(snapshot.fingerprint, self.fingerprint)
        if self.target.pending or not self.target.stands_at(snapshot.place):
            raise StateError(
                f"restore: the draft's snapshot belongs to {snapshot.length:,} positions of another text than the "
                f"{self.target.length:,} of the target (pending: {self.target.pending}); restore the target first, "
                "from the snapshot taken beside this one"
            )
        for tensor, table, slots, values in self._tables(snapshot.length, snapshot.arrays):
            table[slots] = values
            self.draft.target.backend.write(tensor, table)
        self.draft.target.backend.synchronize()
        self.length, self._kept, self._sequence = snapshot.length, 0, self.target.sequence

    def _tables(
        self, length: int, arrays: Mapping[str, npt.NDArray[np.uint8]]
    ) -> Iterator[tuple[Tensor, npt.NDArray[np.uint8], npt.NDArray[np.integer], npt.NDArray[np.uint8]]]:
        """For each of ``arrays``, which hold the last positions of ``length``: the tensor, a host array for the used
        beginning of it, the slots there of those positions, and the array."""
        for name, values in arrays.items():
            capacity = self.cache.capacities[self.cache.ring_of[int(name.partition(".")[2])]]
            table = np.zeros((min(length, capacity), values.shape[1]), np.uint8)
            yield self.cache.arena[name], table, np.arange(length - len(values), length) % capacity, values

    # --- proposals --------------------------------------------------------------------------------------------------

    def rows_for(self, count: int) -> int:
        """Rows of a block that is meant to propose ``count`` tokens: the whole block, but on a CPU, where every row
        costs time, no more than hold them. Masks behind a token hardly change its proposal (docs/log.md)."""
        return self.block if self.draft.target.backend.is_cuda else min(self.block, width_for(count + 1))

    @exclusive
    def propose(self, anchor: int, count: int | None = None, rows: int | None = None) -> Proposal:
        """Propose ``count`` tokens (default: the whole block) after ``anchor``, the last token, not yet forwarded.

        ``rows``: of the block that is run, of which the first proposals are kept (default: block_size). The result is
        what ``Session.forward`` takes: 1 + count tokens on the device. Raises StateError when the draft's context is
        not the target's, ShapeError for a token outside the vocabulary, a count outside 1..block_size - 1 or rows
        outside 1 + count..block_size.
        """
        self._check_open()
        limit = self.block - 1
        count = limit if count is None else count
        rows = self.block if rows is None else rows
        if not 1 <= count <= limit:
            raise ShapeError(f"propose: count is {count}; this draft proposes 1..{limit}")
        if not count < rows <= self.block:
            raise ShapeError(f"propose: a block of {rows} rows for {count} tokens; it has {count + 1}..{self.block}")
        if not 0 <= anchor < self.draft.target.config.vocab:
            raise ShapeError(
                f"propose: token id {anchor} is outside the vocabulary of {self.draft.target.config.vocab} tokens"
            )
        self._check_beside("propose")
        graph = self._graph(("propose", rows, self._full_span(self.length + rows)))
        self._set_context(graph, self._kept, self.length - self._kept)
        self._set_block(graph, anchor, self.length)
        graph.run()
        self._kept, self._last = 0, graph
        return Proposal(self._proposal, count + 1)

    @exclusive
    def logits(self) -> npt.NDArray[np.float32]:
        """(rows, vocab) logits of the last proposal's block; row 0, the anchor's, means nothing. StateError before the
        first, SessionClosed."""
        self._check_open()
        if self._last is None or self._last.logits is None:
            raise StateError("logits: nothing was proposed yet")
        out = np.empty(self._last.logits.shape, np.float32)
        self.draft.target.backend.read(self._last.logits, out)
        return out

    @closing
    def close(self) -> None:
        """Free the context and the graphs, after the step that runs. Safe to call twice."""
        if not self.closed:
            for graph in self._graphs.values():
                graph.graph.close()
            self.cache.close()
            self._proposal.close()
            self.closed = True

    def __enter__(self) -> DraftSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- inputs -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise SessionClosed("this draft session was closed; open a new one")
        if self.target.closed:
            raise SessionClosed("the target session of this draft session was closed; open a new pair")
        if self.draft.weights.closed or self.draft.target.weights.closed:
            raise SessionClosed("the draft or the model of this draft session was closed; load both again")

    def _follow(self) -> None:
        """Take a new text of the target when the context is empty; StateError when the context is of another text."""
        if not self.length and not self.target.origin.length:
            self._sequence = self.target.sequence
        if self._sequence != self.target.sequence:
            raise StateError(
                "the target session was reset or restored and its draft session was not; "
                "reset or restore both, the target first"
            )

    def _check_beside(self, what: str) -> None:
        """StateError unless the context is that of the target's positions, all of them committed."""
        self._follow()
        if self.length != self.target.length or self.target.pending:
            raise StateError(
                f"{what}: the draft holds {self.length} positions, "
                f"the target {self.target.length} and {self.target.pending} pending; "
                "commit and keep first"
            )

    def _set_context(self, graph: _DraftGraph, count: int, start: int) -> None:
        """Inputs that inject ``count`` positions from ``start``: positions, rows of the target's features, then table
        rows per ring. Padding falls into padding rows, and so do positions that later ones of the injection
        overwrite."""
        positions, features, *rings = graph.context
        positions[:count] = np.arange(start, start + count)
        positions[count:] = -1
        np.remainder(positions, self.target.chunk, out=features)
        features[count:] = self.target.chunk
        for rows, capacity in zip(rings, self.cache.capacities):
            np.remainder(positions, capacity, out=rows)
            rows[count:] = rows[: max(count - capacity, 0)] = capacity

    def _set_block(self, graph: _DraftGraph, anchor: int, start: int) -> None:
        """Inputs of the block [anchor, MASK, ...] that begins at position ``start``."""
        tokens, positions, ends, *rings = graph.block
        last = start + len(positions) - 1
        tokens[0] = anchor
        positions[:] = np.arange(start, last + 1)
        ends.fill(last)
        for rows, capacity, held in zip(rings, self.cache.capacities, graph.held):
            np.remainder(positions, capacity, out=rows)
            if held is not None:
                # A slot holds the last position up to the block's end that falls into it; negative: none yet.
                np.subtract(last, np.arange(capacity), out=held)
                held %= capacity
                np.subtract(last, held, out=held)

    def _inject(self, count: int, start: int) -> None:
        graph = self._graph(("inject", width_for(count)))
        self._set_context(graph, count, start)
        graph.run()

    # --- graphs -----------------------------------------------------------------------------------------------------

    def _full_span(self, needed: int) -> int:
        """Slots of the full ring that a graph spans: a power of two, so that graphs are few."""
        return max(256, 1 << (needed - 1).bit_length())

    def _graph(self, key: tuple[Any, ...]) -> _DraftGraph:
        if key not in self._graphs:
            kind, *size = key
            self._graphs[key] = self._build_inject(*size) if kind == "inject" else self._build_propose(*size)
        return self._graphs[key]

    def _injection(self, graph: Graph, inputs: Tensor, width: int) -> int:
        """Nodes that inject ``width`` feature rows; returns how many input words they take."""
        rings = len(self.cache.capacities)
        positions, places, *words = (inputs.slice(0, i * width, (i + 1) * width) for i in range(2 + rings))
        kept, taps, hidden = self.target.features.shape
        features = ops.get_rows(self.target.features.within(graph).reshape(kept, taps * hidden), places)
        self.draft.network.inject(features, positions, [words[ring] for ring in self.cache.ring_of], self.cache)
        return (2 + rings) * width

    def _build_inject(self, width: int) -> _DraftGraph:
        graph = Graph(self.draft.target.backend)
        inputs = graph.input(((2 + len(self.cache.capacities)) * width,), GGMLType.I32)
        self._injection(graph, inputs, width)
        graph.finish()
        return _DraftGraph(graph, inputs, width, len(self.cache.capacities))

    def _build_propose(self, T: int, full_span: int) -> _DraftGraph:
        graph, rings = Graph(self.draft.target.backend), len(self.cache.capacities)
        spans = [c if w else min(c, full_span) for c, w in zip(self.cache.capacities, self.cache.windows)]
        ring_words = [span if window else 0 for span, window in zip(spans, self.cache.windows)]
        total = (2 + rings) * ops.EXACT_ROWS + (3 + rings) * T + sum(ring_words)
        inputs = graph.input((total,), GGMLType.I32)
        at = self._injection(graph, inputs, ops.EXACT_ROWS)

        def take(words: int) -> Tensor:
            nonlocal at
            at += words
            return inputs.slice(0, at - words, at)

        tokens, positions, ends = take(T), take(T), take(T)
        rows = [take(T) for _ in range(rings)]
        held = [take(words) if words else None for words in ring_words]
        block = DraftInputs(graph, positions, ends, self.cache.ring_of, rows, spans, held)
        network = self.draft.target.network
        x = self.draft.network.propose(ops.get_rows(network.token_embd, tokens), block, self.cache)
        logits = graph.output(network.output(x))  # the target's head
        ids = ops.argmax(logits, report=False)  # the target embeds them, whatever they are
        proposal = self._proposal["tokens"].within(graph)
        graph.effect(ops.copy_into(proposal.slice(0, 0, 1), tokens.slice(0, 0, 1)))
        graph.effect(ops.copy_into(proposal.slice(0, 1, T), ids.slice(0, 1, T)))
        graph.finish()
        propose = _DraftGraph(graph, inputs, ops.EXACT_ROWS, rings, T, ring_words, logits)
        propose.block[0].fill(self.draft.config.mask_token_id)
        return propose


class _DraftGraph:
    """A persistent graph and its inputs, which are written in one piece. Each is a list of rows of int32.

    ``context`` (2 + rings, width): what is injected. Of a proposal also ``block`` (3 + rings, rows) and ``held``: per
    ring, the position that each slot holds, or None for a ring that is as long as the context.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Tensor,
        width: int,
        rings: int,
        rows: int = 0,
        held: Sequence[int] = (),
        logits: Tensor | None = None,
    ) -> None:
        self.graph, self.inputs, self.logits = graph, inputs, logits
        self._values = np.zeros(inputs.shape, np.int32)
        context, block, *slots = np.split(self._values, np.cumsum([(2 + rings) * width, (3 + rings) * rows, *held]))
        self.context, self.block = list(context.reshape(-1, width)), list(block.reshape(3 + rings, rows))
        self.held = [values if words else None for values, words in zip(slots, held)]

    def run(self) -> None:
        self.graph.backend.write(self.inputs, self._values)
        self.graph.run()
