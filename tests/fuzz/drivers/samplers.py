"""Sampling parameters at the edges of numbers and of wrong types, and draws from logits of every kind."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from pydflash.decode import Sampler, SamplingParams
from tests.fuzz.drivers.edits import INTEGERS, REALS
from tests.fuzz.junk import choose, revive

__all__ = ["Samplers"]

FIELDS = tuple(field.name for field in fields(SamplingParams))
VOCAB = 300
LOGITS = {
    "normal": lambda rng: rng.normal(0, 4, VOCAB), "equal": lambda _: np.zeros(VOCAB),
    "nan": lambda rng: np.where(rng.random(VOCAB) < 0.1, np.nan, 1.0), "all nan": lambda _: np.full(VOCAB, np.nan),
    "-inf": lambda rng: np.where(rng.random(VOCAB) < 0.9, -np.inf, 1.0), "all -inf": lambda _: np.full(VOCAB, -np.inf),
    "inf": lambda rng: np.where(rng.random(VOCAB) < 0.1, np.inf, 1.0), "large": lambda rng: rng.normal(0, 1e38, VOCAB),
    "tiny": lambda rng: rng.normal(0, 1e-44, VOCAB),
}  # fmt: skip


class Samplers:
    def __init__(self, folder: Path) -> None:
        pass

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        params: dict[str, Any] = {"temperature": rng.choice((0.0, 0.5, 1.0, 1e-40, 1e38, 1e300))}
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            name = rng.choice(FIELDS)
            params[name] = _value(rng)
            if name == "logit_bias" and rng.random() < 0.8:
                params[name] = [[rng.choice(INTEGERS), rng.choice(REALS)] for _ in range(rng.randrange(4))]
        return {
            "params": params,
            "vocab": VOCAB if rng.random() < 0.97 else choose(rng),
            "logits": rng.choice(list(LOGITS)) if rng.random() < 0.95 else choose(rng),
            "history": [rng.randrange(VOCAB) for _ in range(rng.randrange(80))] if rng.random() < 0.9 else choose(rng),
            "mask": rng.choice((None, None, None, None, "some", "some", "none", choose(rng))),
            "state": None if rng.random() < 0.95 else choose(rng),
        }

    def run(self, recipe: dict[str, Any]) -> None:
        bias = recipe["params"].get("logit_bias")
        revived = {name: revive(value) for name, value in recipe["params"].items()}
        if isinstance(bias, list):
            revived["logit_bias"] = dict(map(tuple, bias))
        sampler = Sampler(SamplingParams(**revived), revive(recipe["vocab"]), _mask(recipe["mask"]))
        if recipe["state"] is not None:
            sampler.restore(revive(recipe["state"]))
        logits, history = revive(recipe["logits"]), revive(recipe["history"])
        if isinstance(logits, str) and logits in LOGITS:
            logits = LOGITS[logits](np.random.default_rng(len(str(recipe)))).astype(np.float32)
        token = sampler.draw(logits, history)
        assert 0 <= token < VOCAB
        ids, weights = sampler.probabilities(logits, history)
        assert len(ids) == len(weights) > 0
        assert np.isfinite(weights).all()
        sampler.restore(sampler.state())


def _value(rng: random.Random) -> Any:
    """Often one that some parameter can have."""
    if rng.random() < 0.6:
        return rng.choice((0, 1, 2, 20, 0.5, 0.9, 1.0, 1.5, 1e-300, 1e300, 300, 2**31, 1e-9, 0.999999999, -1))
    return choose(rng) if rng.random() < 0.5 else rng.choice((*INTEGERS, *REALS))


def _mask(kind: Any) -> Any:
    masks = {"some": np.arange(VOCAB) % 7 == 0, "none": np.zeros(VOCAB, bool)}
    if kind is None:
        return None
    return lambda history: masks[kind] if isinstance(kind, str) else revive(kind)
