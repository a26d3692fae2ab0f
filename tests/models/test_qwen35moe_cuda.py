"""`qwen35moe` models on a GPU are as near the oracle as rounding allows.

The rules are those of test_cuda.py: the CPU's distance from the oracle says how far CUDA may be. Products with experts
round nothing on CUDA; the others round activations to f16. Where rounding makes a router choose another expert, a text
goes another way from there on: its distance says nothing about the arithmetic. So there are many short texts, and the
median of their distances counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydflash.models import load_model
from pydflash.runtime import Session
from tests.helpers import Array, nmse
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, WEIGHT_TYPES

pytestmark = pytest.mark.cuda

Target = Callable[[str, str], Path]

# Rows of moe_fused do not divide into blocks of K-quants.
QUANTISED = [("moe", types) for types in WEIGHT_TYPES[3:]] + [("moe_fused", types) for types in ("q8_0", "q4_0")]
MORE_ROUNDINGS = 4  # test_cuda.py
TEXTS, WIDE_TEXTS = (24, 8), (12, 24)  # how many, of how many tokens


def texts_for(name: str, shape: tuple[int, int]) -> list[list[int]]:
    tokens: list[list[int]] = np.random.default_rng(11).integers(0, MOE_GEOMETRIES[name].vocab, shape).tolist()
    return tokens


def rows_on(device: str, path: Path, texts: list[list[int]], cache: str = "f16") -> list[Array]:
    """Logits of each text, read in one forward."""
    rows = []
    with load_model(path, device, threads=1) as model, Session(model, 256, cache, cache) as session:
        for text in texts:
            session.reset()
            rows.append(session.forward(text, "all").logits)
    return rows


def typical(rows: list[Array], oracle: list[Array]) -> float:
    """The median of the texts' NMSE."""
    return float(np.median([nmse(*pair) for pair in zip(rows, oracle)]))


def oracle_rows(path: Path, texts: list[list[int]]) -> list[Array]:
    reference = MoEReference(path)
    rows = []
    for text in texts:
        reference.reset()
        rows.append(reference.forward(text))
    return rows


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_logits_of_f32_weights_are_as_near_the_oracle_as_f16_rounding_allows(target_of: Target, name: str) -> None:
    texts = texts_for(name, TEXTS)
    oracle = oracle_rows(target_of(name, "f32"), texts)
    allowed = MORE_ROUNDINGS * typical(rows_on("cpu", target_of(name, "f16"), texts), oracle)
    assert typical(rows_on("cuda", target_of(name, "f32"), texts), oracle) < allowed


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_logits_of_quantised_weights_are_nearer_the_oracle_than_the_cpu_s(
    target_of: Target, name: str, types: str
) -> None:
    """11 bits of an activation, or all of them, instead of 8."""
    path, texts = target_of(name, types), texts_for(name, TEXTS)
    oracle = oracle_rows(path, texts)
    assert typical(rows_on("cuda", path, texts), oracle) < typical(rows_on("cpu", path, texts), oracle)


@pytest.mark.parametrize(("name", "types"), [("moe", "q4_k_m"), ("moe", "q8_0"), ("moe_fused", "q8_0")])
def test_prefill_is_as_near_the_oracle_as_8_bit_rounding_allows(target_of: Target, name: str, types: str) -> None:
    """ggml's products for wide steps round activations to 8 bits in blocks of 32 for every quantised type."""
    path, texts = target_of(name, types), texts_for(name, WIDE_TEXTS)
    oracle = oracle_rows(path, texts)
    allowed = MORE_ROUNDINGS * typical(rows_on("cpu", path, texts), oracle)
    assert typical(rows_on("cuda", path, texts), oracle) < allowed
