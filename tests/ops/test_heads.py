"""norm_rope and store_kv give the bits of the operations they fuse, which equal numpy, on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.native import Backend, Graph, Tensor
from pydflash.ops import NormRope, Rope
from tests.helpers import Array, Packed, compute, packed, relative
from tests.ops.test_turbo_wht import rotated, signs_of
from tests.reference import qwen35 as oracle

EPS, BASE = 1e-6, 1e7
ROWS = (1, 3, 5, 16, 17, 100, 2048)
# Head size, values under RoPE, rotation group: of the 27B target, of the draft, and every other combination once.
SHAPES = [(256, 64, 0), (128, 128, 0), (256, 64, 256), (256, 256, 128), (256, 32, 64), (128, 64, 128), (128, 2, 64)]
SHAPES += [(64, 64, 0), (64, 16, 64)]
# float32 against double precision: the sum of 256 squares, its root (fast math on CUDA: 2 ulp) and three products come
# to at most 6e-7 of a value, which is up to 5 rms; the turn adds 1e-6 of the rms (tests/ops/test_rows.py).
CLOSE = 4e-6

Build = Callable[..., "Tensor | Sequence[Tensor]"]


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def positions_of(rows: int) -> Array:
    """Positions over the whole range, the ends among them."""
    positions = np.random.default_rng(rows).integers(0, 262_144, rows)
    positions[: min(rows, 3)] = [262_143, 0, 1][:rows]
    return positions.astype(np.int32)


def norm_of(weight: Tensor, rope: Rope | int) -> NormRope:
    """``rope``, or plain RoPE of so many values."""
    return NormRope(weight, EPS, Rope(rope, BASE) if isinstance(rope, int) else rope)


def weight_of(size: int) -> Array:
    return np.random.default_rng(size).uniform(0.5, 1.5, size).astype(np.float32)


def same_bytes(backend: Backend, one: Build, other: Build, *leaves: Array | Packed) -> bool:
    first, second = (compute(backend, build, *leaves) for build in (one, other))
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(first, second, strict=True))


# --- Q ----------------------------------------------------------------------------------------------------------------


def fused_q(size: int, rope: Rope | int, group: int) -> Build:
    """From (T, H, 2 D), of which q is the first half of every head."""

    def build(x: Tensor, w: Tensor, p: Tensor, signs: Tensor | None = None) -> Tensor:
        return ops.norm_rope(x.slice(2, 0, size), norm_of(w, rope), p, group, signs)

    return build


def plain_q(size: int, rope: Rope | int, group: int) -> Build:
    def build(x: Tensor, w: Tensor, p: Tensor, signs: Tensor | None = None) -> Tensor:
        q = norm_of(w, rope)(x.slice(2, 0, size), p)
        return ops.turbo_wht(q, group, signs) if group else q

    return build


def q_leaves(rows: int, heads: int, size: int, group: int, signed: bool) -> list[Array]:
    leaves = [random(1, rows, heads, 2 * size), weight_of(size), positions_of(rows)]
    return [*leaves, signs_of(group)] if signed else leaves


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "dims", "group"), SHAPES)
def test_norm_rope_has_the_bits_of_its_parts(backend: Backend, size: int, dims: int, group: int, rows: int) -> None:
    shape = (size, dims, group)
    assert same_bytes(backend, fused_q(*shape), plain_q(*shape), *q_leaves(rows, 3, size, group, signed=False))


@pytest.mark.parametrize("group", [64, 128, 256])
def test_norm_rope_with_signs_has_the_bits_of_its_parts(backend: Backend, group: int) -> None:
    shape = (256, 64, group)
    assert same_bytes(backend, fused_q(*shape), plain_q(*shape), *q_leaves(17, 6, 256, group, signed=True))


@pytest.mark.parametrize("rope", [Rope(64, BASE, 4.0), Rope(64, BASE, 4.0, 14, 22, 1.1386294)], ids=["linear", "yarn"])
def test_scaled_heads_have_the_bits_of_their_parts(backend: Backend, rope: Rope) -> None:
    q, kv = q_leaves(17, 3, 256, 256, signed=False), kv_leaves(17, 4, 256, "f32", "q8_0")
    assert same_bytes(backend, fused_q(256, rope, 256), plain_q(256, rope, 256), *q)
    assert not same_bytes(backend, fused_q(256, rope, 256), fused_q(256, 64, 256), *q)
    assert same_bytes(backend, fused_kv(256, rope, 256, 64), plain_kv(256, rope, 256, 64), *kv)
    assert not same_bytes(backend, fused_kv(256, rope, 256, 64), fused_kv(256, 64, 256, 64), *kv)


@pytest.mark.parametrize(("size", "dims", "group"), SHAPES)
def test_norm_rope_equals_numpy(backend: Backend, size: int, dims: int, group: int) -> None:
    x, weight, positions = q_leaves(17, 3, size, group, signed=False)
    got = compute(backend, fused_q(size, dims, group), x, weight, positions)[0]
    wanted = oracle.rope(oracle.rms_norm(x[..., :size].astype(float), weight, EPS), positions, dims, BASE)
    assert relative(got, rotated(wanted, group, None) if group else wanted) < CLOSE


@pytest.mark.parametrize("group", [0, 256])
def test_a_row_of_norm_rope_is_bit_equal_at_every_width(backend: Backend, group: int) -> None:
    x, weight, positions = q_leaves(17, 6, 256, group, signed=False)
    build = fused_q(256, 64, group)
    whole = compute(backend, build, x, weight, positions)[0]
    for row in range(17):
        one = compute(backend, build, x[row : row + 1].copy(), weight, positions[row : row + 1].copy())[0]
        assert np.array_equal(one[0], whole[row]), row


# --- K and V ----------------------------------------------------------------------------------------------------------


def fused_kv(size: int, rope: Rope | int, k_group: int = 0, v_group: int = 0) -> Build:
    """From K and V as halves of one (T, Hkv, 2 D)."""

    def build(
        x: Tensor, w: Tensor, p: Tensor, rows: Tensor, k_table: Tensor, v_table: Tensor, signs: Tensor | None = None
    ) -> Sequence[Tensor]:
        k, v = x.split([size, size])
        norm = norm_of(w, rope)
        return ops.store_kv(k, v, norm, p, rows, k_table, v_table, k_group=k_group, signs=signs, v_group=v_group)

    return build


def plain_kv(size: int, rope: Rope | int, k_group: int = 0, v_group: int = 0) -> Build:
    def build(
        x: Tensor, w: Tensor, p: Tensor, rows: Tensor, k_table: Tensor, v_table: Tensor, signs: Tensor | None = None
    ) -> Sequence[Tensor]:
        k, v = x.split([size, size])
        k = norm_of(w, rope)(k, p)
        k = ops.turbo_wht(k, k_group, signs) if k_group else k
        v = ops.turbo_wht(v, v_group) if v_group else v
        width = (x.shape[0], k_table.shape[1])
        return [ops.set_rows(k_table, rows, k.reshape(*width)), ops.set_rows(v_table, rows, v.reshape(*width))]

    return build


def kv_leaves(
    rows: int, heads: int, size: int, k_type: str, v_type: str, places: Array | None = None
) -> list[Array | Packed]:
    """The last row of the tables is nobody's."""
    slots = rows + 4
    places = np.random.default_rng(rows).permutation(slots - 1)[:rows].astype(np.int32) if places is None else places
    tables = (packed(random(seed, slots, heads * size), name) for seed, name in ((2, k_type), (3, v_type)))
    return [random(4, rows, heads, 2 * size), weight_of(size), positions_of(rows), places, *tables]


@pytest.mark.parametrize("v_type", CACHE_TYPES)
@pytest.mark.parametrize("k_type", CACHE_TYPES)
def test_store_kv_has_the_bytes_of_its_parts_in_every_pair(backend: Backend, k_type: str, v_type: str) -> None:
    shape = (256, 64, 256, 64)
    assert same_bytes(backend, fused_kv(*shape), plain_kv(*shape), *kv_leaves(17, 4, 256, k_type, v_type))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("types", [("f16", "f16"), ("q4_0", "q8_0"), ("bf16", "f32")], ids="/".join)
def test_store_kv_has_the_bytes_of_its_parts_for_any_rows(backend: Backend, types: tuple[str, str], rows: int) -> None:
    for shape in ((256, 64, 256, 0), (128, 128, 0, 0)):
        leaves = kv_leaves(rows, 2, shape[0], *types)
        assert same_bytes(backend, fused_kv(*shape), plain_kv(*shape), *leaves), shape


BASES = [
    (size, *groups) for size in (64, 128, 256) for groups in product((0, 64, 128, 256), repeat=2) if max(groups) <= size
]


@pytest.mark.parametrize(("size", "k_group", "v_group"), BASES)
def test_store_kv_has_the_bytes_of_its_parts_in_every_basis(
    backend: Backend, size: int, k_group: int, v_group: int
) -> None:
    shape = (size, size // 2, k_group, v_group)
    leaves = kv_leaves(5, 3, size, "q4_0", "q4_0")
    assert same_bytes(backend, fused_kv(*shape), plain_kv(*shape), *leaves)
    if k_group:
        assert same_bytes(backend, fused_kv(*shape), plain_kv(*shape), *leaves, signs_of(k_group))


@pytest.mark.parametrize("v_group", [0, 64])
@pytest.mark.parametrize("k_group", [0, 256])
def test_store_kv_equals_numpy(backend: Backend, k_group: int, v_group: int) -> None:
    """f32 tables hold the numbers themselves, at the rows named; all other rows keep theirs."""
    x, weight, positions, places, k_table, v_table = kv_leaves(17, 4, 256, "f32", "f32")
    build = fused_kv(256, 64, k_group, v_group)
    got_k, got_v = compute(backend, build, x, weight, positions, places, k_table, v_table)
    k = oracle.rope(oracle.rms_norm(x[..., :256].astype(float), weight, EPS), positions, 64, BASE)
    v = x[..., 256:]
    k, v = (rotated(y, group, None) if group else y for y, group in ((k, k_group), (v, v_group)))
    assert relative(got_k[places], k.reshape(17, -1)) < CLOSE
    assert relative(got_v[places], v.reshape(17, -1)) < 2e-6  # eight levels of float32 additions
    rest = np.setdiff1d(np.arange(21), places)
    for got, before in ((got_k, k_table), (got_v, v_table)):
        assert np.array_equal(got[rest], before.values[rest].astype(np.float32))


@pytest.mark.parametrize("threads", [1, 3])
def test_padding_rows_touch_nothing_but_the_last_row(threads: int) -> None:
    """Position -1, all at one table row, whoever writes it last."""
    places = np.full(16, 19, np.int32)
    places[:5] = [7, 0, 3, 11, 2]
    leaves = kv_leaves(16, 4, 256, "q4_0", "q8_0", places)
    leaves[2][5:] = -1
    alone = [leaves[0][:5].copy(), leaves[1], leaves[2][:5].copy(), places[:5].copy(), *leaves[4:]]
    shape = (256, 64, 256, 64)
    with Backend("cpu", threads=threads) as backend:
        padded, bare = compute(backend, fused_kv(*shape), *leaves), compute(backend, fused_kv(*shape), *alone)
    for a, b in zip(padded, bare, strict=True):
        assert np.array_equal(a[:19], b[:19])


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(cpu: Backend, threads: int) -> None:
    q, kv = q_leaves(17, 3, 256, 256, signed=True), kv_leaves(17, 3, 256, "q4_0", "f16")
    with Backend("cpu", threads=threads) as many:
        for build, leaves in ((fused_q(256, 64, 256), q), (fused_kv(256, 64, 256, 128), kv)):
            for a, b in zip(compute(many, build, *leaves), compute(cpu, build, *leaves), strict=True):
                assert np.array_equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("group", [0, 256])
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, group: int) -> None:
    x, weight, positions = q_leaves(100, 6, 256, group, signed=False)
    build = fused_q(256, 64, group)
    there, here = (compute(device, build, x, weight, positions)[0] for device in (cuda, cpu))
    assert relative(there, here) < 2 * CLOSE
    leaves = kv_leaves(100, 4, 256, "f32", "f32")
    for a, b in zip(*(compute(device, fused_kv(256, 64, group, 64), *leaves) for device in (cuda, cpu)), strict=True):
        assert relative(a, b) < 2 * CLOSE


# --- what does not fit ------------------------------------------------------------------------------------------------


F, INT = GGMLType.F32, GGMLType.I32
HEADS = ((4, 2, 128), F)
GOOD: dict[str, tuple[tuple[int, ...], GGMLType]] = {
    "x": HEADS, "v": HEADS, "weight": ((128,), F), "positions": ((4,), INT), "rows": ((4,), INT),
    "k_table": ((8, 256), GGMLType.Q4_0), "v_table": ((8, 256), GGMLType.F16), "signs": ((2, 128), F),
}  # fmt: skip
REFUSED = {
    "a matrix": {"x": ((4, 256), F)},
    "heads of 96": {"x": ((4, 2, 96), F), "weight": ((96,), F)},
    "f16 heads": {"x": ((4, 2, 128), GGMLType.F16)},
    "a weight of another size": {"weight": ((64,), F)},
    "an f16 weight": {"weight": ((128,), GGMLType.F16)},
    "too few positions": {"positions": ((3,), INT)},
    "positions that are floats": {"positions": ((4,), F)},
    "signs of another group": {"signs": ((2, 64), F)},
    "f16 signs": {"signs": ((2, 128), GGMLType.F16)},
}
REFUSED_KV = {
    "v of other heads": {"v": ((4, 3, 128), F)},
    "v in f16": {"v": ((4, 2, 128), GGMLType.F16)},
    "too few rows": {"rows": ((3,), INT)},
    "rows that are floats": {"rows": ((4,), F)},
    "a narrow K table": {"k_table": ((8, 128), GGMLType.Q4_0)},
    "a narrow V table": {"v_table": ((8, 128), GGMLType.F16)},
    "a K table of q5_k": {"k_table": ((8, 256), GGMLType.Q5_K)},
    "a V table of i32": {"v_table": ((8, 256), INT)},
}
BAD_NORMS = {"no dims": 0, "odd dims": 3, "more dims than the head": 130}


def attempt(cpu: Backend, other: dict[str, tuple[tuple[int, ...], GGMLType]], **options: int) -> list[str]:
    """The names of the operations that refuse, as their errors say them."""
    graph = Graph(cpu, 64)
    t = {name: graph.input(*spec) for name, spec in (GOOD | other).items()}
    norm = norm_of(t["weight"], options.get("dims", 64))
    k_group, v_group = options.get("k_group", 128), options.get("v_group", 0)
    kv = (t["x"], t["v"], norm, t["positions"], t["rows"], t["k_table"], t["v_table"])
    calls: list[Callable[[], object]] = [
        lambda: ops.norm_rope(t["x"], norm, t["positions"], k_group, t["signs"]),
        lambda: ops.store_kv(*kv, k_group=k_group, signs=t["signs"], v_group=v_group),
    ]
    refused = []
    for call in calls:
        try:
            call()
        except ShapeError as error:
            refused.append(str(error).split(":")[0])
    graph.close()
    return refused


def test_what_fits_is_not_refused(cpu: Backend) -> None:
    assert attempt(cpu, {}) == []


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_do_not_fit_are_refused_before_ggml(cpu: Backend, name: str) -> None:
    assert attempt(cpu, REFUSED[name]) == ["norm_rope", "store_kv"]


@pytest.mark.parametrize("name", REFUSED_KV)
def test_tables_that_do_not_fit_are_refused_before_ggml(cpu: Backend, name: str) -> None:
    assert attempt(cpu, REFUSED_KV[name]) == ["store_kv"]


@pytest.mark.parametrize("dims", BAD_NORMS.values(), ids=BAD_NORMS)
def test_a_rope_that_does_not_fit_is_refused_before_ggml(cpu: Backend, dims: int) -> None:
    assert attempt(cpu, {}, dims=dims) == ["norm_rope", "store_kv"]


@pytest.mark.parametrize("group", [0, 32, 256])
def test_a_group_that_does_not_fit_is_refused_before_ggml(cpu: Backend, group: int) -> None:
    assert attempt(cpu, {"signs": ((2, max(group, 1)), F)}, k_group=group) == ["norm_rope", "store_kv"]


@pytest.mark.parametrize("group", [32, 256])
def test_a_group_of_v_that_does_not_fit_is_refused_before_ggml(cpu: Backend, group: int) -> None:
    assert attempt(cpu, {}, v_group=group) == ["store_kv"]
