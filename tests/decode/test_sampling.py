"""The sampler chooses by the law it states, and that law is the textbook one, in llama.cpp's order."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pydflash.decode import Sampler, SamplingParams
from pydflash.errors import ConfigError, NativeError, ShapeError, SnapshotMismatch

QWEN_VOCAB = 248_320


def make_logits(size: int, seed: int = 0, spread: float = 3.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def slow_law(logits: npt.NDArray[np.float32], history: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """The chain, one token at a time, in the words of the definitions."""
    x = {i: float(value) for i, value in enumerate(logits)}
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    window = (
        list(history) if params.penalty_window < 0 else list(history)[max(0, len(history) - params.penalty_window) :]
    )
    for token in set(window):
        x[token] = x[token] * params.repetition_penalty if x[token] <= 0 else x[token] / params.repetition_penalty
        x[token] -= window.count(token) * params.frequency_penalty + params.presence_penalty
    order = sorted((i for i in x if x[i] > -math.inf), key=lambda i: (-x[i], i))
    if params.temperature == 0:
        return {order[0]: 1.0}
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        total = sum(math.exp(x[i] - x[order[0]]) for i in order)
        mass, kept = 0.0, []
        for i in order:
            kept.append(i)
            mass += math.exp(x[i] - x[order[0]]) / total
            if mass >= params.top_p:
                break
        order = kept
    if params.min_p > 0:
        order = [i for i in order if math.exp(x[i] - x[order[0]]) >= params.min_p]
    weights = {i: math.exp((x[i] - x[order[0]]) / params.temperature) for i in order}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


CHAINS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.8, "top_k": 600},
    {"temperature": 0.8, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 30},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": -0.4, "penalty_window": -1},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 1.5, "penalty_window": 3},
    {"temperature": 1.0, "repetition_penalty": 9.0, "penalty_window": 0},
    {"temperature": 1.0, "logit_bias": {3: 4.5, 7: -math.inf, 11: -50.0}},
    {"repetition_penalty": 2.0, "logit_bias": {5: 20.0}},
]


@pytest.mark.parametrize("size", [7, 300, 4096, 20_000])
@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_probabilities_follow_the_definitions(options: dict[str, Any], size: int) -> None:
    options = dict(options)
    if "logit_bias" in options:
        options["logit_bias"] = {token: bias for token, bias in options["logit_bias"].items() if token < size}
    params = SamplingParams(**options)
    logits = make_logits(size, seed=size)
    history = [1, 2, 2, 5, 6, 2, int(np.argmax(logits))]
    before = logits.copy()
    ids, p = Sampler(params, size).probabilities(logits, history)
    expected = slow_law(logits, history, params)
    possible = {int(i): float(value) for i, value in zip(ids, p) if value > 0}
    assert possible.keys() == expected.keys()
    # float32 exponentials of differences up to about 30 / temperature: a relative error of a few 1e-6.
    assert [possible[i] for i in expected] == pytest.approx(list(expected.values()), rel=2e-5)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (logits == before).all()


def test_ties_at_the_cut_keep_the_lower_ids() -> None:
    logits = np.zeros(5000, np.float32)
    logits[[4000, 100, 3000]] = 2.0
    for top_k, expected in ((2, [100, 3000]), (5, [100, 3000, 4000, 0, 1])):
        ids, _ = Sampler(SamplingParams(temperature=1.0, top_k=top_k), 5000).probabilities(logits, [])
        assert ids.tolist() == expected
    ids, p = Sampler(SamplingParams(temperature=1.0, top_p=0.5), 4).probabilities(np.zeros(4, np.float32), [])
    assert ids.tolist() == [0, 1]
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.95},
        {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 1.0, "top_p": 0.9, "logit_bias": {0: 2.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [40, 2000])
def test_draws_follow_the_stated_probabilities(options: dict[str, Any], size: int) -> None:
    """Chi-square with a fixed seed; the bound is the 99.99 % point (Wilson-Hilferty): one seed in 10,000 fails."""
    logits, draws = make_logits(size, seed=5, spread=1.5), 10_000
    sampler = Sampler(SamplingParams(seed=1234, **options), size)
    ids, p = sampler.probabilities(logits, [1, 2, 3])
    counts = np.bincount([sampler.draw(logits, [1, 2, 3]) for _ in range(draws)], minlength=size)
    assert counts.sum() == counts[ids].sum()  # nothing outside the law was drawn
    expected, seen = p * draws, counts[ids]
    rare = expected < 5
    if rare.any():  # cells with few expected draws are counted together
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    freedom = len(expected) - 1
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


class OneNumber:
    """Stands in for the generator: always the same uniform, counted."""

    def __init__(self, value: float) -> None:
        self.value, self.used = value, 0

    def random(self) -> float:
        self.used += 1
        return self.value


@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_a_draw_uses_one_uniform_and_greedy_none(options: dict[str, Any]) -> None:
    params = SamplingParams(seed=3, **options)
    sampler, logits = Sampler(params, 5000), make_logits(5000)
    mirror = np.random.Generator(np.random.PCG64(3))
    for _ in range(5):
        sampler.draw(logits, [1, 2])
        sampler.probabilities(logits, [1, 2])
    if not sampler.is_greedy:
        mirror.random(5)
    assert sampler.state() == mirror.bit_generator.state


def test_one_uniform_is_used_when_one_token_remains() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1, seed=3), 50)
    sampler.draw(make_logits(50), [])
    mirror = np.random.Generator(np.random.PCG64(3))
    mirror.random()
    assert sampler.state() == mirror.bit_generator.state


@pytest.mark.parametrize("size", [5, 1000])
def test_the_uniform_picks_by_cumulative_probability(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with probability 0 is never drawn, not even by 0 or by the largest number below 1."""
    logits = np.full(size, -np.inf, np.float32)
    possible = [1, size - 2] if size == 5 else [300, 511, 512, 900]
    logits[possible] = 1.0
    sampler = Sampler(SamplingParams(temperature=1.0), size)
    for uniform in (0.0, 0.25, 0.4999999, 0.5, 0.75, 1 - 2**-53):
        monkeypatch.setattr(sampler, "_generator", OneNumber(uniform))
        assert sampler.draw(logits, []) == possible[int(uniform * len(possible))]


def test_greedy_takes_the_first_of_equals_and_ignores_filters() -> None:
    logits = np.array([0.0, 3.0, 3.0, -1.0], np.float32)
    sampler = Sampler(SamplingParams(top_k=1, top_p=0.1, min_p=0.9), 4)
    assert sampler.draw(logits, []) == 1
    ids, p = sampler.probabilities(logits, [])
    assert (ids.tolist(), p.tolist()) == ([1], [1.0])


def test_a_tiny_temperature_is_greedy_without_warnings() -> None:
    logits = make_logits(1000)
    for temperature in (1e-6, 1e-30, 1e-300):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0), 1000)
        assert sampler.draw(logits, []) == int(np.argmax(logits))


@pytest.mark.parametrize(
    ("options", "masked", "greedy", "needs"),
    [
        ({}, False, True, False),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.5, "seed": 1}, False, True, False),
        ({"repetition_penalty": 1.1, "penalty_window": 0}, False, True, False),
        ({"logit_bias": {}}, False, True, False),
        ({"repetition_penalty": 1.1}, False, True, True),
        ({"frequency_penalty": 0.1}, False, True, True),
        ({"presence_penalty": -0.1}, False, True, True),
        ({"logit_bias": {1: 1.0}}, False, True, True),
        ({}, True, True, True),
        ({"temperature": 0.1}, False, False, True),
    ],
)
def test_logits_are_needed_only_where_argmax_is_not_the_answer(
    options: dict[str, Any], masked: bool, greedy: bool, needs: bool
) -> None:
    sampler = Sampler(SamplingParams(**options), 10, mask_fn=(lambda history: None) if masked else None)
    assert (sampler.is_greedy, sampler.needs_logits) == (greedy, needs)


def test_a_mask_limits_every_kind_of_draw_and_sees_the_history() -> None:
    logits, asked = make_logits(20_000), []

    def allow_three(history: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        asked.append(list(history))
        mask = np.zeros(20_000, bool)
        mask[[10, 15_000, 19_999]] = True
        return mask if history else None

    chains: list[dict[str, Any]] = [{}, {"temperature": 1.0}]
    chains += [{"temperature": 1.0, "top_k": 20}, {"temperature": 1.0, "top_p": 0.9999}]
    for options in chains:
        sampler = Sampler(SamplingParams(seed=1, **options), 20_000, mask_fn=allow_three)
        assert {sampler.draw(logits, [4]) for _ in range(50)} <= {10, 15_000, 19_999}
        ids, p = sampler.probabilities(logits, [])
        assert len(ids) == 1 or len(ids) > 3
        assert p.sum() == pytest.approx(1.0)
    assert asked[0] == [4]


def test_a_mask_of_the_wrong_kind_or_without_tokens_is_refused() -> None:
    logits = make_logits(8)
    for mask in (np.ones(7, bool), np.ones(8, np.float32)):
        with pytest.raises(ShapeError, match=r"mask_fn returned .*; expected bool of shape \(8,\)"):
            Sampler(SamplingParams(), 8, mask_fn=partial(lambda mask, history: mask, mask)).draw(logits, [])
    with pytest.raises(ConfigError, match="leave no token"):
        Sampler(SamplingParams(), 8, mask_fn=lambda history: np.zeros(8, bool)).draw(logits, [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_refused(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 8)
    with pytest.raises(ShapeError, match=r"logits have shape \(1, 8\); expected \(8,\)"):
        sampler.draw(np.zeros((1, 8), np.float32), [])
    for bad in (np.nan, np.inf):
        logits = make_logits(8)
        logits[5] = bad
        with pytest.raises(NativeError, match="have no finite maximum"):
            sampler.draw(logits, [])


def test_history_outside_the_vocabulary_is_refused() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.0), 8)
    for token in (-1, 8):
        with pytest.raises(ShapeError, match=f"history holds token {token}; the vocabulary has 8"):
            sampler.draw(make_logits(8), [1, token])


def test_history_may_be_empty_or_an_array() -> None:
    sampler, logits = Sampler(SamplingParams(presence_penalty=2.0), 8), np.arange(8, dtype=np.float32)
    assert sampler.draw(logits, []) == 7
    assert sampler.draw(logits, np.array([7])) == 6  # type: ignore[arg-type]


def test_state_restores_the_same_future() -> None:
    logits = make_logits(500)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7), 500)
    sampler.draw(logits, [])
    saved = sampler.state()
    kept = copy.deepcopy(saved)
    future = [sampler.draw(logits, []) for _ in range(20)]
    assert saved == kept  # a snapshot does not follow the generator
    other = Sampler(SamplingParams(temperature=1.0), 500)
    other.restore(json.loads(json.dumps(saved)))
    assert [other.draw(logits, []) for _ in range(20)] == future


@pytest.mark.parametrize(
    "state", [{}, {"bit_generator": "MT19937"}, {"bit_generator": "PCG64", "state": {"state": -1}}]
)
def test_a_foreign_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(SnapshotMismatch, match="sampler state"):
        Sampler(SamplingParams(), 5).restore(state)


def test_equal_seeds_give_equal_draws_and_no_seed_gives_different_ones() -> None:
    logits = make_logits(5000, spread=0.1)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 5000)
        return [sampler.draw(logits, []) for _ in range(20)]

    assert draws(11) == draws(11) != draws(12)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: a finite number, 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": -1}, "top_k is -1; allowed: an integer, 0 or more"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: a finite number, above 0, at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5; allowed: a finite number, -2 or more, at most 2"),
        ({"presence_penalty": -3}, "presence_penalty is -3"),
        ({"logit_bias": [1]}, "logit_bias is \\[1\\]"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias has -1"),
        ({"logit_bias": {1: math.inf}}, "logit_bias has 1: inf"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has 'a'"),
        ({"seed": -1}, "seed is -1; allowed: an integer, 0 to"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: an integer, 1 or more"),
        ({"stop": ("a", "")}, "stop is"),
        ({"stop": 5}, "stop is 5"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"penalty_window": -2}, "penalty_window is -2"),
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


def test_unknown_options_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_values_are_normalised_and_frozen() -> None:
    bias = {np.int64(3): np.float32(1.5)}
    params = SamplingParams(temperature=1, top_k=np.int32(4), stop="END", logit_bias=bias)  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.stop, params.logit_bias) == (1.0, 4, ("END",), {3: 1.5})
    assert type(params.top_k) is int
    assert type(params.temperature) is float
    bias.clear()
    assert params.logit_bias == {3: 1.5}
    with pytest.raises(AttributeError):
        params.top_k = 5  # type: ignore[misc]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_a_bias_outside_the_vocabulary_is_refused_when_the_vocabulary_is_known() -> None:
    with pytest.raises(ConfigError, match="logit_bias names token 10; the vocabulary has 10 tokens"):
        Sampler(SamplingParams(logit_bias={10: 1.0}), 10)


def test_the_whole_chain_runs_on_a_full_vocabulary() -> None:
    logits = make_logits(QWEN_VOCAB)
    history = list(range(1000))
    params = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, seed=0)
    ids, p = Sampler(params, QWEN_VOCAB).probabilities(logits, history)
    expected = slow_law(logits, history, params)
    assert ids.tolist() == list(expected)
    assert p == pytest.approx(list(expected.values()), rel=2e-5)


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_a_huge_temperature_makes_what_is_left_equally_likely(temperature: float) -> None:
    logits = np.where(np.arange(100) < 50, make_logits(100), -np.inf).astype(np.float32)
    ids, p = Sampler(SamplingParams(temperature=temperature, seed=0), 100).probabilities(logits, [])
    assert p[ids < 50] == pytest.approx(1 / 50, rel=1e-3)
    assert p[ids >= 50].sum() == 0


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_what_float32_holds_leaves_the_rest_alone(penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty)
    logits = np.array([0.0, -1.0, 2.0, 1.0], np.float32)
    assert Sampler(params, 4).draw(logits, [0, 1]) in (1, 2)
    assert Sampler(params, 4).draw(logits, [2, 2]) == (2 if penalty < 1 else 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 10**400}, {"top_k": -(10**5000)}, {"logit_bias": {2**64: 1.0}},
        {"logit_bias": {1: 10**400}}, {"logit_bias": {1: 1e39}}, {"logit_bias": {1: math.inf}}, {"logit_bias": [1]},
        {"min_p": np.zeros(3)}, {"stop": b"abc"}, {"seed": -(10**5000)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_numbers_beyond_every_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("history", [5, {1, 2}, ["a"], [[1], [1, 2]], np.zeros((2, 2), np.int64)], ids=str)
def test_a_history_that_is_none_is_refused(history: Any) -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.0), 8)
    with pytest.raises(ShapeError, match="history"):
        sampler.draw(np.zeros(8, np.float32), history)
