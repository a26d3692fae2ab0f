"""The DFlash draft at work: its loaded file, and the session that proposes with it beside a target session."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pydflash import ops
from pydflash.arguments import an_instance, an_integer
from pydflash.drafts.windows import Windows
from pydflash.errors import ConfigError, DraftMismatch, SessionClosed, StateError
from pydflash.files import GGUFFile
from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS, MOST_POSITIONS
from pydflash.models import Model, Progress, Weights, account, find_tensors
from pydflash.models.dflash import DFlash, DraftConfig, tensor_names
from pydflash.native import Arena, DeviceLock, Replay, ReplayCache, Tensor, closing, exclusive
from pydflash.runtime import DeviceProposal, Session, last_token, width_for
from pydflash.state import (
    FORMAT,
    Fingerprint,
    Ring,
    RingBatch,
    Room,
    SequenceState,
    Snapshot,
    check_fingerprint,
    host_arrays,
)

__all__ = ["Draft", "DraftSession", "load_dflash"]


class Draft:
    """A loaded DFlash draft: immutable weights on its target's device. ``close()`` (or ``with``) frees them."""

    def __init__(
        self,
        file: GGUFFile,
        target: Model,
        config: DraftConfig,
        weights: Weights,
        network: DFlash,
        ignored: tuple[str, ...],
    ) -> None:
        """``ignored``: names in the file that were to stay unused."""
        self.file, self.target, self.config, self.weights, self.network = file, target, config, weights, network
        self.path, self.ignored = file.path, ignored

    @property
    def limit(self) -> int:
        """The most tokens of a proposal."""
        return self.config.block_size - 1

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers that a session must capture."""
        return self.config.taps

    def open(self, session: Session) -> DraftSession:
        """A draft session beside ``session``."""
        return DraftSession(self, session)

    def describe(self) -> list[tuple[str, str, str]]:
        """(name, value, where it comes from), for ``explain``."""
        config = self.config
        return [
            ("block size", str(config.block_size), "draft"),
            ("tapped layers", ", ".join(map(str, config.taps)), "draft"),
            ("windows", ", ".join(str(w) if w else "full" for w in config.windows), "draft"),
            ("causal layers", ", ".join("yes" if c else "no" for c in config.causal), config.causal_source),
            *([("ignored in the draft", ", ".join(self.ignored), "ignore")] if self.ignored else []),
        ]

    @cached_property
    def digest(self) -> str:
        """:meth:`GGUFFile.fingerprint_digest` of the file: how a snapshot identifies the draft."""
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


def load_dflash(
    file: GGUFFile, target: Model, progress: Progress | None, causal: bool | None, ignore: str | Sequence[str] = ()
) -> Draft:
    """A DFlash draft, in llama.cpp's layout or the other one in the wild; the draft owns ``file`` when this returns.

    ``causal`` overrides whether rows of a block see only earlier rows. ``ignore``: patterns of tensors and keys that
    may stay unused. Raises LoadError; DraftMismatch when it does not fit the target, naming both values.
    """
    config = DraftConfig.read(file, causal)
    config.check_target(file.path, target.config.layers, target.config.hidden, target.config.vocab)
    _check_vocabulary(file, target)
    names = tensor_names(file, config.tensors())
    infos = find_tensors(file, {names[name]: shape for name, shape in config.tensors().items()})
    ignored = account(file, file.require("general.architecture", str), infos, config.layers, ignore)
    weights = Weights(file, infos, target.backend, progress)
    return Draft(file, target, config, weights, DFlash(config, weights, names), ignored)


def _check_vocabulary(file: GGUFFile, target: Model) -> None:
    """A draft that embeds its target's tokenizer must have been made for this vocabulary."""
    key = "tokenizer.ggml.tokens"
    if key not in file.metadata:
        return
    tokens, vocab = file.metadata.count(key), target.config.vocab
    if tokens != vocab:
        raise DraftMismatch(f"{file.path}: the draft's vocabulary holds {tokens} tokens, the target's {vocab}")
    listed: list[str] = file.require(key, list)
    token = target.tokenizer.difference(listed)
    if token is not None:
        theirs = target.file.require(key, list)[token]
        raise DraftMismatch(
            f"{file.path}: token {token} is {listed[token]!r} in the draft and {theirs!r} in the target; "
            "take the draft that was made for this model"
        )


class DraftSession:
    """Proposes blocks for a target session opened with ``capture=draft.config.taps``.

    A Proposer: ``commit(n)`` tells it that the first n rows of the target's last forward were committed;
    ``propose(history)`` then fills the block that starts at the target's length. ``length``: positions whose features
    were injected or wait for it. ``limit``: tokens that it proposes at most.
    """

    def __init__(self, draft: Draft, target: Session) -> None:
        """Raises ConfigError when the draft was loaded for another model or the session does not capture its layers."""
        an_instance(draft, Draft, "draft")
        if an_instance(target, Session, "target").model is not draft.target:
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
        target.check_open()
        if draft.weights.closed:
            raise SessionClosed("the draft was closed; load it again")
        self.draft, self.target = draft, target
        self.block = draft.config.block_size
        self.limit = self.block - 1
        backend = draft.target.backend
        room = Room(target.max_context + self.block, target.fused)
        self.state: SequenceState[Ring] = SequenceState(backend, draft.network.remembers(), room)
        self._windows = Windows(self.state.layers)
        self._proposal = Arena(backend, {"tokens": ((EXACT_ROWS,), GGMLType.I32)}, "a proposal")
        self._injections: ReplayCache[int, Replay] = ReplayCache(self._build_injection)
        self._blocks: ReplayCache[tuple[int, int], _BlockReplay] = ReplayCache(self._build_block)
        self.length = 0
        self._last: _BlockReplay | None = None
        self._kept = 0  # rows of the target's features that the next proposal injects
        self._sequence = ""  # the target's text that the context belongs to
        self.closed = False

    @property
    def lock(self) -> DeviceLock:
        """Whose turn it is on the target's device."""
        return self.target.lock

    # --- the context ------------------------------------------------------------------------------------------------

    @exclusive
    def commit(self, n: int) -> None:
        """The first ``n`` rows of the target's last forward were committed: their features become context.

        At most 16 rows wait for the next proposal, which injects them in the same graph; more are injected now.
        Raises StateError when the target has not committed them, has the features of only the last of them, or its last
        forward, of more than 16 rows, may have overwritten rows that waited.
        """
        self._check_open()
        n = an_integer(n, "n", 0, MOST_POSITIONS)
        self._follow()
        if self.length + n != self.target.length:
            raise StateError(
                f"commit({n}): the draft holds {self.length} positions and the target {self.target.length}; "
                "call it once after every commit of the target, with its count"
            )
        if n > self.target.chunk:
            raise StateError(
                f"commit({n}): the target has the features of only its last {self.target.chunk} rows; forward at most "
                "so many at a time, or open it with a larger chunk"
            )
        if self._kept and n > EXACT_ROWS:
            raise StateError(
                f"commit({n}): {self._kept} rows kept earlier still wait; call flush() before a forward of more than "
                f"{EXACT_ROWS} rows"
            )
        if self._kept + n > EXACT_ROWS:
            self.flush()
        if n > EXACT_ROWS:
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

    def sizes(self) -> dict[str, int]:
        """Bytes on the device, by what they are for."""
        return self.state.sizes()

    # --- snapshots --------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that decides what the bytes of a snapshot mean."""
        return Fingerprint(
            FORMAT, self.draft.target.digest, self.draft.digest, self.draft.config.taps, self.state.specs
        )

    @exclusive
    def snapshot(self) -> Snapshot:
        """The context, copied to the host, to be restored together with the target's snapshot of the same place.

        Rows that wait for the next proposal are injected first, which changes no bit. Raises StateError when the
        context is not that of the target's committed positions, or rows are pending; SessionClosed.
        """
        self._check_open()
        self._check_beside("snapshot")
        self.flush()
        fingerprint = self.fingerprint
        arrays = host_arrays(fingerprint.layout(self.length, 0))
        for tensor, offset, piece in self.state.pieces(arrays, self.length):
            self.draft.target.backend.read(tensor, piece, offset)
        return Snapshot(fingerprint, self.target.sequence, self.length, 0, arrays)

    @exclusive
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, after the target was restored from the one taken at the same place.

        Proposals are then those that the other draft session would make. Raises SnapshotMismatch, which names the first
        field of the fingerprint that differs, StateError when the target is not at that place, SessionClosed; nothing
        has changed then.
        """
        self._check_open()
        check_fingerprint(an_instance(snapshot, Snapshot, "snapshot").fingerprint, self.fingerprint)
        if self.target.pending or not self.target.stands_at(snapshot.place):
            raise StateError(
                f"restore: the draft's snapshot belongs to {snapshot.length:,} positions of another text than the "
                f"{self.target.length:,} of the target (pending: {self.target.pending}); restore the target first, "
                "from the snapshot taken beside this one"
            )
        for tensor, offset, piece in self.state.pieces(snapshot.arrays, snapshot.length):
            self.draft.target.backend.write(tensor, piece, offset)
        self.draft.target.backend.synchronize()
        self.length, self._kept, self._sequence = snapshot.length, 0, self.target.sequence

    # --- proposals --------------------------------------------------------------------------------------------------

    @exclusive
    def propose(self, history: Sequence[int], count: int | None = None) -> DeviceProposal:
        """Propose ``count`` tokens (default: ``limit``) after ``history``, whose last token, the anchor, is not yet
        forwarded.

        The rest of the history is in the context. Raises StateError when that is not the target's, ShapeError for an
        anchor outside the vocabulary, ConfigError for a count outside 1..limit.
        """
        self._check_open()
        anchor = last_token(history, self.draft.target.config.vocab)
        count = self.limit if count is None else an_integer(count, "count", 1, self.limit)
        self._check_beside("propose")
        rows = self._rows_for(count)
        block = self._blocks[rows, self._full_span(self.length + rows)]
        waiting = self.length - self._kept
        self._windows.write_injection(block.values, waiting, self.target.feature_rows(waiting, self._kept))
        self._windows.write_block(block.values, anchor, self.length)
        block.run()
        self._kept, self._last = 0, block
        return DeviceProposal(self._proposal, count + 1)

    def _rows_for(self, count: int) -> int:
        """Rows of a block that is meant to propose ``count`` tokens: all, or where every row costs time no more than
        hold them. Masks behind a token hardly change its proposal (docs/log.md, "Short blocks of the draft")."""
        cheap = self.draft.target.backend.traits.cheap_rows
        return self.block if cheap else min(self.block, width_for(count + 1))

    @exclusive
    def logits(self) -> npt.NDArray[np.float32]:
        """(rows, vocab) logits of the last proposal's block; row 0, the anchor's, means nothing. StateError before the
        first, SessionClosed."""
        self._check_open()
        if self._last is None:
            raise StateError("logits: nothing has been proposed yet")
        out = np.empty(self._last.logits.shape, np.float32)
        self.draft.target.backend.read(self._last.logits, out)
        return out

    @closing
    def close(self) -> None:
        """Free the context and the graphs, after the step that runs. Safe to call twice."""
        if not self.closed:
            self._injections.close()
            self._blocks.close()
            self.state.close()
            self._proposal.close()
            self.closed = True

    def __enter__(self) -> DraftSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise SessionClosed("this draft session was closed; open a new one")
        if self.target.closed:
            raise SessionClosed("the target session of this draft session was closed; open a new pair")
        if self.draft.weights.closed or self.draft.target.weights.closed:
            raise SessionClosed("the draft or the model of this draft session was closed; load both again")

    def _follow(self) -> None:
        """Adopt a new text of the target when the context is empty; StateError when it belongs to another text."""
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
                "commit to both first"
            )

    # --- graphs -----------------------------------------------------------------------------------------------------

    @exclusive
    def _inject(self, count: int, start: int) -> None:
        injection = self._injections[width_for(count)]
        self._windows.write_injection(injection.values, start, self.target.feature_rows(start, count))
        injection.run()

    def _full_span(self, needed: int) -> int:
        """Slots of the full ring that a graph spans: a power of two, so that graphs are few."""
        return max(256, 1 << (needed - 1).bit_length())

    def _build_injection(self, width: int) -> Replay:
        replay = Replay(self.draft.target.backend, self._windows.injection_fields(width))
        self._add_injection(replay)
        replay.graph.finish()
        return replay

    def _add_injection(self, replay: Replay) -> None:
        """Nodes that inject feature rows."""
        kept, taps, hidden = self.target.features.shape
        ring = self.target.features.within(replay.graph).reshape(kept, taps * hidden)
        features = ops.get_rows(ring, replay.input("context features"))
        rows = self._windows.parallel(replay.inputs("context rows"))
        self.draft.network.inject(features, replay.input("context positions"), rows, self.state.layers)

    def _build_block(self, shape: tuple[int, int]) -> _BlockReplay:
        (T, full_span), network = shape, self.draft.target.network
        windows = self._windows
        fields = windows.injection_fields(EXACT_ROWS) | windows.block_fields(T)
        replay = _BlockReplay(self.draft.target.backend, fields)
        self._add_injection(replay)
        graph, tokens = replay.graph, replay.input("tokens")
        batches = [
            RingBatch(
                graph, replay.input("positions"), replay.input("ends"), rows,
                capacity if window else min(capacity, full_span), replay.input(f"held {window}") if window else None,
            )
            for window, capacity, rows in zip(windows.windows, windows.capacities, replay.inputs("rows"))
        ]  # fmt: skip
        embedded = ops.get_rows(network.token_embd.within(graph), tokens)
        x = self.draft.network.propose(embedded, windows.parallel(batches), self.state.layers)
        replay.logits = graph.output(network.output(x))  # the target's head
        ids = ops.argmax(replay.logits, report=False)  # the target embeds them, whatever they are
        proposal = self._proposal["tokens"].within(graph)
        graph.effect(ops.copy_into(proposal.slice(0, 0, 1), tokens.slice(0, 0, 1)))
        graph.effect(ops.copy_into(proposal.slice(0, 1, T), ids.slice(0, 1, T)))
        graph.finish()
        replay.values["tokens"].fill(self.draft.config.mask_token_id)
        return replay


class _BlockReplay(Replay):
    """Injects what waits and fills a block; ``logits`` (rows, vocab) f32."""

    logits: Tensor
