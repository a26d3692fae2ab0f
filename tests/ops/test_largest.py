"""The largest values of a row, the first of equal ones, at every width; a row that has none is told apart."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph
from tests.helpers import Array, compute

# --- argmax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 1000, 2049, 262_145])  # up to more than a CUDA block takes in one go
def test_argmax_takes_the_first_of_equals_at_every_width(backend: Backend, columns: int) -> None:
    x = np.full((16, columns), -np.inf, np.float32)
    first = np.arange(16) * columns // 17
    for row, column in enumerate(first):
        x[row, column :: max(columns // 5, 1)] = row - 8.0  # negative, 0 and positive
    x[8, first[8]] = -0.0  # equals the zeros after it
    for width in (1, 2, 9, 16):
        assert np.array_equal(compute(backend, ops.argmax, x[:width])[0], first[:width])


def test_argmax_of_random_rows(backend: Backend) -> None:
    x = np.random.default_rng(2).standard_normal((5, 100_000)).astype(np.float32)
    assert np.array_equal(compute(backend, ops.argmax, x)[0], x.argmax(axis=1))


@pytest.mark.parametrize("columns", [1, 7, 1000, 2049, 248_320])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_argmax_reports_a_row_without_a_largest_number_wherever_it_is(
    backend: Backend, columns: int, value: float
) -> None:
    x = np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32)
    wanted = x.argmax(axis=1)
    for row, column in ((1, 0), (5, columns // 2), (15, columns - 1)):
        x[row, column] = value
        wanted[row] = -1
    x[9], wanted[9] = -np.inf, -1
    assert np.array_equal(compute(backend, ops.argmax, x)[0], wanted)
    ids = compute(backend, lambda t: ops.argmax(t, report=False), x)[0]
    assert np.array_equal(ids[wanted >= 0], wanted[wanted >= 0])
    assert ids.min() >= 0
    assert ids.max() < columns


def test_infinities_below_the_largest_number_are_no_failure(backend: Backend) -> None:
    x = np.full((2, 3000), -np.inf, np.float32)
    x[:, 1234] = -1e30
    assert compute(backend, ops.argmax, x)[0].tolist() == [1234, 1234]


# --- top_k ------------------------------------------------------------------------------------------------------------


def rows(count: int) -> Array:
    return np.random.default_rng(3).standard_normal((count, 77)).astype(np.float32)


def selected(values: Array, count: int) -> Array:
    """What top_k gives for distinct values."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count].astype(np.int32)


@pytest.mark.parametrize("k", [1, 3, 8, 77])
def test_top_k_lists_the_largest_in_order(backend: Backend, k: int) -> None:
    x = rows(20)
    assert np.array_equal(compute(backend, lambda t: ops.top_k(t, k), x)[0], selected(x, k))


def test_top_k_takes_the_first_of_equal_values(backend: Backend) -> None:
    x = np.array([[0, 0, 0, 0], [1, 2, 2, 1], [-0.0, 0.0, -1, 0.0], [-np.inf, -np.inf, -np.inf, 1]], np.float32)
    got = compute(backend, lambda t: ops.top_k(t, 3), x)[0]
    assert got.tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 3], [3, 0, 1]]


@pytest.mark.parametrize("garbage", [np.nan, -np.nan, np.inf, -np.inf])
def test_top_k_gives_valid_distinct_indices_for_any_values(backend: Backend, garbage: float) -> None:
    x = rows(4)
    x[1:, ::3] = garbage
    x[3] = garbage
    got = compute(backend, lambda t: ops.top_k(t, 60), x)[0]
    assert got.min() >= 0
    assert got.max() < 77
    assert all(len(set(row)) == 60 for row in got.tolist())
    assert np.array_equal(got[0], selected(x[:1], 60)[0])


def test_top_k_reads_rows_of_a_wider_tensor_where_they_lie(backend: Backend) -> None:
    x = rows(20)
    wider = np.concatenate([x, x + 10], axis=1)
    got = compute(backend, lambda t: ops.top_k(t.slice(1, 0, 77), 5), wider)[0]
    assert np.array_equal(got, selected(x, 5))


@pytest.mark.parametrize(("shape", "k"), [((4, 8), 0), ((4, 8), 9), ((4, 8), -1), ((8,), 2), ((2, 4, 8), 2)])
def test_top_k_of_what_does_not_fit_is_refused_before_ggml(cpu: Backend, shape: tuple[int, ...], k: int) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="top_k"):
        ops.top_k(graph.input(shape, GGMLType.F32), k)
    with pytest.raises(ShapeError, match="top_k"):
        ops.top_k(graph.input((4, 8), GGMLType.F16), 2)
    graph.close()
