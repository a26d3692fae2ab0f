"""delta_inputs and delta_rule: the gated delta-net's step; replay of a kept prefix leaves no trace of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from pydflash import ops
from pydflash.errors import DeviceError, ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph, Tensor
from tests.helpers import Array, compute, nmse, relative
from tests.reference.qwen35 import delta_rule, l2_norm, sigmoid, silu, softplus

EPS = 1e-6
# float32 against double precision: a convolution of 4 terms and a sigmoid; then sums of D = 128 products for each of
# some dozen tokens, whose errors the state carries on. CUDA's fast exponentials are good to a few ulp more.
INPUTS_TOLERANCE = 3e-6
RULE_TOLERANCE = 3e-5
ONLY = np.zeros(1, np.int32)
"""The slots of a step of one sequence."""


def stored(memory: Array, scale: Array) -> Array:
    """S (Hv, D, D) as the operation keeps it, split by a ``scale`` (Hv,) of each head: (Hv, D + 1, D)."""
    heads, _, size = memory.shape
    scales = np.broadcast_to(scale[:, None, None], (heads, 1, size))
    return np.concatenate([memory / scale[:, None, None], scales], axis=1).astype(np.float32)


def memory_of(state: Array) -> Array:
    """S (Hv, D, D) in double precision of a state (Hv, D + 1, D)."""
    values = state.astype(np.float64)
    scale = np.where(values[:, -1] == 0, 1, values[:, -1])
    assert np.all(scale == scale[:, :1])  # one a head
    return values[:, :-1] * scale[:, :, None]


@dataclass
class Layer:
    """Random weights of a layer and the state it starts from: Hk key heads, Hv value heads of size D, K taps."""

    k_heads: int
    heads: int
    size: int
    taps: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.k_heads, self.heads, self.size])
        self.channels = (2 * self.k_heads + self.heads) * self.size
        self.weight = (0.5 * rng.standard_normal((self.channels, self.taps))).astype(np.float32)
        self.a = -np.exp(rng.standard_normal(self.heads)).astype(np.float32)
        self.bias = rng.standard_normal(self.heads).astype(np.float32)
        self.window = rng.standard_normal((self.taps - 1 + 16, self.channels + 2 * self.heads)).astype(np.float32)
        memory = (0.1 * rng.standard_normal((self.heads, self.size, self.size))).astype(np.float32)
        self.state = stored(memory, 2.0 ** -np.arange(1, self.heads + 1))
        self._rng = rng

    def rows(self, count: int) -> tuple[Array, Array, Array]:
        """Raw q|k|v columns, alpha and beta of ``count`` tokens."""
        shapes = ((count, self.channels), (count, self.heads), (count, self.heads))
        x, alpha, beta = (self._rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        return x, alpha, beta


@dataclass
class Result:
    """Inputs of the rule (16 + T, C + 2 Hv), its output (T, Hv D), and what the step left behind."""

    inputs: Array
    out: Array
    window: Array
    state: Array


LAYERS = {
    "equal": Layer(4, 4, 32, 4),
    "ratio3": Layer(2, 6, 128, 4),
    "short": Layer(1, 2, 64, 3),
    "wide": Layer(1, 2, 256, 4),
    "two taps": Layer(1, 2, 32, 2),
    "many taps": Layer(1, 1, 64, 16),
}


def step(
    backend: Backend,
    layer: Layer,
    rows: tuple[Array, Array, Array],
    window: Array,
    state: Array,
    replay: int = 0,
    real: int | None = None,
    keep: bool = True,
) -> Result:
    """One step of the layer on ``backend``: both operations, as the model calls them."""
    counts = np.array([[replay, len(rows[0]) if real is None else real]], np.int32)
    got = steps(backend, layer, rows, window[None], state[None], counts, ONLY, keep=keep)
    return Result(got.inputs, got.out, got.window[0], got.state[0])


def steps(
    backend: Backend,
    layer: Layer,
    rows: tuple[Array, Array, Array],
    windows: Array,
    states: Array,
    counts: Array,
    slots: Array,
    keep: bool = True,
) -> Result:
    """One step of several sequences: windows and states of all slots, counts (S, 2), slots (S,)."""

    def build(*t: Tensor) -> list[Tensor]:
        x, alpha, beta, weight, a, bias, windows, states, counts, slots = t
        inputs = ops.delta_inputs(x, alpha, beta, weight, a, bias, windows, counts, slots, keep=keep)
        out = ops.delta_rule(inputs, states, counts, slots, k_heads=layer.k_heads, eps=EPS, keep=keep)
        return [inputs, out, windows, states]

    leaves = (*rows, layer.weight, layer.a, layer.bias, windows, states, counts, slots)
    return Result(*compute(backend, build, *leaves))


def expected(
    layer: Layer, rows: tuple[Array, Array, Array], history: Array, state: Array
) -> tuple[Array, Array, Array]:
    """Inputs (T, C + 2 Hv), output (T, Hv D) and final S (Hv, value, key) in double precision."""
    x, alpha, beta_raw = (r.astype(np.float64) for r in rows)
    columns = np.concatenate([history.astype(np.float64), x])
    count = len(x)
    mixed = silu(np.stack([np.sum(columns[t : t + layer.taps] * layer.weight.T, axis=0) for t in range(count)]))
    g, beta = layer.a * softplus(alpha + layer.bias), sigmoid(beta_raw)
    inputs = np.concatenate([mixed, g, beta], axis=1)
    return inputs, *expected_rule(inputs, state, layer.k_heads)


def expected_rule(inputs: Array, state: Array, k_heads: int) -> tuple[Array, Array]:
    """Output (T, Hv D) and final S (Hv, value, key) in double precision of rows of the rule's inputs."""
    heads, _, n = state.shape
    count = len(inputs)
    splits = [k_heads * n, 2 * k_heads * n, (2 * k_heads + heads) * n, (2 * k_heads + heads) * n + heads]
    q, k, v, g, beta = np.split(inputs.astype(np.float64), splits, axis=1)
    q = l2_norm(q.reshape(count, k_heads, n), EPS) / np.sqrt(n)
    k, v = l2_norm(k.reshape(count, k_heads, n), EPS), v.reshape(count, heads, n)
    memory = memory_of(state).transpose(0, 2, 1).copy()  # the oracle's is (key, value)
    out = np.empty_like(v)
    for t in range(count):
        for h in range(heads):
            out[t, h] = delta_rule(memory[h], q[t, h % k_heads], k[t, h % k_heads], v[t, h], beta[t, h], g[t, h])
    return out.reshape(count, -1), memory.transpose(0, 2, 1)


def history_of(layer: Layer) -> Array:
    return layer.window[: layer.taps - 1, : layer.channels]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_equals_the_formula(backend: Backend, name: str, count: int, keep: bool) -> None:
    layer = LAYERS[name]
    rows = layer.rows(count)
    got = step(backend, layer, rows, layer.window, layer.state, keep=keep)
    inputs, out, state = expected(layer, rows, history_of(layer), layer.state)
    assert relative(got.inputs[16:], inputs) < INPUTS_TOLERANCE
    assert relative(got.out, out) < RULE_TOLERANCE
    assert relative(memory_of(got.state), memory_of(layer.state) if keep else state) < RULE_TOLERANCE


@pytest.mark.parametrize("count", [17, 100])
def test_prefill_of_any_width_equals_the_formula_and_moves_the_state(backend: Backend, count: int) -> None:
    layer = LAYERS["ratio3"]
    rows = layer.rows(count)
    got = step(backend, layer, rows, layer.window, layer.state, keep=False)
    _, out, state = expected(layer, rows, history_of(layer), layer.state)
    assert relative(got.out, out) < RULE_TOLERANCE
    assert relative(memory_of(got.state), state) < RULE_TOLERANCE
    assert np.array_equal(got.window[: layer.taps - 1, : layer.channels], rows[0][-(layer.taps - 1) :])


def test_pending_rows_leave_the_state_alone(backend: Backend) -> None:
    layer = LAYERS["ratio3"]
    got = step(backend, layer, layer.rows(16), layer.window, layer.state)
    assert np.array_equal(got.state, layer.state)


@pytest.mark.parametrize("kept", range(17))
@pytest.mark.parametrize("name", LAYERS)
def test_replaying_a_kept_prefix_is_bit_equal_to_having_run_only_it(backend: Backend, name: str, kept: int) -> None:
    layer = LAYERS[name]
    first, second = layer.rows(16), layer.rows(5)
    pending = step(backend, layer, first, layer.window, layer.state)
    after = step(backend, layer, second, pending.window, pending.state, replay=kept)
    if kept == 0:
        direct = step(backend, layer, second, layer.window, layer.state)
    else:
        prefix = tuple(r[:kept] for r in first)
        only = step(backend, layer, prefix, layer.window, layer.state, keep=False)
        assert np.array_equal(after.state, only.state)
        direct = step(backend, layer, second, only.window, only.state)
    assert np.array_equal(after.out, direct.out)
    history = layer.taps - 1
    assert np.array_equal(after.window[: history + 5], direct.window[: history + 5])


@pytest.mark.parametrize("kept", [1, 2, 3, 7, 16])
def test_prefill_after_a_kept_prefix_replays_it_too(backend: Backend, kept: int) -> None:
    layer = LAYERS["ratio3"]
    first, second = layer.rows(16), layer.rows(40)
    pending = step(backend, layer, first, layer.window, layer.state)
    after = step(backend, layer, second, pending.window, pending.state, replay=kept, keep=False)
    only = step(backend, layer, tuple(r[:kept] for r in first), layer.window, layer.state, keep=False)
    direct = step(backend, layer, second, only.window, only.state, keep=False)
    assert np.array_equal(after.out, direct.out)
    assert np.array_equal(after.state, direct.state)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_bit_equal_at_every_width(backend: Backend, name: str) -> None:
    layer = LAYERS[name]
    rows = layer.rows(16)
    whole = step(backend, layer, rows, layer.window, layer.state)
    for width in range(1, 16):
        part = step(backend, layer, tuple(r[:width] for r in rows), layer.window, layer.state)
        assert np.array_equal(part.out, whole.out[:width]), width
        assert np.array_equal(part.inputs[16:], whole.inputs[16 : 16 + width]), width


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("real", [1, 2, 5, 15])
def test_padding_rows_leave_no_trace(backend: Backend, real: int, keep: bool) -> None:
    layer = LAYERS["ratio3"]
    rows = layer.rows(16)
    for r in rows:
        r[real:] = np.nan
    padded = step(backend, layer, rows, layer.window, layer.state, real=real, keep=keep)
    exact = step(backend, layer, tuple(r[:real] for r in rows), layer.window, layer.state, keep=keep)
    seen = layer.taps - 1 + (real if keep else 0)
    assert np.array_equal(padded.out[:real], exact.out)
    assert np.array_equal(padded.state, exact.state)
    assert np.array_equal(padded.window[:seen], exact.window[:seen])
    assert not padded.out[real:].any()


@pytest.mark.parametrize("name", LAYERS)
def test_threads_do_not_change_a_bit(cpu: Backend, name: str) -> None:
    layer = LAYERS[name]
    rows = layer.rows(7)
    with Backend("cpu", threads=2) as two:
        one, other = (step(b, layer, rows, layer.window, layer.state, replay=4) for b in (cpu, two))
    assert np.array_equal(one.out, other.out)
    assert np.array_equal(one.state, other.state)


def test_raw_columns_may_be_a_slice_of_wider_rows(backend: Backend) -> None:
    layer = LAYERS["equal"]
    x, alpha, beta = layer.rows(4)
    wide = np.concatenate([x, x + 1], axis=1)

    def build(x: Tensor, *others: Tensor) -> Tensor:
        return ops.delta_inputs(x.slice(1, 0, layer.channels), *others, keep=True)

    leaves = (wide, alpha, beta, layer.weight, layer.a, layer.bias, layer.window[None])
    got = compute(backend, build, *leaves, np.array([[0, 4]], np.int32), ONLY)[0]
    assert np.array_equal(got[16:], step(backend, layer, (x, alpha, beta), layer.window, layer.state).inputs[16:])


def rule(
    backend: Backend, rows: Array, state: Array, pending: Array | None = None, k_heads: int = 1, keep: bool = False
) -> tuple[Array, Array]:
    """Output (T, Hv D) and state after ``rows`` (T, C + 2 Hv) of the rule's inputs, ``pending`` ones replayed."""
    tape = np.zeros((16, rows.shape[1]), np.float32)
    replay = 0 if pending is None else len(pending)
    if pending is not None:
        tape[:replay] = pending
    counts = np.array([[replay, len(rows)]], np.int32)

    def build(inputs: Tensor, states: Tensor, counts: Tensor, slots: Tensor) -> list[Tensor]:
        return [ops.delta_rule(inputs, states, counts, slots, k_heads=k_heads, eps=EPS, keep=keep), states]

    out, after = compute(backend, build, np.concatenate([tape, rows]), state[None], counts, ONLY)
    return out, after[0]


def rule_inputs(count: int, g: Sequence[float], seed: int = 0, heads: int = 2, size: int = 64) -> Array:
    """Rows (T, C + 2 Hv) of the rule's inputs with one key head and decays drawn from ``g``."""
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((count, (2 + heads) * size))
    rows = [columns, rng.choice(g, (count, heads)), rng.uniform(0.02, 0.98, (count, heads))]
    return np.concatenate(rows, axis=1).astype(np.float32)


DECAYS = [[0.0], [-0.7], [-5.0], [-16.0], [-30.0], [-200.0], [0.1], [0.0, -0.01, -1.0, -30.0, -200.0]]


@pytest.mark.parametrize("g", DECAYS, ids=str)
def test_any_decay_equals_the_formula(backend: Backend, g: list[float]) -> None:
    """e^-200 is 0 in float32; e^-16 and e^-30 lie on both sides of the smallest scale."""
    state = LAYERS["short"].state
    rows = rule_inputs(60, g)
    out, after = rule(backend, rows, state)
    wanted, memory = expected_rule(rows, state, 1)
    assert relative(out, wanted) < RULE_TOLERANCE
    assert relative(memory_of(after), memory) < RULE_TOLERANCE


@pytest.mark.parametrize("g", DECAYS, ids=str)
def test_any_decay_is_bit_equal_however_rows_are_grouped(backend: Backend, g: list[float]) -> None:
    state = LAYERS["short"].state
    rows = rule_inputs(48, g)
    _, single = rule(backend, rows[:1], state)
    outs = [rule(backend, rows[:1], state)[0]]
    for t in range(1, 48):
        out, single = rule(backend, rows[t : t + 1], single)
        outs.append(out)
    wanted = np.concatenate(outs)
    whole, final = rule(backend, rows, state)
    assert np.array_equal(whole, wanted)
    assert np.array_equal(final, single)
    for width in (3, 7, 16):
        after, pending, got = state, None, []
        for start in range(0, 48, width):
            new = rows[start : start + width]
            out, after = rule(backend, new, after, pending, keep=True)
            got.append(out)
            pending = new
        assert np.array_equal(np.concatenate(got), wanted), width
        _, after = rule(backend, rows[:1], after, pending, keep=True)  # replays the last ones
        assert np.array_equal(after, single), width


def test_zeros_are_an_empty_state(backend: Backend) -> None:
    rows = rule_inputs(20, [-0.5])
    zeros = np.zeros_like(LAYERS["short"].state)
    ones = zeros.copy()
    ones[:, -1] = 1
    empty, explicit = rule(backend, rows, zeros), rule(backend, rows, ones)
    assert np.array_equal(empty[0], explicit[0])
    assert np.array_equal(empty[1], explicit[1])
    assert relative(empty[0], expected_rule(rows, zeros, 1)[0]) < RULE_TOLERANCE


@pytest.mark.parametrize("g", [0.0, -1e-6, -1e-4, -1e-2, -1.0])
def test_thousands_of_rows_round_no_worse_than_a_plain_float32_state(cpu: Backend, g: float) -> None:
    """With decays that vary, as those of tokens do: rounding of the scale is a walk, not a drift."""
    state = LAYERS["short"].state
    rows = rule_inputs(4000, (g * np.linspace(0, 2, 101)).tolist())
    wanted, memory = expected_rule(rows, state, 1)
    plain_out, plain = plain_float32(rows, state)
    out, after = rule(cpu, rows, state)
    # Squared errors of sums in another order, with twice the roundings where a CPU has no multiply-add.
    assert nmse(out, wanted) < 2 * nmse(plain_out, wanted)
    assert nmse(memory_of(after), memory) < 2 * nmse(plain, memory)


def plain_float32(inputs: Array, state: Array) -> tuple[Array, Array]:
    """What expected_rule gives with one key head, S and every step kept in float32."""
    heads, _, n = state.shape
    q, k, v, g, beta = np.split(inputs, [n, 2 * n, (2 + heads) * n, (2 + heads) * n + heads], axis=1)
    q, k = l2_norm(q, np.float32(EPS)) / np.sqrt(np.float32(n)), l2_norm(k, np.float32(EPS))
    memory = memory_of(state).astype(np.float32)
    out = np.empty((len(inputs), heads, n), np.float32)
    for t in range(len(inputs)):
        memory *= np.exp(g[t])[:, None, None]
        delta = beta[t, :, None] * (v[t].reshape(heads, n) - memory @ k[t])
        memory += delta[:, :, None] * k[t]
        out[t] = memory @ q[t]
    return out.reshape(len(inputs), -1), memory


@pytest.mark.cuda
@pytest.mark.parametrize("name", LAYERS)
def test_cuda_gives_the_numbers_of_the_cpu(cuda: Backend, cpu: Backend, name: str) -> None:
    layer = LAYERS[name]
    rows = layer.rows(16)
    there, here = (step(b, layer, rows, layer.window, layer.state, replay=9, keep=False) for b in (cuda, cpu))
    assert relative(there.out, here.out) < 2 * RULE_TOLERANCE
    assert relative(memory_of(there.state), memory_of(here.state)) < 2 * RULE_TOLERANCE


@pytest.mark.cuda
def test_rows_that_16_byte_reads_do_not_fit_are_refused_on_cuda(cuda: Backend) -> None:
    """An odd number of value heads leaves rows of q and k between multiples of 16 bytes."""
    layer = Layer(1, 3, 128, 4)
    with pytest.raises(DeviceError, match=r"cannot run delta_rule with a result of shape \(4, 384\)"):
        step(cuda, layer, layer.rows(4), layer.window, layer.state)


def leaves_of(graph: Graph, layer: Layer, rows: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    default = {
        "x": (rows, layer.channels), "alpha": (rows, layer.heads), "beta": (rows, layer.heads),
        "conv_weight": (layer.channels, layer.taps), "ssm_a": (layer.heads,), "dt_bias": (layer.heads,),
        "windows": (2, layer.taps - 1 + 16, layer.channels + 2 * layer.heads), "counts": (1, 2), "slots": (1,),
    }  # fmt: skip
    return {
        name: graph.input(shape, GGMLType.I32 if name in ("counts", "slots") else GGMLType.F32)
        for name, shape in (default | shapes).items()
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": (3, 4)}, {"beta": (4, 5)}, {"conv_weight": (100, 4)}, {"ssm_a": (5,)}, {"dt_bias": (1,)},
        {"windows": (2, 19, 10)}, {"windows": (2, 18, 392)}, {"windows": (19, 392)}, {"counts": (1, 3)},
        {"counts": (2,)}, {"counts": (2, 2)}, {"slots": (3,), "counts": (3, 2)}, {"slots": (1, 1)},
        {"x": (4, 40), "conv_weight": (40, 4), "windows": (2, 19, 48)},
        {"conv_weight": (384, 17), "windows": (2, 32, 392)},
    ],
    ids=str,
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused_before_ggml(cpu: Backend, wrong: dict[str, tuple[int, ...]]) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="delta_inputs"):
        ops.delta_inputs(**leaves_of(graph, LAYERS["equal"], 4, **wrong), keep=True)
    graph.close()


def test_more_rows_than_the_tape_holds_cannot_stay_pending(cpu: Backend) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="17 rows of 1 sequences cannot stay pending, a tape holds 16"):
        ops.delta_inputs(**leaves_of(graph, LAYERS["equal"], 17), keep=True)
    graph.close()


@pytest.mark.parametrize(
    ("inputs", "states", "counts", "k_heads"),
    [
        ((20, 392), (1, 4, 33, 64), (1, 2), 4), ((20, 392), (1, 4, 32, 32), (1, 2), 4),
        ((20, 391), (1, 4, 33, 32), (1, 2), 4), ((20, 392), (1, 4, 33, 32), (1, 3), 4),
        ((20, 392), (4, 33, 32), (1, 2), 4), ((20, 392), (1, 4, 33, 32), (2, 2), 4),
        ((16, 392), (1, 4, 33, 32), (1, 2), 4), ((20, 104), (1, 4, 9, 8), (1, 2), 4),
        ((20, 328), (1, 4, 33, 32), (1, 2), 3), ((20, 6152), (1, 4, 513, 512), (1, 2), 4),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_before_ggml(
    cpu: Backend, inputs: tuple[int, ...], states: tuple[int, ...], counts: tuple[int, ...], k_heads: int
) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="delta_rule"):
        ops.delta_rule(
            graph.input(inputs, GGMLType.F32), graph.input(states, GGMLType.F32), graph.input(counts, GGMLType.I32),
            graph.input((1,), GGMLType.I32), k_heads=k_heads, eps=EPS, keep=True,
        )  # fmt: skip
    graph.close()


# --- several sequences in a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_sequences_beside_each_other_are_bit_equal_to_each_alone(seed: int, threads: int) -> None:
    """Any lengths, replay counts and slots, padding behind them; the other slots are left alone."""
    rng = np.random.default_rng(seed)
    layer = list(LAYERS.values())[seed % 3]
    count, kept_slots = int(rng.integers(2, 9)), 12
    slots = rng.permutation(kept_slots)[:count].astype(np.int32)
    counts = np.stack([rng.integers(0, 17, count), rng.integers(0, 17, count)], axis=1).astype(np.int32)
    windows = rng.standard_normal((kept_slots, *layer.window.shape)).astype(np.float32)
    windows[:, layer.taps - 1 :, layer.channels :] = -np.abs(windows[:, layer.taps - 1 :, layer.channels :])
    states = np.stack([layer.state * rng.uniform(0.5, 1) for _ in range(kept_slots)]).astype(np.float32)
    rows = layer.rows(int(counts[:, 1].sum()) + 3)
    with Backend("cpu", threads=threads) as backend:
        got = steps(backend, layer, rows, windows, states, counts, slots)
        first = 0
        for i, (slot, (replay, new)) in enumerate(zip(slots, counts)):
            if new:
                own = tuple(r[first : first + new] for r in rows)
                alone = step(backend, layer, own, windows[slot], states[slot], int(replay))
                assert np.array_equal(got.inputs[16 * i : 16 * i + replay], alone.inputs[:replay])
                assert np.array_equal(got.inputs[16 * count + first :][:new], alone.inputs[16:])
                assert np.array_equal(got.out[first : first + new], alone.out)
                assert np.array_equal(got.window[slot], alone.window)
                assert np.array_equal(got.state[slot], alone.state)
            first += new
    assert not got.out[first:].any()  # padding
    others = np.setdiff1d(np.arange(kept_slots), slots)
    assert np.array_equal(got.window[others], windows[others])
    assert np.array_equal(got.state[others], states[others])


@pytest.mark.cuda
def test_several_sequences_are_refused_on_cuda(cuda: Backend) -> None:
    layer = LAYERS["equal"]
    two = np.stack([layer.window] * 2), np.stack([layer.state] * 2)
    with pytest.raises(DeviceError, match="cannot run delta_inputs"):
        steps(cuda, layer, layer.rows(4), *two, np.array([[0, 2], [0, 2]], np.int32), np.arange(2, dtype=np.int32))
