"""A `qwen35moe` model computes what the numpy oracle computes, in steps of any width, and a bad file is named.

The rules and the reasons for the tolerances are those of test_logits.py and test_widths.py. What is new is a choice: a
router's logits decide which experts run, and a rounding that flips decides between two experts whose logits are equal
but for that rounding. Such a row is worth as much as one with other weights; the seeds here have none in f32, where
logits would have to agree to 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.errors import BadMetadata, LoadError, MissingTensor
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests import tiny
from tests.helpers import Array, RoundedMoEReference, cosine, nmse, run_chunks
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, WEIGHT_TYPES, write_target
from tools.synth.layout import Slot

Target = Callable[[str, str], Path]

# Rows of moe_fused do not divide into blocks of K-quants.
QUANTISED = [("moe", types) for types in WEIGHT_TYPES[2:]] + [("moe_fused", t) for t in ("bf16", "q8_0", "q4_0")]
EVERY = [(name, types) for name in MOE_GEOMETRIES for types in ("f32", "f16")] + QUANTISED
COSINE, FLOAT32_NMSE, ROUNDING_NMSE = 0.99999, 1e-11, 1e-2  # test_logits.py
SENSITIVE = ("moe_fused",)  # rows of 128 and states of 32, as there
COUNT = 40


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """(geometry name, weight types) to the path of a file, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("experts")

    def write(name: str, types: str) -> Path:
        path = folder / f"{name}-{types}.gguf"
        return path if path.exists() else write_target(path, MOE_GEOMETRIES[name], types=types, seed=1)

    return write


def tokens_for(name: str, count: int = COUNT) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, MOE_GEOMETRIES[name].vocab, count).tolist()
    return tokens


def rows_of(model: Model, tokens: list[int], width: int, cache: str = "f32", **options: Any) -> Array:
    with Session(model, 256, cache, cache, **options) as session:
        return run_chunks(session, tokens, width)


def engine_rows(path: Path, tokens: list[int], width: int = 8) -> Array:
    with load_model(path, "cpu", threads=1) as model:
        return rows_of(model, tokens, width)


def captured(path: Path, tokens: list[int]) -> Array:
    """(rows, layers, hidden) of one forward."""
    with load_model(path, "cpu", threads=1) as model:
        with Session(model, 256, "f32", "f32", capture=tuple(range(model.config.layers))) as session:
            session.forward(tokens, "none")
            out = np.empty(session.features.shape, np.float32)
            model.backend.read(session.features, out)
    return out[: len(tokens)]


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 16, COUNT])
@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_f32_logits_equal_the_oracle(target: Target, name: str, width: int) -> None:
    path, tokens = target(name, "f32"), tokens_for(name)
    got, wanted = engine_rows(path, tokens, width), MoEReference(path).forward(tokens)
    assert nmse(got, wanted) < FLOAT32_NMSE
    assert np.array_equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_captured_layers_are_the_oracle_s_residual_stream(target: Target, name: str) -> None:
    path, tokens = target(name, "f32"), tokens_for(name)
    oracle = MoEReference(path)
    oracle.forward(tokens)
    for count in (13, COUNT):  # a step that is exact and one that is wide
        got = captured(path, tokens[:count])
        for layer in range(oracle.layers):
            assert nmse(got[:, layer], oracle.hidden[layer][:count]) < FLOAT32_NMSE, (count, layer)


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_f16_logits_equal_the_oracle_that_rounds_activations_to_f16(target: Target, name: str) -> None:
    path, tokens = target(name, "f16"), tokens_for(name, 24)
    got, rounding = engine_rows(path, tokens), RoundedMoEReference(path).forward(tokens)
    print("LOOK", name, nmse(got, rounding), nmse(got, MoEReference(path).forward(tokens)))
    assert nmse(got, rounding) < nmse(got, MoEReference(path).forward(tokens))
    if name not in SENSITIVE:
        assert cosine(got, rounding) >= COSINE


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_quantised_logits_equal_the_oracle_that_rounds_activations(target: Target, name: str, types: str) -> None:
    path, tokens = target(name, types), tokens_for(name, 24)
    got, plain = engine_rows(path, tokens), MoEReference(path).forward(tokens)
    print("LOOK", name, types, nmse(got, RoundedMoEReference(path).forward(tokens)), nmse(got, plain))
    assert nmse(got, RoundedMoEReference(path).forward(tokens)) < nmse(got, plain) / 4
    assert nmse(got, plain) < ROUNDING_NMSE


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_rows_that_no_rounding_flips_agree_to_float32(target: Target, name: str, types: str) -> None:
    path, tokens = target(name, types), tokens_for(name, 16)
    rounding = RoundedMoEReference(path)
    rounding.forward(tokens)
    errors = [nmse(row, wanted) for row, wanted in zip(captured(path, tokens)[:, 0], rounding.hidden[0])]
    print("LOOK", name, types, np.median(errors))
    assert np.median(errors) < 1e-10


# --- the width --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "types"), EVERY)
def test_rows_are_bit_equal_at_every_width_up_to_16(target: Target, name: str, types: str) -> None:
    tokens = tokens_for(name, 33)
    with load_model(target(name, types), "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1, "q8_0")
        for width in range(2, 17):
            assert np.array_equal(rows_of(model, tokens, width, "q8_0"), single), width


@pytest.mark.parametrize("types", ["f32", "q8_0", "q4_k_m"])
def test_threads_do_not_change_a_bit(target: Target, types: str) -> None:
    tokens, results = tokens_for("moe"), []
    for threads in (1, 2):
        with load_model(target("moe", types), "cpu", threads=threads) as model:
            results.append([rows_of(model, tokens, width) for width in (1, 5, COUNT)])
    assert all(np.array_equal(*each) for each in zip(*results))


@pytest.mark.parametrize(("name", "types"), EVERY)
def test_prefill_agrees_with_single_steps_within_rounding(target: Target, name: str, types: str) -> None:
    """As of test_widths.py: no further than single steps are from the oracle that rounds nothing."""
    path, tokens = target(name, types), tokens_for(name, 100)
    with load_model(path, "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1)
        explained = max(1e-10, nmse(single, MoEReference(path).forward(tokens)))
        for chunk in (32, 64, 512):
            wide = rows_of(model, tokens, len(tokens), chunk=chunk)
            print("LOOK", name, types, chunk, nmse(wide, single), explained)
            assert nmse(wide, single) < explained
