"""Logits and captured layers equal the numpy oracle, for every geometry and weight type.

What separates an engine from an oracle in double precision is (a) float32 arithmetic, an NMSE of about 1e-13 after a
few layers, and (b) the rounding of activations before each product, which the kernels define: f16 and bf16 weights
round them to their own type, Q8_0 and Q4_0 to 8 bits in blocks of 32, K-quants to 8 bits in blocks of 256. (b) is a
thousand to a billion times larger than (a), so the plain oracle cannot tell a wrong engine from a rounding one. An
oracle that rounds the same way can: the two then differ by (a), until a value lies so close to the middle of two levels
that (a) decides which one it takes. Such a flip is worth a whole level; it spreads to later layers and, through the
caches, to later rows. Hence three demands on quantised weights: rows without a flip exist and agree to 1e-10, the
rounding oracle is at least four times as close as the plain one, and the plain one is within what rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydflash.errors import LoadError, MissingTensor, StateError
from pydflash.models import load_model
from pydflash.runtime import Session
from tests import tiny
from tests.helpers import RoundedReference, captured, cosine, engine_rows, nmse
from tests.reference.qwen35 import Reference
from tests.tiny import GEOMETRIES, K_QUANT_GEOMETRIES, write_target
from tools.synth.layout import Slot

Target = Callable[[str, str], Path]

COSINE = 0.99999
FLOAT32_NMSE = 1e-11
# 8-bit rounding moves a product by 0.6 % to 0.7 % of its size (test_linear.py), which is an NMSE of 5e-5 each. A layer
# has four such products in a row whose errors add up, and gates and norms amplify: 4 layers of 4 products with a gain
# of 10 give 1e-2.
ROUNDING_NMSE = 1e-2
# Rows of 128 and states of 32 average little, and their gain is higher: a flip between f16 levels shows in the sixth
# digit there.
SENSITIVE = ("equal", "mtp", "listed")
QKV = ("attn_q", "attn_k", "attn_v")


def tokens_for(name: str, count: int = 24) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, GEOMETRIES[name].vocab, count).tolist()
    return tokens


@pytest.mark.parametrize("name", GEOMETRIES)
def test_f32_logits_equal_the_oracle(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f32"), tokens_for(name)
    got, wanted = engine_rows(path, tokens), Reference(path).forward(tokens)
    assert cosine(got, wanted) >= COSINE
    assert nmse(got, wanted) < FLOAT32_NMSE
    assert np.array_equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", K_QUANT_GEOMETRIES)
def test_f16_logits_equal_the_oracle(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f16"), tokens_for(name)
    assert cosine(engine_rows(path, tokens), Reference(path).forward(tokens)) >= COSINE


@pytest.mark.parametrize("name", GEOMETRIES)
def test_f16_logits_equal_the_oracle_that_rounds_activations_to_f16(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f16"), tokens_for(name)
    got = engine_rows(path, tokens)
    rounding = RoundedReference(path).forward(tokens)
    assert nmse(got, rounding) < nmse(got, Reference(path).forward(tokens))
    if name not in SENSITIVE:
        assert cosine(got, rounding) >= COSINE


@pytest.mark.parametrize("types", ["bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m"])
@pytest.mark.parametrize("name", K_QUANT_GEOMETRIES)
def test_quantised_logits_equal_the_oracle_that_rounds_activations(target_of: Target, name: str, types: str) -> None:
    path, tokens = target_of(name, types), tokens_for(name)
    got, plain = engine_rows(path, tokens), Reference(path).forward(tokens)
    rounding = RoundedReference(path).forward(tokens)
    assert nmse(got, rounding) < nmse(got, plain) / 4
    assert nmse(got, plain) < ROUNDING_NMSE


@pytest.mark.parametrize("types", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m"])
@pytest.mark.parametrize("name", K_QUANT_GEOMETRIES)
def test_rows_that_no_rounding_flips_agree_to_float32(target_of: Target, name: str, types: str) -> None:
    path, tokens = target_of(name, types), tokens_for(name, 16)
    rounding = RoundedReference(path)
    rounding.forward(tokens)
    errors = [nmse(row, wanted) for row, wanted in zip(captured(path, tokens)[:, 0], rounding.hidden[0])]
    assert np.median(errors) < 1e-10


@pytest.mark.parametrize("name", GEOMETRIES)
def test_captured_layers_are_the_oracle_s_residual_stream(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f32"), tokens_for(name, 13)
    oracle = Reference(path)
    oracle.forward(tokens)
    got = captured(path, tokens)
    for layer in range(oracle.layers):
        assert nmse(got[:, layer], oracle.hidden[layer]) < FLOAT32_NMSE, layer


@pytest.mark.parametrize("name", ["equal", "odd", "gqa6", "mtp"])
def test_biases_of_q_k_and_v_are_added(tmp_path: Path, name: str) -> None:
    path = write_target(tmp_path / "x.gguf", GEOMETRIES[name], seed=1, biases=QKV)
    plain = write_target(tmp_path / "plain.gguf", GEOMETRIES[name], seed=1)
    tokens = tokens_for(name)
    wanted, without = Reference(path).forward(tokens), engine_rows(plain, tokens)
    for width in (8, len(tokens)):  # steps that are exact and one that is wide
        got = engine_rows(path, tokens, width)
        assert nmse(got, wanted) < FLOAT32_NMSE
        assert nmse(got, without) > 1e4 * FLOAT32_NMSE


def test_rows_of_a_model_with_biases_are_bit_equal_at_every_width(tmp_path: Path) -> None:
    path = write_target(tmp_path / "x.gguf", GEOMETRIES["gqa6"], "q8_0", seed=1, biases=QKV)
    tokens = tokens_for("gqa6")
    one = engine_rows(path, tokens, 1)
    for width in (2, 7, 16):
        assert np.array_equal(engine_rows(path, tokens, width), one), width


@pytest.mark.parametrize("some", [("attn_q",), ("attn_k", "attn_v")], ids=str)
def test_a_file_with_some_of_the_biases_is_incomplete(tmp_path: Path, some: tuple[str, ...]) -> None:
    path = write_target(tmp_path / "x.gguf", GEOMETRIES["equal"], biases=some)
    missing = next(name for name in QKV if name not in some)
    with pytest.raises(MissingTensor, match=rf"blk\.3\.{missing}\.bias' of shape \(\d+,\) is missing"):
        load_model(path, "cpu", threads=1)


def test_a_bias_that_does_not_fit_its_projection_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "Slot", lambda name, shape, kind: Slot(name, (shape[0] // 2,), kind))
    path = write_target(tmp_path / "x.gguf", GEOMETRIES["equal"], biases=QKV)
    with pytest.raises(LoadError, match=r"blk\.3\.attn_q\.bias' has shape \(256,\); its metadata asks for \(512,\)"):
        load_model(path, "cpu", threads=1)


def test_layers_are_captured_in_the_order_asked_for(target_of: Target) -> None:
    with load_model(target_of("equal", "f32"), "cpu", threads=1) as model:
        taken = {}
        for capture in ((0, 1, 2), (2, 0), (3,)):
            with Session(model, 256, capture=capture) as session:
                session.forward([5, 6, 7], "none")
                out = np.empty(session.features.shape, np.float32)
                model.backend.read(session.features, out)
                taken[capture] = out[:3]
    assert np.array_equal(taken[2, 0][:, 0], taken[0, 1, 2][:, 2])
    assert np.array_equal(taken[2, 0][:, 1], taken[0, 1, 2][:, 0])
    assert not np.array_equal(taken[3,][:, 0], taken[0, 1, 2][:, 2])


def test_prefill_captures_the_rows_of_its_last_chunk(target_of: Target) -> None:
    path, tokens = target_of("ratio3", "f32"), tokens_for("ratio3", 40)
    oracle = Reference(path)
    oracle.forward(tokens)
    with load_model(path, "cpu", threads=1) as model, Session(model, 256, "f32", "f32", capture=(0, 2)) as session:
        session.forward(tokens, "none")
        out = np.empty(session.features.shape, np.float32)
        model.backend.read(session.features, out)
    for place, layer in enumerate((0, 2)):
        assert nmse(out[:40, place], oracle.hidden[layer]) < FLOAT32_NMSE


def test_a_multi_token_prediction_block_is_skipped(target_of: Target) -> None:
    with load_model(target_of("mtp", "f32"), "cpu", threads=1) as model:
        assert model.config.layers == 4
        assert not any(name.startswith("blk.4.") for name in model.config.tensors())


def test_the_head_runs_for_the_rows_asked_for(target_of: Target) -> None:
    tokens = tokens_for("equal", 9)
    with load_model(target_of("equal", "q8_0"), "cpu", threads=1) as model, Session(model, 256) as session:
        every = session.forward(tokens, "all")
        assert every.logits.shape == (9, model.config.vocab)
        assert every.logits.dtype == np.float32
        assert np.array_equal(every.argmax, every.logits.argmax(axis=1))
        rows = every.logits
        session.commit(0)
        last = session.forward(tokens)
        assert np.array_equal(last.logits, rows[-1:])
        assert last.argmax.tolist() == [rows[-1].argmax()]
        session.commit(0)
        nothing = session.forward(tokens, "none")
        with pytest.raises(StateError, match="ask for 'last' or 'all'"):
            _ = nothing.logits


def test_an_output_is_refused_after_the_next_forward(target_of: Target) -> None:
    with load_model(target_of("equal", "q8_0"), "cpu", threads=1) as model, Session(model, 256) as session:
        first = session.forward([1])
        read = first.logits.copy()
        session.commit(1)
        second = session.forward([2])
        session.commit(1)
        session.forward([3])
        assert np.array_equal(first.logits, read)  # copied in time
        with pytest.raises(StateError, match="earlier forward"):
            _ = second.logits
