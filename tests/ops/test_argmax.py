"""argmax tells a row that has no largest number from one that has."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash import ops
from pydflash.native import Backend
from tests.helpers import compute


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
