"""The remaining operations equal numpy, and no row of any of them depends on how many rows travel with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import DeviceError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.native import Backend, Tensor
from pydflash.ops import Rope, norms
from tests.helpers import Array, Packed, Shapes, check_refused, compute, packed, relative
from tests.reference import qwen35 as oracle

RNG = np.random.default_rng(5)
ROWS = 40
X, Y = (RNG.standard_normal((ROWS, 256)).astype(np.float32) for _ in range(2))
HEADS = RNG.standard_normal((ROWS, 3, 128)).astype(np.float32)
WEIGHT, HEAD_WEIGHT = (RNG.uniform(0.5, 1.5, n).astype(np.float32) for n in (256, 128))
PAIRS = np.random.default_rng(6).standard_normal((ROWS, 3, 256)).astype(np.float32)
X77, Y77 = X[:, :77].copy(), Y[:, :77].copy()  # no whole number of any CPU's registers
POSITIONS = RNG.integers(0, 262_144, ROWS).astype(np.int32)
POSITIONS[:3] = 0, 1, 262_143
IDS = RNG.integers(0, 50, ROWS).astype(np.int32)
TABLES = {name: packed(RNG.standard_normal((50, 256)).astype(np.float32), name) for name in CACHE_TYPES}

# float32 against double precision: a handful of operations of half an ulp each, a mean over 256 squares, an
# exponential.
FEW_ULP = 2e-6
# ggml's CUDA kernels are compiled with fast math: exp within 2 + |1.16 x| ulp, division and square root within 2. That
# is, element by element, at most 1.2e-5 of the rms for the product of a norm and a gate, and 5e-6 for the others.
CUDA_ULP = 1.2e-5

Case = tuple[Callable[..., Tensor], tuple[Array | Packed, ...]]
"""How to build the operation, and its leaves; those of ROWS rows are cut to a width."""

CASES: dict[str, Case] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), (X, WEIGHT)),
    "rms_norm of heads": (lambda x, w: ops.rms_norm(x, w, 1e-6), (HEADS, HEAD_WEIGHT)),
    "rope": (lambda x, p: ops.rope(x, p, Rope(64, 1e7)), (HEADS, POSITIONS)),
    "rope by yarn": (lambda x, p: ops.rope(x, p, Rope(64, 1e7, 4.0, 14, 22, 1.1386294)), (HEADS, POSITIONS)),
    "silu": (ops.silu, (X,)),
    "sigmoid": (ops.sigmoid, (X,)),
    "swiglu": (ops.swiglu, (X, Y)),
    "add": (lambda x, y: x + y, (X, Y)),
    "mul": (lambda x, y: x * y, (X, Y)),
    "gated_rms_norm": (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-6), (X, Y, WEIGHT)),
    "gated_rms_norm of 77": (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-6), (X77, Y77, WEIGHT[:77])),
    "sigmoid_gate": (ops.sigmoid_gate, (X, Y)),
    "sigmoid_gate by a strided half": (
        lambda x, y: ops.sigmoid_gate(x, y.reshape(y.shape[0], 3, 256).split([128, 128])[1]),
        (HEADS, PAIRS),
    ),
    "sigmoid_gate of 77": (ops.sigmoid_gate, (X77, Y77)),
    "argmax": (ops.argmax, (X,)),
    "reshape": (lambda x: x.reshape(x.shape[0], 4, 64), (X,)),
    "a strided half": (lambda x: ops.sigmoid(x.reshape(x.shape[0], 2, 128).split([64, 64])[1]), (X,)),
    **{f"get_rows {name}": (lambda ids, t: ops.get_rows(t, ids), (IDS, table)) for name, table in TABLES.items()},
}

EXPECTED: dict[str, Callable[[], Array]] = {
    "rms_norm": lambda: oracle.rms_norm(X.astype(float), WEIGHT, 1e-6),
    "rms_norm of heads": lambda: oracle.rms_norm(HEADS.astype(float), HEAD_WEIGHT, 1e-6),
    "rope": lambda: oracle.rope(HEADS.astype(float), POSITIONS, 64, 1e7),
    "silu": lambda: oracle.silu(X.astype(float)),
    "sigmoid": lambda: oracle.sigmoid(X.astype(float)),
    "swiglu": lambda: oracle.silu(X.astype(float)) * Y,
    "add": lambda: X.astype(float) + Y,
    "mul": lambda: X.astype(float) * Y,
    "gated_rms_norm": lambda: oracle.rms_norm(X.astype(float), WEIGHT, 1e-6) * oracle.silu(Y.astype(float)),
    "gated_rms_norm of 77": lambda: (
        oracle.rms_norm(X77.astype(float), WEIGHT[:77], 1e-6) * oracle.silu(Y77.astype(float))
    ),
    "sigmoid_gate": lambda: X * oracle.sigmoid(Y.astype(float)),
    "sigmoid_gate by a strided half": lambda: HEADS * oracle.sigmoid(PAIRS.astype(float)[..., 128:]),
    "sigmoid_gate of 77": lambda: X77 * oracle.sigmoid(Y77.astype(float)),
    "argmax": lambda: X.argmax(axis=1),
    "reshape": lambda: X.reshape(ROWS, 4, 64),
    "a strided half": lambda: oracle.sigmoid(X.astype(float).reshape(ROWS, 2, 128)[..., 64:]),
    **{f"get_rows {name}": (lambda table=table: table.values[IDS]) for name, table in TABLES.items()},
}


def cut(leaves: tuple[Array | Packed, ...], rows: slice) -> tuple[Array | Packed, ...]:
    return tuple(leaf[rows].copy() if isinstance(leaf, np.ndarray) and len(leaf) == ROWS else leaf for leaf in leaves)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_equals_numpy(backend: Backend, name: str) -> None:
    build, leaves = CASES[name]
    tolerance = CUDA_ULP if backend.is_cuda else FEW_ULP
    assert relative(compute(backend, build, *leaves)[0], EXPECTED[name]()) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_bit_equal_at_every_width(backend: Backend, name: str) -> None:
    build, leaves = CASES[name]
    whole = compute(backend, build, *cut(leaves, slice(0, 16)))[0]
    for width in range(1, 16):
        assert np.array_equal(compute(backend, build, *cut(leaves, slice(0, width)))[0], whole[:width]), width
    for row in range(16):
        assert np.array_equal(compute(backend, build, *cut(leaves, slice(row, row + 1)))[0][0], whole[row]), row


def test_gates_far_from_zero_are_open_or_shut(backend: Backend) -> None:
    gates = np.array([[-1e30, -200, -90, -80, 80, 90, 200, 1e30]], np.float32)
    ones, weight = np.ones_like(gates), np.ones(8, np.float32)
    got = compute(backend, ops.sigmoid_gate, ones, gates)[0]
    assert np.abs(got - (gates > 0)).max() < 1e-30
    got = compute(backend, lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-6), ones, gates, weight)[0]
    assert relative(got, gates * (gates > 0)) < FEW_ULP


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["RMS_NORM", "SIGMOID_GATE"])
def test_an_operation_of_the_cpu_alone_is_refused_on_cuda(
    cuda: Backend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(norms, "_own_norms", lambda _: True)
    build = {
        "RMS_NORM": lambda x: ops.rms_norm(x, x.reshape(256), 1e-6),
        "SIGMOID_GATE": lambda x: ops.sigmoid_gate(x, x),
    }
    with pytest.raises(DeviceError, match=name.lower()):
        compute(cuda, build[name], X[:1])


@pytest.mark.parametrize("dims", [2, 16, 64, 128])
@pytest.mark.parametrize("base", [1e4, 1e7])
def test_rope_rotates_the_first_dims_of_each_head(backend: Backend, base: float, dims: int) -> None:
    got = compute(backend, lambda x, p: ops.rope(x, p, Rope(dims, base)), HEADS, POSITIONS)[0]
    assert relative(got, oracle.rope(HEADS.astype(float), POSITIONS, dims, base)) < FEW_ULP
    assert np.array_equal(got[..., dims:], HEADS[..., dims:])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("furthest", "bound"), [(262_143, 1e-7), (2**20, 1e-7), (2**24 - 1, 1e-5)])
def test_rope_s_cosines_and_sines_are_those_of_the_reference_s_angles(
    backend: Backend, furthest: int, bound: float, sign: int
) -> None:
    """A head of ones and zeros turns into the cosines and sines themselves (rope.h states their error)."""
    positions = sign * np.linspace(0, furthest, 50_000).astype(np.int32)
    heads = np.repeat([[[1.0] * 8 + [0.0] * 8]], len(positions), axis=0).astype(np.float32)
    got = compute(backend, lambda x, p: ops.rope(x, p, Rope(16, 1e4)), heads, positions)[0]
    assert np.abs(got - oracle.rope(heads.astype(float), positions, 16, 1e4)).max() < bound


SCALED = {
    "linear": Rope(64, 1e7, 4.0),
    "yarn": Rope(64, 1e7, 4.0, 14, 22, 1.1386294),
    "yarn, all pairs kept": Rope(32, 1e4, 8.0, 16, 17, 1.2079442),
    "yarn, one pair kept": Rope(128, 1e6, 2.5, 0, 1),
    "a magnitude alone": Rope(128, 1e7, magnitude=0.75),
}


def scaling(rope: Rope) -> tuple[Array, float]:
    """The oracle's factors of frequencies and of cosines and sines."""
    slowed = np.ones(rope.dims // 2) / rope.factor
    if rope.high:
        kept = np.interp(np.arange(rope.dims // 2), [rope.low, rope.high], [1.0, 0.0])
        slowed = kept + (1 - kept) * slowed
    return slowed, rope.magnitude


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rope_turns_slower_and_scales_what_turns(backend: Backend, name: str) -> None:
    rope = SCALED[name]
    got = compute(backend, lambda x, p: ops.rope(x, p, rope), HEADS, POSITIONS)[0]
    wanted = oracle.rope(HEADS.astype(float), POSITIONS, rope.dims, rope.base, *scaling(rope))
    assert relative(got, wanted) < FEW_ULP
    assert np.array_equal(got[..., rope.dims :], HEADS[..., rope.dims :])
    plain = compute(backend, lambda x, p: ops.rope(x, p, Rope(rope.dims, rope.base)), HEADS, POSITIONS)[0]
    assert not np.array_equal(got, plain)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (3, 9), (32, 33)])
def test_a_factor_of_one_changes_no_bit(backend: Backend, low: int, high: int) -> None:
    plain, scaled = Rope(64, 1e7), Rope(64, 1e7, 1.0, low, high)
    outputs = [
        compute(backend, lambda x, p, r=rope: ops.rope(x, p, r), HEADS, POSITIONS)[0] for rope in (plain, scaled)
    ]
    assert np.array_equal(*outputs)


def test_rope_takes_strided_heads(backend: Backend) -> None:
    wanted = compute(backend, lambda x, p: ops.rope(x, p, Rope(32, 1e7)), HEADS[:, 1:, 64:].copy(), POSITIONS)[0]
    got = compute(
        backend, lambda x, p: ops.rope(x.slice(1, 1, 3).slice(2, 64, 128), p, Rope(32, 1e7)), HEADS, POSITIONS
    )[0]
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("name", TABLES)
def test_set_rows_stores_what_the_gguf_package_stores(backend: Backend, name: str) -> None:
    places = np.array([3, 0, 49, 7], np.int32)
    wanted = packed(X[:4], name).values
    got = compute(backend, ops.set_rows, TABLES[name], places, X[:4])[0]
    after = Packed(np.ascontiguousarray(got).view(np.uint8).reshape(50, -1), (50, 256), TABLES[name].dtype).values
    # Both round to nearest; where x falls on the middle of two levels of a block they may differ by the level, which is
    # twice the error there.
    level = 2 * np.abs(wanted - X[:4]).max() if CACHE_TYPES[name].block_size > 1 else 0.0
    assert np.abs(after[places] - wanted).max() <= level
    assert np.mean(after[places] != wanted) < 0.01
    rest = np.setdiff1d(np.arange(50), places)
    assert np.array_equal(after[rest], TABLES[name].values[rest])


@pytest.mark.parametrize("name", TABLES)
def test_set_rows_stores_the_same_bytes_at_every_width(backend: Backend, name: str) -> None:
    places = np.arange(16, dtype=np.int32)
    whole = compute(backend, ops.set_rows, TABLES[name], places, X[:16])[0]
    for width in range(1, 16):
        part = compute(backend, ops.set_rows, TABLES[name], places[:width], X[:width])[0]
        assert np.array_equal(part[:width], whole[:width]), width


def test_copy_into_fills_a_strided_part(backend: Backend) -> None:
    target = np.zeros((4, 3, 256), np.float32)

    def build(target: Tensor, x: Tensor) -> list[Tensor]:
        return [ops.copy_into(target.slice(1, 1, 2), x.reshape(4, 1, 256)), target]

    got = compute(backend, build, target, X[:4])[1]
    assert np.array_equal(got[:, 1], X[:4])
    assert not got[:, ::2].any()


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, name: str) -> None:
    build, leaves = CASES[name]
    there, here = (compute(b, build, *leaves)[0] for b in (cuda, cpu))
    assert relative(there, here) < CUDA_ULP + FEW_ULP


F, INT = GGMLType.F32, GGMLType.I32
REFUSED: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "get_rows of a vector": (ops.get_rows, [((8,), F), ((2,), INT)]),
    "get_rows by a matrix": (ops.get_rows, [((8, 4), F), ((2, 2), INT)]),
    "get_rows by floats": (ops.get_rows, [((8, 4), F), ((2,), F)]),
    "set_rows too narrow": (ops.set_rows, [((8, 4), F), ((2,), INT), ((2, 3), F)]),
    "set_rows too few": (ops.set_rows, [((8, 4), F), ((2,), INT), ((3, 4), F)]),
    "set_rows by floats": (ops.set_rows, [((8, 4), F), ((2,), F), ((2, 4), F)]),
    "copy_into another shape": (ops.copy_into, [((8, 4), F), ((4, 8), F)]),
    "rms_norm of f16": (lambda x, w: ops.rms_norm(x, w, 1e-6), [((8, 4), GGMLType.F16), ((4,), F)]),
    "gated_rms_norm gate": (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-6), [((8, 4), F), ((4, 4), F), ((4,), F)]),
    "gated_rms_norm weight": (lambda x, z, w: ops.gated_rms_norm(x, z, w, 1e-6), [((8, 4), F), ((8, 4), F), ((8,), F)]),
    "sigmoid_gate": (ops.sigmoid_gate, [((8, 4), F), ((8, 5), F)]),
    "rms_norm weight": (lambda x, w: ops.rms_norm(x, w, 1e-6), [((8, 4), F), ((8,), F)]),
    "swiglu": (ops.swiglu, [((8, 4), F), ((8, 5), F)]),
    "argmax of a vector": (ops.argmax, [((8,), F)]),
    "rope of a matrix": (lambda x, p: ops.rope(x, p, Rope(4, 1e4)), [((8, 4), F), ((8,), INT)]),
    "rope of f16": (lambda x, p: ops.rope(x, p, Rope(4, 1e4)), [((8, 2, 4), GGMLType.F16), ((8,), INT)]),
    "rope of large heads": (lambda x, p: ops.rope(x, p, Rope(4, 1e4)), [((8, 2, 258), F), ((8,), INT)]),
    "rope by floats": (lambda x, p: ops.rope(x, p, Rope(4, 1e4)), [((8, 2, 4), F), ((8,), F)]),
    "rope positions": (lambda x, p: ops.rope(x, p, Rope(4, 1e4)), [((8, 2, 4), F), ((7,), INT)]),
    "rope of odd dims": (lambda x, p: ops.rope(x, p, Rope(3, 1e4)), [((8, 2, 4), F), ((8,), INT)]),
    "rope of too many dims": (lambda x, p: ops.rope(x, p, Rope(6, 1e4)), [((8, 2, 4), F), ((8,), INT)]),
    "rope that speeds up": (lambda x, p: ops.rope(x, p, Rope(4, 1e4, 0.5)), [((8, 2, 4), F), ((8,), INT)]),
    "rope by a factor of nan": (lambda x, p: ops.rope(x, p, Rope(4, 1e4, np.nan)), [((8, 2, 4), F), ((8,), INT)]),
    "rope whose ramp falls": (lambda x, p: ops.rope(x, p, Rope(4, 1e4, 2.0, 2, 1)), [((8, 2, 4), F), ((8,), INT)]),
    "rope far out": (lambda x, p: ops.rope(x, p, Rope(4, 1e4, 2.0, 0, 1 << 16)), [((8, 2, 4), F), ((8,), INT)]),
    "rope of no magnitude": (
        lambda x, p: ops.rope(x, p, Rope(4, 1e4, magnitude=0.0)),
        [((8, 2, 4), F), ((8,), INT)],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_ggml(cpu: Backend, name: str) -> None:
    check_refused(cpu, *REFUSED[name])
