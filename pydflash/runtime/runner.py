"""From rows to results: the graphs of a pool of sequences, built for the shapes that occur and run for every step."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS, STEP_ROWS, WIDTHS
from pydflash.models import Model
from pydflash.native import Arena, Backend, Replay, ReplayCache, Shape, Tensor
from pydflash.ops import argmax, get_rows, set_rows
from pydflash.runtime.features import Features
from pydflash.runtime.proposal import DeviceProposal
from pydflash.state import Batch, SequenceMemory, SequencePool

__all__ = ["Head", "Reader", "Rows", "Runner", "StepReplay", "width_for"]

Head = Literal["last", "all", "none"]
"""Rows that the LM head runs for."""

_WIDE_GRAPHS_KEPT = 8  # prefill graphs are large; a long prompt uses them in order of their spans


def width_for(rows: int) -> int:
    """The graph width that holds ``rows``: few distinct ones, so that graphs are reused."""
    return WIDTHS[bisect_left(WIDTHS, rows)]


class Rows(NamedTuple):
    """The rows of one sequence in a step. ``ids``: (count,) tokens, or a proposal on the device. ``start``: the first
    position. ``replay``: rows of its last step that a delta-net layer is to replay."""

    ids: npt.NDArray[np.int32] | DeviceProposal
    start: int
    replay: int
    memory: SequenceMemory


class Reader(Protocol):
    """What still reads the results of a step."""

    def save(self) -> None:
        """They are about to be overwritten."""


class _Shape(NamedTuple):
    """What a graph is built for. ``span``: cache rows, where attention is not paged. ``proposal``: where the tokens lie
    on the device; the arena itself, since another one may get its id."""

    width: int
    sequences: int
    span: int
    head: Head
    keep: bool
    proposal: Arena | None


class StepReplay(Replay):
    """The graph of a step: unless its head is "none" it has ``logits`` (rows, vocab) f32, and every run brings the host
    "argmax", (rows,), and the tokens of a "proposal", (width,). Head "last" has a row for each sequence.
    """

    mask: Tensor | None = None
    logits: Tensor

    def __init__(self, backend: Backend, fields: Mapping[str, Shape], exact_rows: int) -> None:
        super().__init__(backend, fields, exact_rows)
        self.readers: list[weakref.ref[Reader]] = []  # of the last run's results

    def run(self) -> None:
        self._let_save()
        super().run()

    def close(self) -> None:
        self._let_save()
        super().close()

    def _let_save(self) -> None:
        for found in self.readers:
            reader = found()
            if reader is not None:
                reader.save()
        self.readers.clear()


class Runner:
    """Runs steps of the sequences in ``memory``. ``features`` is where captured rows go."""

    def __init__(self, model: Model, memory: SequencePool, capture: Sequence[int], features: Features | None) -> None:
        self._model, self._memory, self._capture, self._features = model, memory, tuple(capture), features
        self._taps = np.arange(len(self._capture), dtype=np.int32)[:, None]
        self.narrow: ReplayCache[_Shape, StepReplay] = ReplayCache(self._build)
        self.wide: ReplayCache[_Shape, StepReplay] = ReplayCache(self._build, _WIDE_GRAPHS_KEPT)

    def run(self, batch: Sequence[Rows], head: Head, keep: bool) -> StepReplay:
        """Run a step, or enqueue it where nothing is asked for; its results are valid until the next of its shape.

        ``keep``: the rows, at most 16 of a sequence, stay pending. A proposal on the device has a step of its own.
        """
        count = sum(len(rows.ids) for rows in batch)
        sequences, ids = self._bucket(len(batch)), batch[0].ids
        width = min(width_for(count), EXACT_ROWS * sequences) if keep else width_for(count)
        proposal = ids if isinstance(ids, DeviceProposal) else None
        shape = _Shape(
            width, sequences, self._span(width, batch[0].start + count), head, keep,
            None if proposal is None else proposal.arena,
        )  # fmt: skip
        step = (self.narrow if keep or width <= EXACT_ROWS else self.wide)[shape]
        first = 0
        for i, rows in enumerate(batch):
            first = self._write(step.values, i, first, rows, wide=not keep)
        if first < width:
            self._write_padding(step.values, first)
        if len(batch) < sequences:
            self._write_unused(step.values, [rows.memory.slot for rows in batch])
        if step.mask is not None:
            self._model.backend.write(step.mask, _causal_mask(step.values["positions"], step.mask.shape[1]))
        step.run()
        if proposal is not None and "proposal" in step.results:
            proposal.arrived(step.results["proposal"])
        return step

    def close(self) -> None:
        """Free the graphs. Safe to call twice."""
        self.narrow.close()
        self.wide.close()

    # --- what a step is told ----------------------------------------------------------------------------------------

    def _write(self, values: dict[str, npt.NDArray[np.int32]], index: int, first: int, rows: Rows, wide: bool) -> int:
        """The rows of sequence ``index`` of the step, from row ``first`` on; returns the row after them."""
        count, memory = len(rows.ids), rows.memory
        end = first + count
        values["counts"][index] = rows.replay, count
        values["state slots"][index] = memory.slot
        values["last"][index] = end - 1
        values["tokens"][first:end] = 0 if isinstance(rows.ids, DeviceProposal) else rows.ids
        positions = np.arange(rows.start, rows.start + count, dtype=np.int32)
        values["positions"][first:end] = positions
        values["rows"][first:end] = memory.rows(rows.start, count)
        if "sequences" in values:
            values["sequences"][first:end] = memory.slot
        if self._features is not None:
            places = self._features.written(positions, memory, wide)
            np.add(places * len(self._capture), self._taps, out=values["features"][:, first:end])
        return end

    def _write_padding(self, values: dict[str, npt.NDArray[np.int32]], first: int) -> None:
        """Rows from ``first`` on belong to nobody."""
        values["tokens"][first:] = values["tokens"][0]
        values["positions"][first:] = -1
        values["rows"][first:] = self._memory.positions
        if "sequences" in values:
            values["sequences"][first:] = values["sequences"][first - 1]
        if self._features is not None:
            values["features"][:, first:] = self._features.padding * len(self._capture) + self._taps

    def _write_unused(self, values: dict[str, npt.NDArray[np.int32]], slots: Sequence[int]) -> None:
        """Sequences behind those in ``slots`` have no rows; a step's slots are all different."""
        count = len(slots)
        others = [slot for slot in range(self._memory.slots) if slot not in slots]
        values["state slots"][count:] = others[: len(values["state slots"]) - count]
        values["counts"][count:] = 0
        values["last"][count:] = 0

    # --- graphs -----------------------------------------------------------------------------------------------------

    def _bucket(self, sequences: int) -> int:
        """Sequences that the graph for so many has: few distinct numbers, so that graphs are reused."""
        return min(1 << (sequences - 1).bit_length(), self._memory.slots)

    def _span(self, width: int, needed: int) -> int:
        """Cache rows that the graph for ``needed`` positions spans: few distinct values, so that graphs are reused."""
        if self._memory.tables is not None:
            return 0
        if width <= EXACT_ROWS and self._model.backend.traits.paged:  # reads no further than a row's own position
            return self._memory.positions
        unit = max(256, 1 << max(0, needed.bit_length() - 3))
        return min(-(-needed // unit) * unit, self._memory.positions)

    def _build(self, shape: _Shape) -> StepReplay:
        width, model = shape.width, self._model
        fields: dict[str, tuple[int, ...]] = {
            "counts": (shape.sequences, 2), "state slots": (shape.sequences,), "last": (shape.sequences,),
            "tokens": (width,), "positions": (width,), "rows": (width,),
        }  # fmt: skip
        if self._capture:
            fields["features"] = (len(self._capture), width)
        if self._memory.tables is not None:
            fields["sequences"] = (width,)
        step = StepReplay(model.backend, fields, STEP_ROWS if shape.keep else EXACT_ROWS)
        graph, tokens = step.graph, step.input("tokens")
        if shape.proposal is not None:
            tokens = shape.proposal["tokens"].within(graph).slice(0, 0, width)
        x, captured = model.network.forward(tokens, self._batch(step, shape), self._memory.state.layers, self._capture)
        if self._features is not None:
            ring = self._features.tensor.within(graph)
            ring = ring.reshape(ring.shape[0] * ring.shape[1], ring.shape[2])
            for residual, ring_rows in zip(captured, step.inputs("features")):
                graph.effect(set_rows(ring, ring_rows, residual))
        graph.effect(x)
        if shape.head != "none":
            step.logits = graph.output(
                model.network.head(x if shape.head == "all" else get_rows(x, step.input("last")))
            )
            results = {"argmax": graph.output(argmax(step.logits))}
            step.read_after(results if shape.proposal is None else results | {"proposal": tokens})
        graph.finish()
        return step

    def _batch(self, step: StepReplay, shape: _Shape) -> Batch:
        graph, tables = step.graph, self._memory.tables
        batch = Batch(
            graph, step.input("positions"), step.input("rows"), step.table("counts"), step.input("state slots"),
            shape.keep,
        )  # fmt: skip
        if tables is not None:
            batch.pages, batch.sequences = tables.within(graph), step.input("sequences")
            return batch
        batch.span = shape.span
        if shape.width > EXACT_ROWS and self._model.config.attention_layers:
            batch.mask = step.mask = graph.input((shape.width, shape.span), GGMLType.F16)
        return batch


def _causal_mask(positions: npt.NDArray[np.int32], span: int) -> npt.NDArray[np.float16]:
    """0 where a row may look, -inf elsewhere; padding looks at slot 0, so that its softmax is defined."""
    reach = np.maximum(positions, 0)[:, None]
    mask: npt.NDArray[Any] = np.where(np.arange(span)[None, :] <= reach, np.float16(0), np.float16(-np.inf))
    return mask
