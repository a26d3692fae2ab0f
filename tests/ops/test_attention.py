"""attention: softmax attention over a cache of any K/V types, exact in the width, blind to what a row does not see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from pydflash import ops
from pydflash._ffi import ffi, lib
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.limits import PAGE
from pydflash.native import Backend, Graph, Tensor
from pydflash.native.traits import CPU, CUDA
from tests.helpers import Array, Packed, check_refused, compute, packed, relative, rounded

SLOTS, KV_HEADS, GROUP = 160, 2, 3
CPU_TYPES, CUDA_TYPES = ([name for name, t in CACHE_TYPES.items() if t in d.cache_types] for d in (CPU, CUDA))
SOME_PAIRS = [*((name, name) for name in CUDA_TYPES), ("q4_0", "q8_0")]
"""Every type on both sides, and a mixed pair."""
POSITIONS = np.array([0, 1, 31, 32, 63, 64, 65, 100, 127, 128, 129, 130, 131, 132, 133, 159], np.int32)

# The CPU rounds q as the oracle does here, so that float32 arithmetic remains: sums of 256 products in the scores, an
# exponential good to an ulp or two, sums of 160 terms.
CPU_TOLERANCE = 3e-5
# CUDA rounds q, the weights p and the dequantised K and V to f16: four relative errors of up to 2^-11 = 5e-4, the
# largest of a few thousand results and of scores whose error enters the exponential.
CUDA_TOLERANCE = 1e-2
# ggml accumulates f16 values in f16 on the CPU: the roundings of 160 sums, 2^-11 each, walk by 160^0.5 * 2^-11 = 6e-3,
# and the largest of 25,000 results is a few times that.
CPU_PREFILL_TOLERANCE = 2.5e-2


def operands(
    k: str, v: str, size: int = 64, rows: int = 16, slots: int = SLOTS, group: int = GROUP
) -> tuple[Array, Packed, Packed]:
    rng = np.random.default_rng([size, len(k), len(v)])
    q = rng.standard_normal((rows, KV_HEADS * group, size)).astype(np.float32)
    tables = (packed(rng.standard_normal((slots, KV_HEADS * size)).astype(np.float32), name) for name in (k, v))
    return (q, *tables)


def visible(positions: Array, held: Array, causal: bool, window: int) -> Array:
    """Which slots each row sees, (T, P) bool."""
    distance = positions[:, None].astype(np.int64) - held[None, :]
    sees = distance >= 0 if causal else np.ones_like(distance, bool)
    if window:
        sees &= np.abs(distance) < window
    return sees & (held >= 0)[None, :] & (positions >= 0)[:, None]


def expected(q: Array, k: Packed, v: Packed, sees: Array, *, cuda: bool) -> Array:
    """The formula in double precision; on the CPU q is rounded to the type of K's dot product."""
    rows, heads, size = q.shape
    wanted = np.zeros(q.shape)
    keys, values = (t.values.reshape(-1, KV_HEADS, size) for t in (k, v))
    queries = (q if cuda else rounded(q, k.dtype)).astype(np.float64)
    for row, head in product(range(rows), range(heads)):
        seen = np.flatnonzero(sees[row])
        if seen.size:
            scores = keys[seen, head // GROUP] @ queries[row, head] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            wanted[row, head] = weights @ values[seen, head // GROUP] / weights.sum()
    return wanted


def attend(
    backend: Backend, q: Array, k: Packed, v: Packed, positions: Array, held: Array | None = None, **options: object
) -> Array:
    def build(q: Tensor, k: Tensor, v: Tensor, p: Tensor, h: Tensor | None = None) -> Tensor:
        return ops.attention(q, k, v, p, KV_HEADS, slot_positions=h, **options)  # type: ignore[arg-type]

    leaves = (q, k, v, positions) if held is None else (q, k, v, positions, held)
    return compute(backend, build, *leaves)[0]


@pytest.mark.parametrize("pair", list(product(CPU_TYPES, CPU_TYPES)), ids="/".join)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_every_pair_of_cache_types_equals_the_formula(backend: Backend, size: int, pair: tuple[str, str]) -> None:
    if not {CACHE_TYPES[name] for name in pair} <= set(backend.traits.cache_types):
        pytest.skip("CUDA takes no f32 cache")
    q, k, v = operands(*pair, size)
    got = attend(backend, q, k, v, POSITIONS)
    wanted = expected(q, k, v, visible(POSITIONS, np.arange(SLOTS), True, 0), cuda=backend.is_cuda)
    assert relative(got, wanted) < (CUDA_TOLERANCE if backend.is_cuda else CPU_TOLERANCE)


@pytest.mark.cuda
def test_a_graph_in_the_memory_of_a_freed_one_is_not_taken_for_it(cuda: Backend) -> None:
    """ggml keeps captured CUDA graphs under the address of their first node and compares no operand's type."""
    seen: dict[int, set[str]] = {}
    for name in ("f16", "bf16") * 8:
        q, k, v = operands("f16", name, 128)
        graph = Graph(cuda, 64)
        leaves = [graph.input(x.shape, x.dtype) for x in (k, v)]
        query, positions = graph.input(q.shape, GGMLType.F32), graph.input(POSITIONS.shape, GGMLType.I32)
        out = graph.output(ops.attention(query, *leaves, positions, KV_HEADS))
        graph.finish()
        for tensor, values in zip((query, positions, *leaves), (q, POSITIONS, k.data, v.data)):
            cuda.write(tensor, np.ascontiguousarray(values))
        for _ in range(3):  # directly, captured, replayed
            graph.run()
        got = np.empty(q.shape, np.float32)
        cuda.read(out, got)
        seen.setdefault(int(ffi.cast("uintptr_t", lib.ggml_graph_node(graph.c, 0))), set()).add(name)
        graph.close()
        wanted = expected(q, k, v, visible(POSITIONS, np.arange(SLOTS), True, 0), cuda=True)
        assert relative(got, wanted) < CUDA_TOLERANCE
    assert any(len(names) > 1 for names in seen.values())  # else nothing was tested


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 24, 64, 1000])
def test_windows_and_causality_say_what_a_row_sees(backend: Backend, window: int, causal: bool) -> None:
    q, k, v = operands("f16", "f16")
    got = attend(backend, q, k, v, POSITIONS, causal=causal, window=window)
    wanted = expected(q, k, v, visible(POSITIONS, np.arange(SLOTS), causal, window), cuda=backend.is_cuda)
    assert relative(got, wanted) < (CUDA_TOLERANCE if backend.is_cuda else CPU_TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_a_ring_is_read_by_the_positions_its_slots_hold(backend: Backend, causal: bool) -> None:
    q, k, v = operands("f16", "f16")
    held = np.array([p - SLOTS if p > 320 else p for p in range(200, 200 + SLOTS)], np.int32)  # two laps of a ring
    held[::11] = -1  # empty slots
    positions = np.arange(300, 316, dtype=np.int32)
    got = attend(backend, q, k, v, positions, held, causal=causal, window=48)
    wanted = expected(q, k, v, visible(positions, held, causal, 48), cuda=backend.is_cuda)
    assert relative(got, wanted) < (CUDA_TOLERANCE if backend.is_cuda else CPU_TOLERANCE)


def test_padding_and_a_row_that_sees_nothing_give_zeros(backend: Backend) -> None:
    q, k, v = operands("f16", "q8_0")
    held = np.full(SLOTS, 500, np.int32)  # all later than any row
    positions = np.array([-1, 3] * 8, np.int32)
    assert not attend(backend, q, k, v, positions, held).any()


@pytest.mark.parametrize("pair", SOME_PAIRS, ids="/".join)
def test_garbage_in_slots_that_no_row_sees_changes_no_bit(backend: Backend, pair: tuple[str, str]) -> None:
    q, k, v = operands(*pair)
    positions = np.arange(40, 56, dtype=np.int32)
    clean = attend(backend, q, k, v, positions)
    for table in (k, v):
        table.data[56:] = 0xFF  # NaN in f16 and bf16, and in the f16 scales of blocks
    assert np.array_equal(attend(backend, q, k, v, positions), clean)
    assert np.isfinite(clean).all()


@pytest.mark.parametrize("pair", SOME_PAIRS, ids="/".join)
def test_a_row_is_bit_equal_at_every_width_and_place(backend: Backend, pair: tuple[str, str]) -> None:
    q, k, v = operands(*pair, 256)
    whole = attend(backend, q, k, v, POSITIONS)
    for width in range(1, 16):
        assert np.array_equal(attend(backend, q[:width], k, v, POSITIONS[:width]), whole[:width]), width
    for row in range(16):
        alone = attend(backend, q[row : row + 1], k, v, POSITIONS[row : row + 1])
        assert np.array_equal(alone[0], whole[row]), row


@pytest.mark.parametrize("pair", [("f16", "f16"), ("q4_0", "q8_0")], ids="/".join)
def test_a_row_is_bit_equal_for_every_length_of_the_cache(backend: Backend, pair: tuple[str, str]) -> None:
    q, k, v = operands(*pair, slots=2048)
    positions = np.arange(16, dtype=np.int32) + 70
    results = [attend(backend, q, k.rows(0, n), v.rows(0, n), positions) for n in (96, 128, 256, 1024, 2048)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("window", [0, 40])
def test_a_row_is_bit_equal_wherever_padding_stands(backend: Backend, window: int) -> None:
    q, k, v = operands("f16", "f16")
    whole = attend(backend, q, k, v, POSITIONS, window=window)
    padded = POSITIONS.copy()
    padded[5:] = -1
    got = attend(backend, q, k, v, padded, window=window)
    assert np.array_equal(got[:5], whole[:5])
    assert not got[5:].any()


@pytest.mark.parametrize("pair", [("f32", "f32"), ("f16", "f16"), ("q4_0", "q8_0")], ids="/".join)
def test_threads_do_not_change_a_bit(cpu: Backend, pair: tuple[str, str]) -> None:
    q, k, v = operands(*pair)
    with Backend("cpu", threads=2) as two:
        assert np.array_equal(*(attend(b, q, k, v, POSITIONS) for b in (cpu, two)))


def prefill_error(backend: Backend, q: Array, k: Packed, v: Packed) -> float:
    """How far prefill attention is from the exact one, whose steps have 16 rows at most."""
    rows, slots = len(q), len(k.values)
    positions = np.linspace(0, slots - 1, rows).astype(np.int32)
    mask = np.where(visible(positions, np.arange(slots), True, 0), np.float16(0), np.float16(-np.inf))
    got = compute(backend, lambda q, k, v, m: ops.attention_prefill(q, k, v, m, KV_HEADS), q, k, v, mask)[0]
    steps = [slice(first, first + 16) for first in range(0, rows, 16)]
    return relative(got, np.concatenate([attend(backend, q[step], k, v, positions[step]) for step in steps]))


@pytest.mark.parametrize("pair", list(product(CUDA_TYPES, CUDA_TYPES)), ids="/".join)
def test_prefill_attention_agrees_with_the_exact_one(backend: Backend, pair: tuple[str, str]) -> None:
    tolerance = CUDA_TOLERANCE if backend.is_cuda else CPU_PREFILL_TOLERANCE
    assert prefill_error(backend, *operands(*pair, 128, rows=32)) < tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [17, 32, 33])
@pytest.mark.parametrize("group", [1, 2, 3, 6])
@pytest.mark.parametrize("slots", [SLOTS, 256])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_prefill_attention_has_a_kernel_for_every_shape(
    cuda: Backend, size: int, slots: int, group: int, rows: int
) -> None:
    """ggml chooses by rows, by the heads that share a K, and by whether the slots are a multiple of 256."""
    assert prefill_error(cuda, *operands("f16", "f16", size, rows, slots, group)) < CUDA_TOLERANCE


def in_8_bits(q: Array) -> Array:
    """Near q, but multiples of 1/64 whose largest in 32 is 127/64.

    The CPU, which rounds q to 8 bits for a quantised K and to bf16 for a bf16 one, then loses nothing, nor does CUDA.
    """
    steps = np.clip(np.rint(q * 64), -127, 127).reshape(-1, 32)
    steps[:, 0] = 127
    return (steps / 64).reshape(q.shape).astype(np.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("pair", list(product(CUDA_TYPES, CUDA_TYPES)), ids="/".join)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, size: int, pair: tuple[str, str]) -> None:
    q, k, v = operands(*pair, size)
    q = in_8_bits(q)
    there, here = (attend(b, q, k, v, POSITIONS) for b in (cuda, cpu))
    assert relative(there, here) < CUDA_TOLERANCE


SHAPES = {
    "heads of 96": ((1, 2, 96), (64, 96), (64, 96), 1, None, 1),
    "heads of 512": ((1, 2, 512), (64, 512), (64, 512), 1, None, 1),
    "K and V differ": ((1, 4, 64), (64, 128), (96, 128), 1, None, 2),
    "cache too narrow": ((1, 4, 64), (64, 64), (64, 64), 1, None, 2),
    "heads do not group": ((1, 3, 64), (64, 128), (64, 128), 1, None, 2),
    "positions": ((4, 4, 64), (64, 128), (64, 128), 3, None, 2),
    "slots in no whole blocks": ((1, 4, 64), (50, 128), (50, 128), 1, None, 2),
    "ring positions": ((1, 4, 64), (64, 128), (64, 128), 1, 63, 2),
    "q is a matrix": ((1, 64), (64, 64), (64, 64), 1, None, 1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit_are_refused_before_ggml(cpu: Backend, case: str) -> None:
    q, k, v, positions, held, kv_heads = SHAPES[case]
    graph = Graph(cpu, 64)
    ring = None if held is None else graph.input((held,), GGMLType.I32)
    tensors = [graph.input(shape, GGMLType.F32) for shape in (q, k, v)]
    with pytest.raises(ShapeError, match="attention"):
        ops.attention(*tensors, graph.input((positions,), GGMLType.I32), kv_heads, slot_positions=ring)
    graph.close()


def test_a_device_without_pages_takes_no_wide_step(cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "traits", CUDA)
    q, k, v = operands("f16", "f16", rows=17)
    with pytest.raises(ShapeError, match="17 rows; this device takes 16"):
        attend(cpu, q, k, v, np.arange(17, dtype=np.int32))


def test_a_mask_that_does_not_fit_is_refused_before_ggml(cpu: Backend) -> None:
    graph = Graph(cpu, 64)
    q, k, v = (graph.input(shape, GGMLType.F32) for shape in ((20, 4, 64), (64, 128), (64, 128)))
    with pytest.raises(ShapeError, match="mask"):
        ops.attention_prefill(q, k, v, graph.input((20, 32), GGMLType.F16), 2)
    graph.close()


# --- pages ------------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """Sequences of random lengths whose K and V lie in shuffled pages of one cache; the rest of it is rubbish.

    ``pages`` (S, N): of each sequence. ``tables``: K and V of each sequence in one piece.
    """

    k: Packed
    v: Packed
    pages: Array
    tables: list[tuple[Packed, Packed]]

    @classmethod
    def random(cls, rng: np.random.Generator, pair: tuple[str, str], sequences: int, longest: int) -> Shared:
        rows = (longest * PAGE, KV_HEADS * 64)
        tables = [
            tuple(packed(rng.standard_normal(rows).astype(np.float32), name) for name in pair) for _ in range(sequences)
        ]
        total = sequences * longest + 3
        pages = rng.permutation(total)[: sequences * longest].reshape(sequences, longest).astype(np.int32)
        caches = []
        for side in range(2):
            some = tables[0][side]
            data = np.full((total, PAGE, some.data.shape[1]), 0x3B, np.uint8)
            for own, where in zip(tables, pages):
                data[where] = own[side].data.reshape(longest, PAGE, -1)
            shape = (total * PAGE, some.shape[1])
            caches.append(Packed(data.reshape(shape[0], -1), shape, some.dtype))
        return cls(*caches, pages, tables)  # type: ignore[arg-type]

    def attend(
        self, backend: Backend, q: Array, positions: Array, sequences: Array, pages: Array, window: int
    ) -> Array:
        def build(q: Tensor, k: Tensor, v: Tensor, p: Tensor, pages: Tensor, s: Tensor) -> Tensor:
            return ops.attention(q, k, v, p, KV_HEADS, window=window, pages=pages, sequences=s)

        return compute(backend, build, q, self.k, self.v, positions, pages, sequences)[0]


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("pair", [("f32", "f32"), ("f16", "f16"), ("bf16", "q8_0"), ("q4_0", "q8_0")], ids="/".join)
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_rows_of_sequences_in_pages_are_bit_equal_to_each_alone(
    cpu: Backend, sequences: int, pair: tuple[str, str], window: int
) -> None:
    rng = np.random.default_rng([sequences, len(pair[0])])
    shared = Shared.random(rng, pair, sequences, longest=3)
    q = operands("f16", "f16")[0]
    owner = np.sort(rng.integers(0, sequences, len(q))).astype(np.int32)
    ends = rng.integers(20, 3 * PAGE, sequences)
    positions = (ends[owner] - rng.integers(0, 20, len(q))).astype(np.int32)
    positions[-1] = -1  # padding
    got = shared.attend(cpu, q, positions, owner, shared.pages, window)
    for sequence, (k, v) in enumerate(shared.tables):
        own = np.flatnonzero(owner == sequence)
        if own.size:
            assert np.array_equal(got[own], attend(cpu, q[own], k, v, positions[own], window=window))
    seen = int(positions[0]) // PAGE
    wrong = shared.pages.copy()
    wrong[owner[0], seen] = (wrong[owner[0], seen] + 1) % (len(shared.k.data) // PAGE)
    assert not np.array_equal(shared.attend(cpu, q, positions, owner, wrong, window)[0], got[0])


@pytest.mark.parametrize("pair", [("f32", "f32"), ("f16", "f16"), ("bf16", "q8_0"), ("q4_0", "q8_0")], ids="/".join)
@pytest.mark.parametrize("group", [1, 6])
def test_rows_of_a_prompt_are_bit_equal_to_each_alone(cpu: Backend, group: int, pair: tuple[str, str]) -> None:
    """Hundreds of rows, which threads take by turns."""
    q, k, v = operands(*pair, rows=300, slots=320, group=group)
    positions = np.arange(20, 320, dtype=np.int32)
    positions[-3:] = -1  # padding
    with Backend("cpu", threads=3) as three:
        whole = attend(three, q, k, v, positions)
    assert np.array_equal(whole, attend(cpu, q, k, v, positions))
    for row in (0, 1, 15, 16, 100, 255, 296, 299):
        assert np.array_equal(attend(cpu, q[row : row + 1], k, v, positions[row : row + 1])[0], whole[row]), row


def test_pages_that_no_row_reaches_are_not_read(cpu: Backend) -> None:
    shared = Shared.random(np.random.default_rng(1), ("f16", "f16"), 2, longest=3)
    q, owner = operands("f16", "f16", rows=4)[0], np.array([0, 0, 1, 1], np.int32)
    positions = np.array([PAGE - 2, PAGE - 1, PAGE, PAGE + 1], np.int32)
    nowhere = shared.pages.copy()
    nowhere[0, 1:] = nowhere[1, 2:] = 1 << 30
    wanted = shared.attend(cpu, q, positions, owner, shared.pages, 0)
    assert np.array_equal(shared.attend(cpu, q, positions, owner, nowhere, 0), wanted)


@pytest.mark.parametrize(
    ("slots", "pages", "sequences", "causal"),
    [(288, (2, 1), (4,), True), (512, (2,), (4,), True), (512, (2, 1), (3,), True), (512, (2, 1), (4,), False)],
)
def test_pages_that_do_not_fit_are_refused(
    cpu: Backend, slots: int, pages: tuple[int, ...], sequences: tuple[int, ...], causal: bool
) -> None:
    def build(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, pages: Tensor, owner: Tensor) -> Tensor:
        return ops.attention(q, k, v, positions, KV_HEADS, causal=causal, pages=pages, sequences=owner)

    table, ids = ((slots, KV_HEADS * 64), GGMLType.F16), GGMLType.I32
    check_refused(cpu, build, [((4, 4, 64), GGMLType.F32), table, table, ((4,), ids), (pages, ids), (sequences, ids)])
