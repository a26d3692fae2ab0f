"""What a run is told reaches the graph under its name, and a cache of replays keeps as many graphs as it may."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from pydflash import ops
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena, Backend, Replay, ReplayCache, Shape, Tensor

ROWS = 100


@pytest.fixture(scope="module")
def numbers(cpu: Backend) -> Iterator[Tensor]:
    """(ROWS, 32) f32 whose row r holds r: the rows that an int32 input asks for tell its values."""
    with_rows = np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], 32, axis=1)
    arena = Arena(cpu, {"numbers": ((ROWS, 32), GGMLType.F32)}, "numbers")
    cpu.write(arena["numbers"], np.ascontiguousarray(with_rows))
    yield arena["numbers"]
    arena.close()


class Echo(Replay):
    """Gives back what each of its nodes was told."""

    def __init__(self, backend: Backend, fields: dict[str, Shape], numbers: Tensor) -> None:
        super().__init__(backend, fields)
        table = numbers.within(self.graph)
        nodes = {name: [self.input(name)] if len(shape) == 1 else self.inputs(name) for name, shape in fields.items()}
        self.told = {
            name: [self.graph.output(ops.get_rows(table, node)) for node in parts] for name, parts in nodes.items()
        }
        self.graph.finish()

    def read(self, name: str) -> list[list[int]]:
        rows = []
        for tensor in self.told[name]:
            out = np.empty(tensor.shape, np.float32)
            self.graph.backend.read(tensor, out)
            rows.append(out[:, 0].astype(int).tolist())
        return rows


LAYOUTS: dict[str, dict[str, Shape]] = {
    "one value": {"last": (1,)},
    "vectors": {"counts": (2,), "last": (1,), "tokens": (16,)},
    "rows of vectors": {"rows": (3, 5)},
    "both, rows between": {"positions": (7,), "rows": (2, 7), "ends": (7,), "features": (4, 3), "last": (1,)},
    "names with blanks": {"context rows": (2, 2), "held 24": (9,)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_reaches_the_nodes_of_its_name(cpu: Backend, numbers: Tensor, layout: str) -> None:
    fields, rng = LAYOUTS[layout], np.random.default_rng(1)
    replay = Echo(cpu, fields, numbers)
    for _ in range(3):
        told = {name: rng.integers(0, ROWS, shape) for name, shape in fields.items()}
        for name, values in told.items():
            replay.values[name][...] = values
        replay.run()
        for name, values in told.items():
            assert replay.read(name) == np.atleast_2d(values).tolist(), name
    replay.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_int32_of_the_declared_shapes_and_share_nothing(cpu: Backend, numbers: Tensor, layout: str) -> None:
    fields = LAYOUTS[layout]
    replay = Echo(cpu, fields, numbers)
    assert {name: values.shape for name, values in replay.values.items()} == fields
    assert {values.dtype for values in replay.values.values()} == {np.dtype(np.int32)}
    assert not any(values.any() for values in replay.values.values())
    for i, values in enumerate(replay.values.values()):
        values += i + 1
    assert [values.sum() for values in replay.values.values()] == [
        (i + 1) * math.prod(shape) for i, shape in enumerate(fields.values())
    ]
    replay.close()


def test_what_is_not_told_anew_stays(cpu: Backend, numbers: Tensor) -> None:
    replay = Echo(cpu, {"a": (2,), "b": (2, 2)}, numbers)
    replay.run()
    assert (replay.read("a"), replay.read("b")) == ([[0, 0]], [[0, 0], [0, 0]])
    replay.values["a"][:] = 5, 6
    replay.run()
    replay.values["b"][1] = 7, 8
    replay.run()
    assert (replay.read("a"), replay.read("b")) == ([[5, 6]], [[0, 0], [7, 8]])
    replay.close()


def test_values_reach_the_device_with_the_run_and_no_sooner(cpu: Backend, numbers: Tensor) -> None:
    replay = Echo(cpu, {"a": (1,)}, numbers)
    replay.values["a"][:] = 3
    replay.run()
    replay.values["a"][:] = 4
    assert replay.read("a") == [[3]]
    replay.close()


def test_a_field_that_was_not_declared_is_no_input(cpu: Backend) -> None:
    replay = Replay(cpu, {"a": (1,)})
    for ask in (replay.input, replay.inputs):
        with pytest.raises(KeyError, match="b"):
            ask("b")
    replay.close()
    replay.close()


# --- the cache --------------------------------------------------------------------------------------------------------


class Built:
    """Stands for a replay: what it was built for, and whether it was closed."""

    def __init__(self, key: int) -> None:
        self.key, self.closed = key, False

    def close(self) -> None:
        self.closed = True


class Cache:
    """A ReplayCache, and everything that it built."""

    def __init__(self, limit: int | None = None) -> None:
        self.built: list[Built] = []
        self.cache: ReplayCache[int, Built] = ReplayCache(self._build, limit)  # type: ignore[type-var]

    def _build(self, key: int) -> Built:
        if key < 0:
            raise ValueError(key)
        self.built.append(Built(key))
        return self.built[-1]

    def open(self) -> list[int]:
        return [built.key for built in self.built if not built.closed]


def test_a_replay_is_built_when_first_asked_for_and_kept() -> None:
    made = Cache()
    assert [made.cache[key].key for key in (3, 1, 3, 2, 1)] == [3, 1, 3, 2, 1]
    assert [built.key for built in made.built] == made.open() == [3, 1, 2]
    assert list(made.cache) == made.built


def test_beyond_the_limit_the_one_built_first_is_closed() -> None:
    made = Cache(limit=2)
    for key in (1, 2, 1, 3):  # that 1 was used since 2 was built does not keep it
        _ = made.cache[key]
    assert made.open() == [2, 3]
    assert [built.key for built in made.cache] == [2, 3]
    _ = made.cache[1]
    assert made.open() == [3, 1]
    assert [built.key for built in made.built] == [1, 2, 3, 1]


def test_there_are_never_more_than_the_limit_while_one_is_built() -> None:
    """Prefill graphs are large: the old one goes before the new one comes."""
    open_while_building: list[int] = []

    class Counting(Cache):
        def _build(self, key: int) -> Built:
            open_while_building.append(len(self.open()))
            return super()._build(key)

    made = Counting(limit=3)
    for key in range(10):
        _ = made.cache[key]
    assert max(open_while_building) == 2
    assert made.open() == [7, 8, 9]


def test_a_build_that_fails_is_not_kept() -> None:
    made = Cache(limit=3)
    _ = made.cache[1]
    for _ in range(2):
        with pytest.raises(ValueError, match="-1"):
            _ = made.cache[-1]
    assert made.open() == [1]
    assert [built.key for built in made.cache] == [1]


def test_closing_closes_all_and_can_be_done_twice() -> None:
    made = Cache()
    for key in (1, 2, 3):
        _ = made.cache[key]
    made.cache.close()
    made.cache.close()
    assert made.open() == []
    assert list(made.cache) == []
    assert made.cache[1] is made.built[-1]  # what is asked for then is built again
