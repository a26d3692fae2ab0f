"""linear: the product with every weight type, each row exact in its own right."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.limits import STEP_ROWS
from pydflash.native import Backend, Graph
from tests.helpers import Array, Packed, compute, nmse, packed, relative, rounded

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
OUT, IN = 70, 512

# Against numpy with the same rounding of the activations, only the order of float32 sums differs: K = 512 terms of
# relative error 2^-24 each, at most 512 * 6e-8 = 3e-5 of the largest partial sum and typically its square root.
SUMS = 1e-5
# Rounding to 8 bits moves each x by at most peak/254. The peak of 32 (256) normal values is about 2.5 (3.2) of their
# rms, so the step is uniform with an rms of 2.5/127/sqrt(12) = 0.6 % (0.7 %) of the input's, and so is the error of a
# product: squared, 5e-5.
ROUNDING_8_BITS = 1e-4
# ggml's CUDA products multiply the raw 4 or 5 bits of Q4_K and Q5_K and take the block's minimum off afterwards. The
# mean square of 0..15 (0..31) is 3.6 (3.8) times its variance, and so is the squared error of the product.
RAW_OVER_CENTRED = {"q4_k": 3.7, "q5_k": 3.8}
# Eleven and eight bits of mantissa: relative errors uniform up to 2^-11 and 2^-8, squared and averaged.
ROUNDING_NMSE = {"f32": 1e-11, "f16": 2e-7, "bf16": 1e-5}
# CUDA takes activations as f16 and multiplies dequantised weights in f16: 2^-11 for each factor, squared, and as much
# again for the scale and the minimum of a K-quant, which are rounded one by one.
CUDA_NMSE = 2e-6


def operands(name: str, rows: int = 16) -> tuple[Array, Packed]:
    rng = np.random.default_rng(len(name))
    x = rng.standard_normal((rows, IN)).astype(np.float32)
    return x, packed((rng.standard_normal((OUT, IN)) / np.sqrt(IN)).astype(np.float32), name)


@pytest.mark.parametrize("name", TYPES)
def test_it_is_the_dequantised_product_of_the_rounded_activations(cpu: Backend, name: str) -> None:
    x, weight = operands(name)
    got = compute(cpu, ops.linear, x, weight)[0]
    assert relative(got, rounded(x.astype(np.float64), weight.dtype) @ weight.values.T) < SUMS


@pytest.mark.parametrize("name", TYPES)
def test_it_is_the_plain_product_up_to_the_rounding_of_activations(backend: Backend, name: str) -> None:
    x, weight = operands(name)
    got = compute(backend, ops.linear, x, weight)[0]
    bound = (
        max(CUDA_NMSE, ROUNDING_NMSE["bf16"] if name == "bf16" else 0)
        if backend.is_cuda
        else ROUNDING_NMSE.get(name, ROUNDING_8_BITS)
    )
    assert nmse(got, x.astype(np.float64) @ weight.values.T) < bound


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_bit_equal_at_every_width(backend: Backend, name: str) -> None:
    x, weight = operands(name)
    whole = compute(backend, ops.linear, x, weight)[0]
    for width in range(1, 16):
        assert np.array_equal(compute(backend, ops.linear, x[:width], weight)[0], whole[:width]), width


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_bit_equal_at_every_place(backend: Backend, name: str) -> None:
    x, weight = operands(name)
    whole = compute(backend, ops.linear, x, weight)[0]
    for row in range(16):
        assert np.array_equal(compute(backend, ops.linear, x[row : row + 1], weight)[0][0], whole[row]), row
    assert np.array_equal(compute(backend, ops.linear, x[::-1].copy(), weight)[0][::-1], whole)


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_several_sequences_are_bit_equal_to_16_at_a_time(cpu: Backend, name: str) -> None:
    x, weight = operands(name, STEP_ROWS)
    wanted = np.concatenate([compute(cpu, ops.linear, x[i : i + 16], weight)[0] for i in range(0, STEP_ROWS, 16)])
    with Backend("cpu", threads=2) as two:
        for rows in (17, 31, 48, STEP_ROWS):
            for backend in (cpu, two):
                got = compute(backend, ops.linear, x[:rows], weight, exact_rows=STEP_ROWS)[0]
                assert np.array_equal(got, wanted[:rows]), rows


def test_more_rows_than_an_exact_product_takes_are_refused(cpu: Backend) -> None:
    x, weight = operands("f32", STEP_ROWS + 1)
    with pytest.raises(ShapeError, match="more than the 64 rows"):
        compute(cpu, ops.linear, x, weight, exact_rows=1000)


@pytest.mark.parametrize("garbage", [1e30, np.nan, np.inf])
@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k"])
def test_a_row_does_not_see_what_the_other_rows_hold(backend: Backend, name: str, garbage: float) -> None:
    x, weight = operands(name, 4)
    alone = compute(backend, ops.linear, x[:1], weight)[0]
    x[1:] = garbage
    assert np.array_equal(compute(backend, ops.linear, x, weight)[0][:1], alone)


@pytest.mark.parametrize("name", TYPES)
def test_threads_do_not_change_a_bit(cpu: Backend, name: str) -> None:
    x, weight = operands(name)
    with Backend("cpu", threads=2) as two:
        for width in (1, 5, 16):
            assert np.array_equal(*(compute(b, ops.linear, x[:width], weight)[0] for b in (cpu, two)))


@pytest.mark.parametrize("name", TYPES)
def test_wider_steps_agree_with_the_exact_product(backend: Backend, name: str) -> None:
    x, weight = operands(name, 40)
    wide = compute(backend, ops.linear, x, weight)[0]
    exact = np.concatenate([compute(backend, ops.linear, x[i : i + 8], weight)[0] for i in range(0, 40, 8)])
    # Prefill rounds the activations as well, on CUDA to 8 bits where decode keeps f16; on the CPU only the order of
    # sums differs.
    on_cuda = ROUNDING_8_BITS * RAW_OVER_CENTRED.get(name, 1.0)
    assert nmse(wide, exact) < (on_cuda if backend.is_cuda else SUMS**2 + (1e-5 if name == "bf16" else 1e-7))


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_a_wider_tensor_are_read_where_they_lie(backend: Backend, name: str) -> None:
    x, weight = operands(name)
    wider = np.concatenate([x, x + 1], axis=1)
    got = compute(backend, lambda x, w: ops.linear(x.slice(1, 0, IN), w), wider, weight)[0]
    assert np.array_equal(got, compute(backend, ops.linear, x, weight)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("name", TYPES)
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, name: str) -> None:
    x, weight = operands(name)
    there, here = (compute(b, ops.linear, x, weight)[0] for b in (cuda, cpu))
    assert nmse(there, here) < CUDA_NMSE + ROUNDING_NMSE.get(name, ROUNDING_8_BITS)


@pytest.mark.parametrize(
    ("x", "weight"),
    [((4, 64), (8, 96)), ((64,), (8, 64)), ((2, 4, 64), (8, 64)), ((4, 64), (2, 8, 64)), ((4, 64), (64,))],
)
def test_shapes_that_do_not_fit_are_refused_before_ggml(
    cpu: Backend, x: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="do not fit"):
        ops.linear(graph.input(x, GGMLType.F32), graph.input(weight, GGMLType.F32))
    graph.close()


@pytest.mark.parametrize("dtype", [GGMLType.I8, GGMLType.I32, GGMLType.F64, GGMLType.Q8_1, GGMLType.Q8_K])
@pytest.mark.parametrize("rows", [4, 40])
def test_a_type_that_ggml_cannot_multiply_is_refused(cpu: Backend, dtype: GGMLType, rows: int) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="no product"):
        ops.linear(graph.input((rows, 256), GGMLType.F32), graph.input((8, 256), dtype))
    graph.close()


def test_an_activation_that_is_not_f32_is_refused(cpu: Backend) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="no product"):
        ops.linear(graph.input((4, 256), GGMLType.F16), graph.input((8, 256), GGMLType.F32))
    graph.close()
