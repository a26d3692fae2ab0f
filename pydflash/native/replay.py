"""Graphs that are built once and run for every step, and what changes from run to run: int32 inputs, declared once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS
from pydflash.native.backend import Backend
from pydflash.native.graph import Copies, Graph
from pydflash.native.tensor import Shape, Tensor

__all__ = ["Replay", "ReplayCache"]


class Replay:
    """A graph, its inputs and its results. ``values`` holds the inputs on the host, by name, ``results`` what the last
    run gave; ``run`` does all in one piece.
    """

    def __init__(self, backend: Backend, fields: Mapping[str, Shape], exact_rows: int = EXACT_ROWS) -> None:
        """``fields``: name to shape, (n,) or (rows, n), of what each run is told. The graph is yet to be built;
        ``exact_rows`` as there."""
        self.graph = Graph(backend, exact_rows=exact_rows)
        self._fields = dict(fields)
        ends = np.cumsum([math.prod(shape) for shape in fields.values()])
        self._input = self.graph.input((int(ends[-1]),), GGMLType.I32)
        self._values = np.zeros(int(ends[-1]), np.int32)
        pieces = np.split(self._values, ends[:-1])
        self.values: dict[str, npt.NDArray[np.int32]] = {
            name: piece.reshape(shape) for (name, shape), piece in zip(fields.items(), pieces)
        }
        self._starts = dict(zip(fields, [0, *ends[:-1].tolist()]))
        self.results: dict[str, npt.NDArray[np.int32]] = {}
        self._inputs, self._results = Copies([(self._input, self._values)]), Copies()

    def input(self, name: str) -> Tensor:
        """The field ``name``, of shape (n,), as a node of the graph."""
        start = self._starts[name]
        return self._input.slice(0, start, start + self._fields[name][0])

    def inputs(self, name: str) -> list[Tensor]:
        """The rows of the field ``name``, of shape (rows, n), as nodes of the graph."""
        (rows, n), start = self._fields[name], self._starts[name]
        return [self._input.slice(0, start + row * n, start + (row + 1) * n) for row in range(rows)]

    def table(self, name: str) -> Tensor:
        """The field ``name``, of shape (rows, n), as one node of the graph."""
        shape, start = self._fields[name], self._starts[name]
        return self._input.slice(0, start, start + math.prod(shape)).reshape(*shape)

    def read_after(self, results: Mapping[str, Tensor]) -> None:
        """Have every run bring these int32 tensors, outputs of the graph or memory it writes, to ``results``."""
        self.results = {name: np.zeros(tensor.shape, np.int32) for name, tensor in results.items()}
        self._results = Copies([(tensor, self.results[name]) for name, tensor in results.items()])

    def run(self) -> None:
        """Write ``values`` to the device and enqueue one run; wait for it where there are ``results``."""
        self.graph.run(self._inputs, self._results)

    def close(self) -> None:
        """Free the graph. Safe to call twice."""
        self.graph.close()


Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept", bound=Replay)


class ReplayCache(Generic[Key, Kept]):
    """Replays by what their graphs were built for, made when first asked for."""

    def __init__(self, build: Callable[[Key], Kept], limit: int | None = None) -> None:
        """``limit``: as many are kept, those that were built last."""
        self._build, self._limit = build, limit
        self._replays: dict[Key, Kept] = {}

    def __getitem__(self, key: Key) -> Kept:
        if key not in self._replays:
            if self._limit is not None and len(self._replays) >= self._limit:
                self._replays.pop(next(iter(self._replays))).close()
            self._replays[key] = self._build(key)
        return self._replays[key]

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._replays.values())

    def close(self) -> None:
        """Free all graphs. Safe to call twice."""
        for replay in self._replays.values():
            replay.close()
        self._replays.clear()
