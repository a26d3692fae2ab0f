"""The measures of the quality table give exact answers where these are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.kv_quality.metrics import (
    agreement,
    kl_divergence,
    log_softmax,
    percentile,
    perplexity,
    relative_error,
)

ROUNDING = 1e-12  # float64, a few operations


def logits(*rows: list[float]) -> np.ndarray:
    """Logits of given probabilities, shifted: what the measures may not depend on."""
    return np.log(np.array(rows)) + np.arange(len(rows))[:, None]


def test_kl_divergence_of_known_distributions() -> None:
    p = logits([0.5, 0.5], [0.75, 0.25], [0.25, 0.75])
    q = logits([0.25, 0.75], [0.75, 0.25], [0.5, 0.5])
    wanted = [0.5 * math.log(4 / 3), 0.0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    assert kl_divergence(p, q) == pytest.approx(wanted, abs=ROUNDING)


def test_kl_divergence_takes_the_reference_first() -> None:
    p, q = logits([0.5, 0.5]), logits([0.1, 0.9])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(0.25 / 0.09), abs=ROUNDING)
    assert kl_divergence(q, p)[0] == pytest.approx(0.1 * math.log(0.2) + 0.9 * math.log(1.8), abs=ROUNDING)


def test_kl_divergence_of_two_point_logits_is_that_of_a_coin() -> None:
    """Logits (0, t) against (0, 0): KL = log 2 - entropy, in closed form."""
    for t in (1e-3, 1.0, 30.0):
        a = 1 / (1 + math.exp(-t))
        entropy = -(a * math.log(a) + (1 - a) * math.log1p(-a)) if a < 1 else 0.0
        found = kl_divergence(np.array([[0.0, t]]), np.zeros((1, 2)))[0]
        assert found == pytest.approx(math.log(2) - entropy, abs=ROUNDING)


def test_probabilities_sum_to_one_for_logits_of_any_size() -> None:
    values = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    assert np.exp(log_softmax(values)).sum(axis=1) == pytest.approx([1, 1], abs=ROUNDING)
    assert log_softmax(values)[1] == pytest.approx([-math.log(3)] * 3, abs=ROUNDING)


def test_percentiles_interpolate_between_neighbours() -> None:
    values = np.random.default_rng(0).permutation(1001).astype(np.float64)
    assert percentile(values, 99.9) == pytest.approx(999, abs=1e-9)
    assert percentile(values, 50) == 500
    assert percentile(np.array([0.0, 1.0]), 99.9) == pytest.approx(0.999, abs=ROUNDING)


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability() -> None:
    rows = logits([0.5, 0.25, 0.25], [0.125, 0.5, 0.375])
    assert perplexity(rows, np.array([0, 0])) == pytest.approx(4, abs=ROUNDING)
    assert perplexity(np.zeros((5, 7)), np.arange(5)) == pytest.approx(7, abs=ROUNDING)


def test_agreement_counts_rows_with_the_same_best_token() -> None:
    a = np.array([[1, 2], [2, 1], [0, 3], [5, 4]])
    b = np.array([[0, 9], [1, 2], [1, 3], [2, 1]])
    assert agreement(a, b) == 0.75


def test_relative_error_is_a_ratio_of_norms() -> None:
    assert relative_error(np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[0.0, 0.0], [0.0, 4.0]])) == 0.75
