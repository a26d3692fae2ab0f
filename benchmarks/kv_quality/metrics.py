"""How far one distribution over tokens is from another: what a table of cache types is made of.

Rows are positions, logits (rows, vocab) of any scale; natural logarithms throughout, so divergences are in nats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["agreement", "kl_divergence", "log_softmax", "percentile", "perplexity", "relative_error"]

Array = npt.NDArray[np.floating]


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities of each row, in float64: (rows, vocab)."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(reference: Array, other: Array) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each row, (rows,) nats."""
    p, q = log_softmax(reference), log_softmax(other)
    result: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return result


def percentile(values: Array, percent: float) -> float:
    """The value that ``percent`` of all values do not exceed, linear between neighbours."""
    return float(np.percentile(values, percent))


def agreement(reference: Array, other: Array) -> float:
    """Share of rows with the same most likely token, 0 to 1."""
    return float(np.mean(np.argmax(reference, axis=-1) == np.argmax(other, axis=-1)))


def perplexity(logits: Array, following: npt.NDArray[np.integer]) -> float:
    """exp of the mean negative log-likelihood: row i gives the probability of token ``following[i]``."""
    chosen = np.take_along_axis(log_softmax(logits), np.asarray(following)[:, None], axis=-1)
    return float(np.exp(-chosen.mean()))


def relative_error(got: Array, want: Array) -> float:
    """The norm of the difference over the norm of ``want``, of all rows together."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
