"""turbo_wht is an orthonormal rotation of each group: the explicit matrix, on every device, for any strides."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import hadamard

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph, Tensor
from tests.helpers import Array, compute, relative

GROUPS = (64, 128, 256)
# log2(256) = 8 levels of additions in float32, each with a relative error of 2^-24 of values that grow to the rms times
# a few: 1e-6 of the rms holds with room.
TOLERANCE = 2e-6


def signs_of(group: int) -> Array:
    return np.random.default_rng(group).choice(np.array([-1, 1], np.float32), (2, group))


def rotation(group: int, signs: Array | None) -> Array:
    """The matrix M of y = M x."""
    matrix = hadamard(group) / np.sqrt(group)
    return matrix if signs is None else signs[1][:, None] * matrix * signs[0][None, :]


def rotated(x: Array, group: int, signs: Array | None, inverse: bool = False) -> Array:
    matrix = rotation(group, signs)
    groups = x.astype(np.float64).reshape(-1, group)
    return (groups @ (matrix if inverse else matrix.T)).reshape(x.shape)


def values(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 61])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_it_equals_the_explicit_matrix(backend: Backend, group: int, inverse: bool, signed: bool, rows: int) -> None:
    x, signs = values(rows, 3, 256), signs_of(group) if signed else None
    leaves = (x,) if signs is None else (x, signs)
    got = compute(backend, lambda x, s=None: ops.turbo_wht(x, group, s, inverse), *leaves)[0]
    assert relative(got, rotated(x, group, signs, inverse)) < TOLERANCE


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_the_inverse_undoes_it(backend: Backend, group: int, signed: bool) -> None:
    x, signs = values(5, 2, 512), signs_of(group)

    def there_and_back(x: Tensor, signs: Tensor) -> Tensor:
        used = signs if signed else None
        return ops.turbo_wht(ops.turbo_wht(x, group, used), group, used, inverse=True)

    assert relative(compute(backend, there_and_back, x, signs)[0], x) < 2 * TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
def test_a_slice_of_wider_rows_is_rotated_where_it_lies(backend: Backend, group: int) -> None:
    x = values(6, 3, 768)
    got = compute(backend, lambda x: ops.turbo_wht(x.slice(-1, 256, 512), group), x)[0]
    assert relative(got, rotated(x[..., 256:512], group, None)) < TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
def test_permuted_axes_are_rotated_where_they_lie(backend: Backend, group: int) -> None:
    x, signs = values(4, 5, 256), signs_of(group)
    got = compute(backend, lambda x, s: ops.turbo_wht(x.permute(1, 0, 2), group, s), x, signs)[0]
    assert relative(got, rotated(x.transpose(1, 0, 2), group, signs)) < TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_does_not_depend_on_the_rows_beside_it(backend: Backend, group: int) -> None:
    x = values(16, 2, 256)
    whole = compute(backend, lambda x: ops.turbo_wht(x, group), x)[0]
    for width in range(1, 16):
        assert np.array_equal(compute(backend, lambda x: ops.turbo_wht(x, group), x[:width])[0], whole[:width])


@pytest.mark.parametrize("group", GROUPS)
def test_lengths_and_products_are_kept(backend: Backend, group: int) -> None:
    x = values(2, 4, 256)
    y = compute(backend, lambda x: ops.turbo_wht(x, group), x)[0].astype(np.float64)
    assert np.allclose(np.sum(y[0] * y[1], -1), np.sum(x[0].astype(np.float64) * x[1], -1), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "group", "signs", "dtype", "words"),
    [
        ((2, 256), 32, None, GGMLType.F32, "64, 128, 256"),
        ((2, 256), 0, None, GGMLType.F32, "64, 128, 256"),
        ((2, 192), 128, None, GGMLType.F32, "does not divide"),
        ((2, 256), 128, (2, 64), GGMLType.F32, "signs"),
        ((2, 256), 128, (1, 128), GGMLType.F32, "signs"),
        ((2, 256), 128, None, GGMLType.F16, "not f32"),
    ],
)
def test_what_does_not_fit_is_refused_before_ggml(
    cpu: Backend, shape: tuple[int, ...], group: int, signs: tuple[int, ...] | None, dtype: GGMLType, words: str
) -> None:
    graph = Graph(cpu, 64)
    x = graph.input(shape, dtype)
    given = None if signs is None else graph.input(signs, GGMLType.F32)
    with pytest.raises(ShapeError, match=words):
        ops.turbo_wht(x, group, given)
    graph.close()


@pytest.mark.cuda
@pytest.mark.parametrize("group", GROUPS)
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, group: int) -> None:
    x, signs = values(33, 4, 256), signs_of(group)
    there, here = (compute(b, lambda x, s: ops.turbo_wht(x, group, s), x, signs)[0] for b in (cuda, cpu))
    assert relative(there, here) < TOLERANCE
