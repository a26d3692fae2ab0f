"""From rows to results: the graphs of one session, built for the shapes that occur and run for every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS, WIDTHS
from pydflash.models import Model
from pydflash.native import Arena, Replay, ReplayCache, Tensor
from pydflash.ops import argmax, get_rows, set_rows
from pydflash.runtime.proposal import DeviceProposal
from pydflash.state import Batch, LayerState, SequenceState

__all__ = ["Head", "Rows", "Runner", "StepReplay", "width_for"]

Head = Literal["last", "all", "none"]
"""Rows that the LM head runs for."""

_WIDE_GRAPHS_KEPT = 8  # prefill graphs are large; a long prompt uses them in order of their spans


def width_for(rows: int) -> int:
    """The graph width that holds ``rows``: few distinct ones, so that graphs are reused."""
    return WIDTHS[bisect_left(WIDTHS, rows)]


class Rows(NamedTuple):
    """A step of one sequence. ``ids``: (count,) tokens, or a proposal on the device. ``start``: the first position.
    ``replay``: rows of the last step that a delta-net layer is to replay. ``keep``: the rows stay pending."""

    ids: npt.NDArray[np.int32] | DeviceProposal
    start: int
    replay: int
    head: Head
    keep: bool


class _Shape(NamedTuple):
    """What a graph is built for. ``proposal``: where the tokens lie on the device; the arena itself, since another one
    may get its id."""

    width: int
    span: int
    head: Head
    keep: bool
    proposal: Arena | None


class StepReplay(Replay):
    """The graph of a step: unless its head is "none" it has ``logits`` (rows, vocab) f32, and every run brings the host
    "argmax", (rows,), and the tokens of a "proposal", (width,).
    """

    mask: Tensor | None = None
    logits: Tensor


class Runner:
    """Runs steps of one sequence. ``features`` is where captured rows go: a ring of ``chunk`` rows and one for padding,
    (chunk + 1, layers, hidden) f32."""

    def __init__(
        self,
        model: Model,
        state: SequenceState[LayerState],
        capacity: int,
        capture: Sequence[int],
        features: Tensor | None,
        chunk: int,
    ) -> None:
        """``capacity``: rows of the K/V tables, of which the one behind them takes padding."""
        self._model, self._state, self._capacity = model, state, capacity
        self._capture, self._features, self._chunk = tuple(capture), features, chunk
        self._taps = np.arange(len(self._capture), dtype=np.int32)[:, None]
        self.narrow: ReplayCache[_Shape, StepReplay] = ReplayCache(self._build)
        self.wide: ReplayCache[_Shape, StepReplay] = ReplayCache(self._build, _WIDE_GRAPHS_KEPT)

    def run(self, rows: Rows) -> StepReplay:
        """Run a step, or enqueue it where nothing is asked for; its results are valid until the next of its shape."""
        count = len(rows.ids)
        width = width_for(count)
        arena, ids = (rows.ids.arena, 0) if isinstance(rows.ids, DeviceProposal) else (None, rows.ids)
        shape = _Shape(width, self._span(width, rows.start + count), rows.head, rows.keep, arena)
        step = (self.narrow if width <= EXACT_ROWS else self.wide)[shape]
        values = step.values
        values["counts"][0] = rows.replay, count
        values["last"][0] = count - 1
        tokens, positions, places = values["tokens"], values["positions"], values["rows"]
        tokens[:count] = ids
        positions[:count] = places[:count] = np.arange(rows.start, rows.start + count)
        if count < width:
            tokens[count:], positions[count:], places[count:] = tokens[0], -1, self._capacity
        if self._capture:
            slots = positions % self._chunk
            slots[count:] = self._chunk
            np.add(slots * len(self._capture), self._taps, out=values["features"])
        if step.mask is not None:
            self._model.backend.write(step.mask, _causal_mask(positions, step.mask.shape[1]))
        step.run()
        if isinstance(rows.ids, DeviceProposal) and "proposal" in step.results:
            rows.ids.arrived(step.results["proposal"])
        return step

    def close(self) -> None:
        """Free the graphs. Safe to call twice."""
        self.narrow.close()
        self.wide.close()

    def _span(self, width: int, needed: int) -> int:
        """Cache rows that the graph for ``needed`` positions spans: few distinct values, so that graphs are reused."""
        if width <= EXACT_ROWS and self._model.backend.traits.bounded_spans:
            return self._capacity
        unit = max(256, 1 << max(0, needed.bit_length() - 3))
        return min(-(-needed // unit) * unit, self._capacity)

    def _build(self, shape: _Shape) -> StepReplay:
        width, model = shape.width, self._model
        fields: dict[str, tuple[int, ...]] = {"counts": (1, 2), "state slots": (1,), "last": (1,)}
        fields |= {"tokens": (width,), "positions": (width,), "rows": (width,)}
        if self._capture:
            fields["features"] = (len(self._capture), width)
        step = StepReplay(model.backend, fields)
        graph, tokens = step.graph, step.input("tokens")
        if shape.proposal is not None:
            tokens = shape.proposal["tokens"].within(graph).slice(0, 0, width)
        if width > EXACT_ROWS and model.config.attention_layers:
            step.mask = graph.input((width, shape.span), GGMLType.F16)
        batch = Batch(
            graph, step.input("positions"), step.input("rows"), step.table("counts"), step.input("state slots"),
            shape.span, shape.keep, step.mask,
        )  # fmt: skip
        x, captured = model.network.forward(tokens, batch, self._state.layers, self._capture)
        if self._features is not None:
            ring = self._features.within(graph).reshape((self._chunk + 1) * len(self._capture), model.config.hidden)
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


def _causal_mask(positions: npt.NDArray[np.int32], span: int) -> npt.NDArray[np.float16]:
    """0 where a row may look, -inf elsewhere; padding looks at slot 0, so that its softmax is defined."""
    reach = np.maximum(positions, 0)[:, None]
    mask: npt.NDArray[Any] = np.where(np.arange(span)[None, :] <= reach, np.float16(0), np.float16(-np.inf))
    return mask
