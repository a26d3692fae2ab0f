"""Scaled RoPE: a file's keys become the angles that they ask for, in the target and in the draft, or are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import DraftSession, load_draft
from pydflash.errors import BadMetadata, SnapshotMismatch
from pydflash.files import GGUFFile
from pydflash.models import load_model
from pydflash.models.rope import read_rope
from pydflash.ops import Rope
from pydflash.runtime import Session
from tests.helpers import cosine, engine_rows, nmse
from tests.reference.dflash import DraftReference
from tests.reference.qwen35 import Reference
from tests.reference.qwen35moe import MoEReference
from tests.tiny import GEOMETRIES, MOE_GEOMETRIES, write_draft, write_target

FLOAT32_NMSE = 1e-11  # test_hybrid.py
COSINE = 0.99999  # drafts/test_dflash.py

LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
# So short a context that text of a few dozen tokens goes beyond it.
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "an old file's linear": {"rope.scale_linear": 2.0},
    "yarn": YARN,
    "yarn of the file's context": {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.5},
    "yarn, all said": YARN
    | {
        "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5, "rope.scaling.yarn_attn_factor": 1.5,
        "rope.scaling.attn_factor": 0.8, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0,
    },
    "a magnitude alone": {"rope.scaling.attn_factor": 1.25},
}  # fmt: skip
PLAIN: dict[str, dict[str, Any]] = {
    "none": {"rope.scaling.type": "none"},
    "none, whatever the factor": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "linear by 1": LINEAR | {"rope.scaling.factor": 1.0},
    "linear by nothing": {"rope.scaling.type": "linear"},
    "yarn by 1": YARN | {"rope.scaling.factor": 1.0},
}


def tokens_for(vocab: int, count: int = 24) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, vocab, count).tolist()
    return tokens


# --- the keys ---------------------------------------------------------------------------------------------------------


def rope_of(path: Path) -> Rope:
    with GGUFFile.open(path) as file:
        return read_rope(file, "qwen35.", 64, 256)


def test_yarn_keeps_the_fast_pairs_and_slows_the_slow_ones(tmp_path: Path) -> None:
    """Pairs before the 14th turn more than 32 times in 262,144 positions, those from the 22nd on less than once."""
    keys = YARN | {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 262_144}
    rope = rope_of(write_target(tmp_path / "x.gguf", GEOMETRIES["gqa6"], keys=keys))
    assert rope == Rope(64, 1e7, 4.0, 14, 22, float(np.float32(1 + 0.1 * math.log(4))))
    turns = [262_144 * 1e7 ** (-i / 32) / (2 * math.pi) for i in range(32)]
    assert turns[14] > 32 > turns[15]
    assert turns[21] > 1 > turns[22]


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(64, 1e7)),
        (PLAIN["none, whatever the factor"], Rope(64, 1e7)),
        (LINEAR, Rope(64, 1e7, 4.0)),
        ({"rope.scaling.factor": 4.0}, Rope(64, 1e7, 4.0)),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, Rope(64, 1e7, 4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.attn_factor": 0.5}, Rope(64, 1e7, magnitude=0.5)),
        (YARN | {"rope.scaling.yarn_beta_fast": 1.0}, Rope(64, 1e7, 8.0, 3, 4, float(np.float32(1.2079442)))),
        (YARN | {"rope.scaling.original_context_length": 1}, Rope(64, 1e7, 8.0, 0, 1, float(np.float32(1.2079442)))),
        (YARN | {"rope.freq_base": 1.001}, Rope(64, 1.001, 8.0, 0, 63, float(np.float32(1.2079442)))),
    ],
    ids=str,
)
def test_the_keys_say_how_a_head_turns(tmp_path: Path, keys: dict[str, Any], rope: Rope) -> None:
    found = rope_of(write_target(tmp_path / "x.gguf", GEOMETRIES["gqa6"], keys=keys))
    assert (found.dims, found.factor, found.low, found.high) == (rope.dims, rope.factor, rope.low, rope.high)
    assert (found.base, found.magnitude) == pytest.approx((rope.base, rope.magnitude), rel=1e-7)


REFUSED: list[tuple[dict[str, Any], str]] = [
    *[
        ({"rope.scaling.type": kind}, rf"rope\.scaling\.type: '{kind}'; supported are 'none', 'linear', 'yarn'")
        for kind in ("longrope", "dynamic", "su", "llama3", "YARN")
    ],
    ({"rope.scaling.type": 3}, r"rope\.scaling\.type' is needed as str"),
    ({"rope.scaling.type": "yarn"}, r"rope\.scaling\.factor' is needed as float and is missing"),
    *[
        (LINEAR | {"rope.scaling.factor": factor}, r"rope\.scaling\.factor: .*; it must lie in 1\.\.1e\+06")
        for factor in (0.0, 0.5, -4.0, math.nan, math.inf)
    ],
    ({"rope.scale_linear": -1.0}, r"rope\.scale_linear: -1; it must lie in"),
    (LINEAR | {"rope.scaling.factor": "four"}, r"rope\.scaling\.factor' is needed as float"),
    (YARN | {"rope.scaling.original_context_length": 0}, r"original_context_length is 0; it must lie in 1\.\."),
    (YARN | {"rope.scaling.yarn_beta_slow": 64.0}, r"yarn_beta_slow: 64; it must lie in 0\.001\.\.32"),
    (YARN | {"rope.scaling.yarn_beta_fast": math.nan}, r"yarn_beta_fast: nan; it must lie in"),
    (YARN | {"rope.scaling.yarn_attn_factor": 0.0}, r"yarn_attn_factor: 0; it must lie in"),
    (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor: 0\.5; only 1 is supported"),
    (YARN | {"rope.scaling.yarn_log_multiplier": 1.0}, r"yarn_log_multiplier: 1; only 0 is supported"),
    (YARN | {"rope.freq_base": 1.0}, r"freq_base: 1, with which all pairs turn alike"),
    ({"rope.scaling.alpha": 1000.0}, r"rope\.scaling\.alpha: 1000; only 0 is supported"),
    ({"rope.scaling.attn_factor": -1.0}, r"rope\.scaling\.attn_factor: -1; it must lie in"),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED, ids=str)
def test_another_scaling_is_refused_by_key_and_value(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(BadMetadata, match=words) as caught:
        load_model(write_target(tmp_path / "x.gguf", GEOMETRIES["equal"], keys=keys), "cpu", threads=1)
    assert "x.gguf: " in str(caught.value)
    target = write_target(tmp_path / "target.gguf", GEOMETRIES["equal"])
    with load_model(target, "cpu", threads=1) as model, pytest.raises(BadMetadata, match=words):
        load_draft(write_draft(tmp_path / "d.gguf", GEOMETRIES["equal"], keys=keys), model)


@pytest.mark.parametrize("dims", [0, 3, 66])
def test_dims_of_a_draft_that_do_not_fit_its_heads_are_refused(tmp_path: Path, dims: int) -> None:
    target = write_target(tmp_path / "target.gguf", GEOMETRIES["equal"])
    draft = write_draft(tmp_path / "d.gguf", GEOMETRIES["equal"], keys={"rope.dimension_count": dims})
    with load_model(target, "cpu", threads=1) as model, pytest.raises(BadMetadata, match="dimension_count"):
        load_draft(draft, model)


# --- the target -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scaling"), [*(("gqa6", scaling) for scaling in SCALINGS), *product(("equal", "odd"), ("linear", "yarn"))]
)
def test_logits_equal_the_oracle_and_not_those_without_scaling(tmp_path: Path, name: str, scaling: str) -> None:
    geometry, tokens = GEOMETRIES[name], tokens_for(GEOMETRIES[name].vocab)
    path = write_target(tmp_path / "x.gguf", geometry, seed=1, keys=SCALINGS[scaling])
    got = engine_rows(path, tokens)
    assert nmse(got, Reference(path).forward(tokens)) < FLOAT32_NMSE
    plain = write_target(tmp_path / "plain.gguf", geometry, seed=1)
    assert nmse(got, engine_rows(plain, tokens)) > 1e4 * FLOAT32_NMSE


def test_a_model_with_experts_is_scaled_too_and_has_biases(tmp_path: Path) -> None:
    path = write_target(
        tmp_path / "x.gguf", MOE_GEOMETRIES["moe"], seed=1, keys=YARN, biases=("attn_q", "attn_k", "attn_v")
    )
    tokens = tokens_for(MOE_GEOMETRIES["moe"].vocab)
    assert nmse(engine_rows(path, tokens), MoEReference(path).forward(tokens)) < FLOAT32_NMSE


@pytest.mark.parametrize("scaling", PLAIN)
def test_no_scaling_changes_no_bit(tmp_path: Path, scaling: str) -> None:
    geometry, tokens = GEOMETRIES["equal"], tokens_for(GEOMETRIES["equal"].vocab)
    rows = [
        engine_rows(write_target(tmp_path / "x.gguf", geometry, "q8_0", seed=1, keys=keys), tokens)
        for keys in ({}, PLAIN[scaling])
    ]
    assert np.array_equal(*rows)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_scaled_rows_are_bit_equal_at_every_width(tmp_path: Path, scaling: str) -> None:
    geometry = GEOMETRIES["gqa6"]
    path = write_target(tmp_path / "x.gguf", geometry, "q8_0", seed=1, keys=SCALINGS[scaling])
    tokens = tokens_for(geometry.vocab)
    one = engine_rows(path, tokens, 1)
    for width in (5, 16):
        assert np.array_equal(engine_rows(path, tokens, width), one), width


def test_a_snapshot_of_the_plain_model_is_refused_by_the_scaled_one(tmp_path: Path) -> None:
    """Even if it claims to be of the same file."""
    plain, scaled = (
        write_target(tmp_path / f"{name}.gguf", GEOMETRIES["equal"], keys=keys)
        for name, keys in (("plain", {}), ("scaled", YARN))
    )
    with load_model(plain, "cpu", threads=1) as model, Session(model, 64) as session:
        session.forward([1, 2, 3])
        session.commit(3)
        taken = session.snapshot()
    with load_model(scaled, "cpu", threads=1) as model, Session(model, 64) as session:
        forged = replace(taken, fingerprint=replace(taken.fingerprint, model=model.digest))
        with pytest.raises(SnapshotMismatch, match=r"rope of the snapshot is .*factor=1\.0.*factor=8\.0"):
            session.restore(forged)


# --- the draft --------------------------------------------------------------------------------------------------------

Pair = Callable[..., tuple[Path, Path]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    def write(target_keys: dict[str, Any], draft_keys: dict[str, Any], **options: Any) -> tuple[Path, Path]:
        target = write_target(tmp_path / "target.gguf", GEOMETRIES["equal"], seed=1, keys=target_keys)
        return target, write_draft(tmp_path / "draft.gguf", GEOMETRIES["equal"], seed=2, keys=draft_keys, **options)

    return write


def partial(dims: int) -> dict[str, Any]:
    return {"rope.dimension_count": dims, "rope.dimension_sections": [dims // 2, 0, 0, 0]}


@pytest.mark.parametrize("keys", [*SCALINGS.values(), partial(16), YARN | partial(32)], ids=str)
def test_a_draft_s_logits_equal_the_oracle(pair: Pair, keys: dict[str, Any]) -> None:
    """The injected context and the block alike."""
    target_path, draft_path = pair(LINEAR, keys, layers=3, window=24)
    tokens = tokens_for(GEOMETRIES["equal"].vocab, 60)
    target, oracle = Reference(target_path), DraftReference(draft_path, target_path)
    target.forward(tokens)
    wanted = oracle.propose_logits(oracle.features(target.hidden), 7, len(tokens), 16)
    with load_model(target_path, "cpu", threads=1) as model, load_draft(draft_path, model) as draft:
        session = Session(model, 128, "f32", "f32", capture=draft.taps)
        with session, DraftSession(draft, session) as drafting:
            session.forward(tokens, "none")
            session.commit(len(tokens))
            drafting.commit(len(tokens))
            drafting.propose([7])
            assert cosine(drafting.logits()[1:], wanted[1:]) >= COSINE


def test_speculation_on_a_scaled_pair_yields_the_text_without_it(pair: Pair) -> None:
    target_path, draft_path = pair(YARN, YARN, layers=2, window=24)
    prompt = tokens_for(GEOMETRIES["equal"].vocab, 21)
    with load_model(target_path, "cpu", threads=1) as model, load_draft(draft_path, model) as draft:
        greedy = Sampler(SamplingParams(), model.config.vocab)
        with Session(model, 256) as session:
            wanted, _ = collect(autoregressive(session, prompt, greedy, max_tokens=50))
        session = Session(model, 256, capture=draft.taps)
        with session, DraftSession(draft, session) as drafting:
            assert collect(speculative(session, drafting, prompt, greedy, max_tokens=50))[0] == wanted
