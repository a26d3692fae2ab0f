"""From logits to a token: the chain of filters and the random draw.

The chain has llama.cpp's order and definitions: logit bias, mask, penalties, top-k, top-p, min-p, temperature, draw.
The filters see the probabilities at temperature 1; the temperature only reshapes what they leave.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64, Generator

from pydflash.arguments import a_function, an_instance, an_integer, shown
from pydflash.errors import ConfigError, NativeError, ShapeError, SnapshotMismatch
from pydflash.sampling_params import SamplingParams

__all__ = ["Law", "MaskFunction", "Sampler", "SamplingParams", "numerics_failed"]

Ids = npt.NDArray[np.int64]
MaskFunction = Callable[[Sequence[int]], "npt.NDArray[np.bool_] | None"]

BLOCK = 256  # logits per block in the search for the largest, near the square root of a vocabulary
# Temperatures and penalties beyond these act as these do: float32 has nothing useful between them and 0 or infinity.
LEAST, MOST = 1e-30, 1e30
FIRST_NUCLEUS = 256  # top-p rarely keeps more; the search widens from here


class Law(NamedTuple):
    """The candidates of a draw: token ids (n,) and their unnormalised probabilities (n,), in the order of summation."""

    ids: Ids
    weights: npt.NDArray[np.floating[Any]]


class Sampler:
    """Chooses tokens by ``params``; owns the random generator, and nothing else that changes.

    ``mask_fn(history)`` returns a bool array (vocab,) of the tokens a grammar allows next, or None for all. It must
    depend on ``history`` alone, because verification asks about several positions and may throw the answers away.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, mask_fn: MaskFunction | None = None) -> None:
        """Raises ConfigError, also where ``params.logit_bias`` names a token outside the vocabulary."""
        self.params = an_instance(params, SamplingParams, "params")
        self.vocab_size = an_integer(vocab_size, "vocab_size", 1, 2**31 - 1)
        self._mask_fn: MaskFunction | None = a_function(mask_fn, "mask_fn")
        self._generator = Generator(PCG64(params.seed))
        bias = params.logit_bias or {}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._all_ids = np.arange(self.vocab_size)
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        outside = self._bias_ids[self._bias_ids >= self.vocab_size]
        if outside.size:
            raise ConfigError(f"logit_bias names token {outside[0]}; the vocabulary has {self.vocab_size:,} tokens")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken; no random number is used then."""
        return self.params.temperature == 0.0

    @property
    def needs_logits(self) -> bool:
        """False where the argmax of the model's own logits is the answer, so that the device can compute it."""
        changed = self.params.penalises or self._bias_ids.size > 0 or self._mask_fn is not None
        return changed or not self.is_greedy

    def draw(self, logits: npt.NDArray[Any], history: Sequence[int]) -> int:
        """Return the next token after ``history`` (all tokens so far, prompt included).

        ``logits``: (vocab,) float, left unchanged. Uses exactly one uniform number, or none if greedy; the first of
        equal logits wins a greedy choice. Raises ShapeError for other shapes or ids outside the vocabulary, NativeError
        for NaN logits, ConfigError where bias and mask leave no token.
        """
        law = self._law(logits, history)
        if self.is_greedy:
            return int(law.ids[0])
        return int(law.ids[_choose(law.weights, self._generator.random())])

    def probabilities(self, logits: npt.NDArray[Any], history: Sequence[int]) -> tuple[Ids, npt.NDArray[np.float64]]:
        """Return the distribution of ``draw``: ids (n,) of the tokens that remain and their probabilities (n,)
        float64."""
        law = self._law(logits, history)
        weights = law.weights.astype(np.float64)
        return law.ids.copy(), weights / weights.sum()

    def state(self) -> dict[str, Any]:
        """Return the generator's state, made of dicts, strings and integers, for ``restore``."""
        return copy.deepcopy(dict(self._generator.bit_generator.state))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``. Raises SnapshotMismatch for anything that is not a PCG64 state."""
        try:
            self._generator.bit_generator.state = copy.deepcopy(dict(state))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SnapshotMismatch(f"sampler state: not a PCG64 generator state ({error!r})") from error

    def _law(self, logits: npt.NDArray[Any], history: Sequence[int]) -> Law:
        """The chain. Greedy needs only its head: no filter removes the most likely token."""
        if not isinstance(history, Sequence) and np.ndim(history) != 1:
            raise ShapeError(f"the history is {shown(history)}; expected a sequence of token ids")
        original = logits
        logits = self._adjusted(original, history)
        best = int(np.argmax(logits))
        peak = logits[best]
        if not np.isfinite(peak):
            if peak == -np.inf and np.isfinite(np.asarray(original)).any():
                raise ConfigError("logit_bias and mask_fn leave no token that may come next; allow at least one")
            raise numerics_failed(len(history) - 1)
        if self.is_greedy:
            return Law(np.array([best]), np.ones(1))
        ids = self._filtered(logits, peak)
        relative = (logits if ids is None else logits[ids]) - peak
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is its meaning
            weights = np.exp(relative / _bounded(self.params.temperature))
        return Law(self._all_ids if ids is None else ids, weights)

    def _filtered(self, logits: npt.NDArray[np.float32], peak: np.float32) -> Ids | None:
        """Return the ids that top-k, top-p and min-p leave, or None for all of them; ``peak`` is the largest logit."""
        params = self.params
        ids: Ids | None = None
        if params.top_k:
            ids = _largest(logits, params.top_k)
            if params.top_p < 1.0:
                weights = _weights(logits[ids], peak)
                ids = ids[: _nucleus(weights, weights.sum(), params.top_p)]
        elif params.top_p < 1.0:
            ids = _top_p(logits, peak, params.top_p)
        if params.min_p > 0.0:
            likely = (logits if ids is None else logits[ids]) >= peak + np.float32(math.log(params.min_p))
            ids = np.flatnonzero(likely) if ids is None else ids[likely]
        return ids

    def _adjusted(self, logits: npt.NDArray[Any], history: Sequence[int]) -> npt.NDArray[np.float32]:
        """Apply bias, mask and penalties to a copy; without any, return the logits themselves."""
        original: npt.NDArray[np.float32] = _array(logits, np.float32, "logits")
        shape = original.shape
        if shape != (self.vocab_size,):
            raise ShapeError(f"logits have shape {shape}; expected ({self.vocab_size},)")
        mask = self._mask_fn(history) if self._mask_fn is not None else None
        if mask is None and not self._bias_ids.size and not self.params.penalises:
            return original
        adjusted: npt.NDArray[np.float32] = original.copy()
        adjusted[self._bias_ids] += self._bias
        if mask is not None:
            allowed = _array(mask, None, "the answer of mask_fn")
            if allowed.shape != shape or allowed.dtype != np.bool_:
                found = f"{allowed.dtype} of shape {allowed.shape}"
                raise ShapeError(f"mask_fn returned {found}; expected bool of shape {shape}")
            adjusted[~allowed] = -np.inf
        if self.params.penalises:
            self._penalise(adjusted, history)
        return adjusted

    def _penalise(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> None:
        params = self.params
        window = history if params.penalty_window < 0 else history[-params.penalty_window :]
        seen, counts = np.unique(_array(window, np.int64, "the history"), return_counts=True)
        if not seen.size:
            return
        if seen[0] < 0 or seen[-1] >= self.vocab_size:
            wrong = seen[0] if seen[0] < 0 else seen[-1]
            raise ShapeError(f"history holds token {wrong}; the vocabulary has {self.vocab_size:,} tokens")
        x = logits[seen]
        # Dividing a negative logit would make the token more likely, so it is multiplied.
        penalty = _bounded(params.repetition_penalty)
        x = np.where(x <= 0, x * penalty, x / penalty)
        logits[seen] = x - (counts * params.frequency_penalty + params.presence_penalty)


def _array(values: Any, dtype: npt.DTypeLike | None, what: str) -> npt.NDArray[Any]:
    """``values`` as an array; ShapeError where there is none of that type."""
    try:
        return np.asarray(values, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ShapeError(f"{what} cannot be read as an array of numbers: {error}") from None


def _bounded(value: float) -> np.float32:
    """A temperature or a penalty, as far from 0 and from infinity as a quotient in float32 needs."""
    bounded: np.float32 = np.float32(min(max(value, LEAST), MOST))
    return bounded


def numerics_failed(position: int) -> NativeError:
    """The error of every decoder when no token is the most likely one after the token at ``position``."""
    return NativeError(
        f"the logits after position {position} hold NaN or have no finite maximum: the model's numerics failed, or its "
        "weights are damaged; `pydflash info --check FILE` looks for damaged weights"
    )


def _choose(weights: npt.NDArray[np.floating[Any]], uniform: float) -> int:
    """Return the first place where the running sum of ``weights`` exceeds ``uniform`` (0 to 1) of the whole.

    Searches blocks of weights, then inside one: a running sum over a vocabulary costs more than the rest of the chain.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    goal = min(uniform * sums[-1], np.nextafter(sums[-1], 0.0))  # the product may round up to the whole
    block = int(np.searchsorted(sums, goal, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK].astype(np.float64)
    before = sums[block - 1] if block else 0.0
    place = int(np.searchsorted(before + np.cumsum(inside), goal, side="right"))
    if place == len(inside):  # summed in another order the block may fall short: take its last possible token
        place = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + place


def _largest(logits: npt.NDArray[np.float32], count: int) -> Ids:
    """Return the ids of the ``count`` largest finite logits, largest first, lower id first among equals."""
    size = len(logits)
    blocks = size // BLOCK
    threshold = -np.inf
    if count <= blocks // 4:
        # At least `count` logits reach the count-th largest block maximum, so everything below it is out.
        peaks = logits[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        threshold = np.partition(peaks, blocks - count)[blocks - count]
    elif count < size:
        threshold = np.partition(logits, size - count)[size - count]
    # A mask may leave fewer than `count`; the rest of the vocabulary then ties at -inf and must not be sorted.
    candidates = np.flatnonzero(logits >= threshold if threshold > -np.inf else logits > -np.inf)
    order = np.argsort(-logits[candidates], kind="stable")
    ids: Ids = candidates[order[:count]]
    return ids


def _top_p(logits: npt.NDArray[np.float32], peak: np.float32, top_p: float) -> Ids:
    """Return the ids of the fewest most likely tokens whose probabilities sum to ``top_p``, most likely first."""
    total = float(np.exp(logits - peak).sum(dtype=np.float64))
    count = FIRST_NUCLEUS
    while True:
        ids = _largest(logits, count)
        length = _nucleus(_weights(logits[ids], peak), total, top_p)
        if length < len(ids) or len(ids) < count:
            return ids[:length]
        count *= 16


def _weights(logits: npt.NDArray[np.float32], peak: np.float32) -> npt.NDArray[np.float64]:
    """Return probabilities relative to the most likely token's."""
    weights: npt.NDArray[np.float64] = np.exp(logits - peak).astype(np.float64)
    return weights


def _nucleus(weights: npt.NDArray[np.float64], total: float, top_p: float) -> int:
    """Return how many of the descending ``weights`` reach ``top_p`` of ``total``; all of them if they do not."""
    return min(int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1, len(weights))
