"""top_k and experts: a mixture of experts whose rows do not depend on one another, whatever each has selected."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph, Tensor
from tests.helpers import Array, Packed, compute, nmse, packed, relative, rounded
from tests.reference.qwen35 import silu
from tests.reference.qwen35moe import route

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
EXPERTS, USED, OUT, IN = 9, 3, 70, 512
ROWS = 40  # more than two groups of rows that go through a matrix together

# Against numpy with the same rounding of the activations, only the order of float32 sums differs (test_linear.py).
SUMS = 1e-5
# CUDA multiplies float32 with dequantised weights. The CPU rounds rows to 8 bits for quantised weights and to the
# weights' own type for f16 and bf16: relative errors as in test_linear.py, squared and averaged.
ROUNDING = {"f32": 1e-11, "f16": 2e-7, "bf16": 1e-5}
ROUNDING_8_BITS = 1e-4


def stack(name: str, out: int = OUT, size: int = IN, experts: int = EXPERTS) -> Packed:
    """Matrices (experts, out, size) of type ``name``."""
    rng = np.random.default_rng(len(name) + out)
    flat = packed((rng.standard_normal((experts * out, size)) / np.sqrt(size)).astype(np.float32), name)
    return Packed(flat.data.reshape(experts, out, -1), (experts, out, size), flat.dtype)


def rows(count: int = ROWS, *shape: int) -> Array:
    return np.random.default_rng(3).standard_normal((count, *(shape or (IN,)))).astype(np.float32)


def logits(count: int = ROWS) -> Array:
    return (2 * np.random.default_rng(4).standard_normal((count, EXPERTS))).astype(np.float32)


def selected(values: Array, used: int = USED) -> Array:
    """What top_k gives for distinct values."""
    return np.argsort(-values, axis=1, kind="stable")[:, :used].astype(np.int32)


def products(x: Array, weight: Packed, ids: Array) -> Array:
    """(T, k, M), with the CPU's rounding of x, which is (T, K) or (T, k, K)."""
    x = rounded(x.astype(np.float64), weight.dtype)
    x = x if x.ndim == 3 else np.repeat(x[:, None], ids.shape[1], axis=1)
    return np.einsum("tkmi,tki->tkm", weight.values[ids], x)


def mix(x: Array, weight: Packed, ids: Array, router: Array) -> Array:
    shares = np.stack([route(row.astype(np.float64), ids.shape[1])[1] for row in router])
    return np.einsum("tk,tkm->tm", shares, products(x, weight, ids))


def layer(x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A whole mixture, as a model writes it."""
    ids = ops.top_k(router, USED)
    return ops.mix_experts(ops.swiglu(ops.experts(x, gate, ids), ops.experts(x, up, ids)), down, ids, router)


def layer_leaves(name: str) -> tuple[Packed, Packed, Packed]:
    return stack(name, 256), stack(name, 256), stack(name, OUT, 256)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(IN,), (USED, IN)], ids=["one row for all", "a row for each"])
def test_it_is_the_dequantised_product_with_each_selected_matrix(
    cpu: Backend, name: str, shape: tuple[int, ...]
) -> None:
    x, weight, ids = rows(ROWS, *shape), stack(name), selected(logits())
    assert relative(compute(cpu, ops.experts, x, weight, ids)[0], products(x, weight, ids)) < SUMS


@pytest.mark.parametrize("name", TYPES)
def test_a_mixture_is_their_sum_weighted_by_the_router(cpu: Backend, name: str) -> None:
    x, weight, router = rows(ROWS, USED, IN), stack(name), logits()
    ids = selected(router)
    got = compute(cpu, ops.mix_experts, x, weight, ids, router)[0]
    assert relative(got, mix(x, weight, ids, router)) < SUMS


@pytest.mark.parametrize("name", TYPES)
def test_it_is_the_plain_product_up_to_the_rounding_of_activations(backend: Backend, name: str) -> None:
    x, weight, ids = rows(), stack(name), selected(logits())
    got = compute(backend, ops.experts, x, weight, ids)[0]
    bound = ROUNDING["f32"] if backend.is_cuda else ROUNDING.get(name, ROUNDING_8_BITS)
    assert nmse(got, np.einsum("tkmi,ti->tkm", weight.values[ids], x.astype(np.float64))) < bound


@pytest.mark.parametrize("name", TYPES)
def test_a_product_has_the_bits_of_linear_with_that_expert_s_matrix(cpu: Backend, name: str) -> None:
    x, weight, ids = rows(16), stack(name), selected(logits(16))
    got = compute(cpu, ops.experts, x, weight, ids)[0]
    for expert in range(EXPERTS):
        matrix = Packed(weight.data[expert], weight.shape[1:], weight.dtype)
        alone = compute(cpu, ops.linear, x, matrix)[0]
        for t, j in np.argwhere(ids == expert):
            assert np.array_equal(got[t, j], alone[t]), (expert, t, j)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_bit_equal_at_every_width(backend: Backend, name: str) -> None:
    x, router, leaves = rows(), logits(), layer_leaves(name)
    whole = compute(backend, layer, x, router, *leaves)[0]
    for width in range(1, 17):
        got = compute(backend, layer, x[:width], router[:width], *leaves)[0]
        assert np.array_equal(got, whole[:width]), width


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_bit_equal_at_every_place(backend: Backend, name: str) -> None:
    x, router, leaves = rows(), logits(), layer_leaves(name)
    whole = compute(backend, layer, x, router, *leaves)[0]
    for row in (*range(16), ROWS - 1):
        here = slice(row, row + 1)
        assert np.array_equal(compute(backend, layer, x[here], router[here], *leaves)[0][0], whole[row]), row
    turned = compute(backend, layer, x[::-1].copy(), router[::-1].copy(), *leaves)[0]
    assert np.array_equal(turned[::-1], whole)


@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k"])
def test_it_does_not_matter_which_experts_the_other_rows_select(backend: Backend, name: str) -> None:
    """All rows on the same experts, which others then never see; and each row on experts of its own."""
    x, router, leaves = rows(), logits(), layer_leaves(name)
    alone = compute(backend, layer, x[:1], router[:1], *leaves)[0]
    for others in (router[0], -router[0]):
        together = np.concatenate([router[:1], np.tile(others, (ROWS - 1, 1))])
        assert np.array_equal(compute(backend, layer, x, together, *leaves)[0][:1], alone)
    ids = np.arange(EXPERTS).reshape(3, USED).astype(np.int32)
    apart = compute(backend, ops.experts, x[:3], leaves[0], ids)[0]
    for row in range(3):
        here = slice(row, row + 1)
        assert np.array_equal(compute(backend, ops.experts, x[here], leaves[0], ids[here])[0], apart[here])


@pytest.mark.parametrize("garbage", [1e30, np.nan, np.inf])
@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k"])
def test_a_row_does_not_see_what_the_other_rows_hold(backend: Backend, name: str, garbage: float) -> None:
    x, router, leaves = rows(), logits(), layer_leaves(name)
    alone = compute(backend, layer, x[:1], router[:1], *leaves)[0]
    x[1:], router[1::2] = garbage, garbage
    assert np.array_equal(compute(backend, layer, x, router, *leaves)[0][:1], alone)


@pytest.mark.parametrize("name", TYPES)
def test_threads_do_not_change_a_bit(cpu: Backend, name: str) -> None:
    x, router, leaves = rows(), logits(), layer_leaves(name)
    with Backend("cpu", threads=3) as three:
        for width in (1, 5, 16, ROWS):
            here = (x[:width], router[:width], *leaves)
            assert np.array_equal(*(compute(b, layer, *here)[0] for b in (cpu, three))), width


# --- the layer --------------------------------------------------------------------------------------------------------


def test_a_layer_is_the_oracle_s(backend: Backend) -> None:
    x, router, (gate, up, down) = rows(), logits(), layer_leaves("f32")
    got = compute(backend, layer, x, router, gate, up, down)[0]
    want = np.zeros_like(got, np.float64)
    for t, row in enumerate(x.astype(np.float64)):
        for e, share in zip(*route(router[t].astype(np.float64), USED)):
            hidden = silu(gate.values[e] @ row) * (up.values[e] @ row)
            want[t] += share * (down.values[e] @ hidden)
    assert relative(got, want) < SUMS


def test_gate_and_up_in_one_tensor_give_the_same_bits(backend: Backend) -> None:
    x, router, (gate, up, down) = rows(), logits(), layer_leaves("q8_0")
    both = Packed(np.concatenate([gate.data, up.data], axis=1), (EXPERTS, 512, IN), gate.dtype)

    def fused(x: Tensor, router: Tensor, both: Tensor, down: Tensor) -> Tensor:
        ids = ops.top_k(router, USED)
        return ops.mix_experts(ops.swiglu(*ops.experts(x, both, ids).split([256, 256])), down, ids, router)

    apart = compute(backend, layer, x, router, gate, up, down)[0]
    assert np.array_equal(compute(backend, fused, x, router, both, down)[0], apart)


def test_equal_logits_select_the_first_experts_with_equal_weights(backend: Backend) -> None:
    x, router, leaves = rows(4), np.zeros((4, EXPERTS), np.float32), layer_leaves("f32")
    router[1:] = 1e4  # the softmax does not overflow
    got = compute(backend, layer, x, router, *leaves)[0]
    first = tuple(Packed(w.data[:USED], (USED, *w.shape[1:]), w.dtype) for w in leaves)
    assert np.array_equal(compute(backend, layer, x, router[:, :USED].copy(), *first)[0], got)


@pytest.mark.cuda
@pytest.mark.parametrize("name", TYPES)
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, name: str) -> None:
    x, router, weight = rows(ROWS, USED, IN), logits(), stack(name)
    ids = selected(router)
    for build, leaves in ((ops.experts, (x, weight, ids)), (ops.mix_experts, (x, weight, ids, router))):
        there, here = (compute(b, build, *leaves)[0] for b in (cuda, cpu))
        assert nmse(there, here) < ROUNDING.get(name, ROUNDING_8_BITS)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weight", "ids"),
    [
        ((4, 64), (8, 16, 96), (4, 2)),  # another width
        ((5, 64), (8, 16, 64), (4, 2)),  # another number of rows
        ((4, 3, 64), (8, 16, 64), (4, 2)),  # rows for another number of experts
        ((4, 1, 64), (8, 16, 64), (4, 2)),
        ((64,), (8, 16, 64), (4, 2)),
        ((4, 64), (16, 64), (4, 2)),  # one matrix
        ((4, 64), (1, 8, 16, 64), (4, 2)),
        ((4, 64), (8, 16, 64), (4,)),
        ((4, 64), (2, 16, 64), (4, 3)),  # more experts than there are
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_ggml(
    cpu: Backend, x: tuple[int, ...], weight: tuple[int, ...], ids: tuple[int, ...]
) -> None:
    graph = Graph(cpu, 64)
    operands = graph.input(x, GGMLType.F32), graph.input(weight, GGMLType.F32), graph.input(ids, GGMLType.I32)
    with pytest.raises(ShapeError, match=r"^experts: "):
        ops.experts(*operands)
    with pytest.raises(ShapeError, match=r"^mix_experts: "):
        ops.mix_experts(*operands, graph.input((4, 8), GGMLType.F32))
    graph.close()


@pytest.mark.parametrize("router", [(4, 7), (3, 8), (8,), (4, 2), (1, 4, 8)])
def test_router_logits_that_do_not_fit_are_refused_before_ggml(cpu: Backend, router: tuple[int, ...]) -> None:
    graph = Graph(cpu, 64)
    x, weight = graph.input((4, 64), GGMLType.F32), graph.input((8, 16, 64), GGMLType.F32)
    with pytest.raises(ShapeError, match="mix_experts"):
        ops.mix_experts(x, weight, graph.input((4, 2), GGMLType.I32), graph.input(router, GGMLType.F32))
    graph.close()


@pytest.mark.parametrize(
    ("x", "weight", "ids"),
    [
        (GGMLType.F16, GGMLType.F32, GGMLType.I32),
        (GGMLType.F32, GGMLType.I8, GGMLType.I32),
        (GGMLType.F32, GGMLType.Q8_K, GGMLType.I32),
        (GGMLType.F32, GGMLType.F32, GGMLType.F32),
    ],
)
def test_types_that_do_not_fit_are_refused_before_ggml(
    cpu: Backend, x: GGMLType, weight: GGMLType, ids: GGMLType
) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="experts"):
        ops.experts(graph.input((4, 256), x), graph.input((8, 16, 256), weight), graph.input((4, 2), ids))
    graph.close()
