"""A `qwen35moe` model computes what the numpy oracle computes, in steps of any width, and a bad file is named.

The rules, and the reasons for the tolerances, are those of test_hybrid.py and runtime/test_runner.py. What is new is a
choice: the router's logits decide which experts run for a row. Where the rounding of activations moves two of them past
each other, the oracle that does not round runs another expert, and is as far off as if its weights were others. So its
distance has no bound to state; it is the measure of what rounding is worth, and the oracle that rounds as the engine
does has to be many times closer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.errors import BadMetadata, LoadError, MissingTensor
from pydflash.models import Model, load_model
from pydflash.runtime import Session
from tests import tiny
from tests.helpers import Array, RoundedMoEReference, captured, cosine, engine_rows, nmse, run_chunks
from tests.reference.qwen35moe import MoEReference
from tests.tiny import MOE_GEOMETRIES, WEIGHT_TYPES, write_target
from tools.synth.layout import Slot

Target = Callable[[str, str], Path]

# Rows of moe_fused do not divide into blocks of K-quants.
QUANTISED = [("moe", types) for types in WEIGHT_TYPES[2:]] + [("moe_fused", t) for t in ("bf16", "q8_0", "q4_0")]
EVERY = [(name, types) for name in MOE_GEOMETRIES for types in ("f32", "f16")] + QUANTISED
COSINE, FLOAT32_NMSE = 0.99999, 1e-11  # test_hybrid.py
CLOSER = 16  # 60 times and more was seen; without other experts, test_hybrid.py asks for 4
SENSITIVE = ("moe_fused",)  # rows of 128 and states of 32, as there
COUNT = 40


def tokens_for(name: str, count: int = COUNT) -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(0, MOE_GEOMETRIES[name].vocab, count).tolist()
    return tokens


def rows_of(model: Model, tokens: list[int], width: int, cache: str = "f32", **options: Any) -> Array:
    with Session(model, 256, cache, cache, **options) as session:
        return run_chunks(session, tokens, width)


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 16, COUNT])
@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_f32_logits_equal_the_oracle(target_of: Target, name: str, width: int) -> None:
    path, tokens = target_of(name, "f32"), tokens_for(name)
    got, wanted = engine_rows(path, tokens, width), MoEReference(path).forward(tokens)
    assert nmse(got, wanted) < FLOAT32_NMSE
    assert np.array_equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_captured_layers_are_the_oracle_s_residual_stream(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f32"), tokens_for(name)
    oracle = MoEReference(path)
    oracle.forward(tokens)
    for count in (13, COUNT):  # a step that is exact and one that is wide
        got = captured(path, tokens[:count])
        for layer in range(oracle.layers):
            assert nmse(got[:, layer], oracle.hidden[layer][:count]) < FLOAT32_NMSE, (count, layer)


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_f16_logits_equal_the_oracle_that_rounds_activations_to_f16(target_of: Target, name: str) -> None:
    path, tokens = target_of(name, "f16"), tokens_for(name, 24)
    got, rounding = engine_rows(path, tokens), RoundedMoEReference(path).forward(tokens)
    assert nmse(got, rounding) < nmse(got, MoEReference(path).forward(tokens))
    if name not in SENSITIVE:
        assert cosine(got, rounding) >= COSINE


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_quantised_logits_equal_the_oracle_that_rounds_activations(target_of: Target, name: str, types: str) -> None:
    path, tokens = target_of(name, types), tokens_for(name, 24)
    got, plain = engine_rows(path, tokens), MoEReference(path).forward(tokens)
    assert nmse(got, RoundedMoEReference(path).forward(tokens)) < nmse(got, plain) / CLOSER


@pytest.mark.parametrize(("name", "types"), QUANTISED)
def test_rows_that_no_rounding_flips_agree_to_float32(target_of: Target, name: str, types: str) -> None:
    path, tokens = target_of(name, types), tokens_for(name, 16)
    rounding = RoundedMoEReference(path)
    rounding.forward(tokens)
    errors = [nmse(row, wanted) for row, wanted in zip(captured(path, tokens)[:, 0], rounding.hidden[0])]
    assert np.median(errors) < 1e-10


# --- the width --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "types"), EVERY)
def test_rows_are_bit_equal_at_every_width_up_to_16(target_of: Target, device: str, name: str, types: str) -> None:
    tokens = tokens_for(name, 33)
    with load_model(target_of(name, types), device, threads=1) as model:
        single = rows_of(model, tokens, 1, "q8_0")
        for width in range(2, 17):
            assert np.array_equal(rows_of(model, tokens, width, "q8_0"), single), width


@pytest.mark.parametrize("types", ["f32", "q8_0", "q4_k_m"])
def test_threads_do_not_change_a_bit(target_of: Target, types: str) -> None:
    tokens, results = tokens_for("moe"), []
    for threads in (1, 2):
        with load_model(target_of("moe", types), "cpu", threads=threads) as model:
            results.append([rows_of(model, tokens, width) for width in (1, 5, COUNT)])
    assert all(np.array_equal(*each) for each in zip(*results))


@pytest.mark.parametrize(("name", "types"), EVERY)
def test_prefill_agrees_with_single_steps_within_rounding(target_of: Target, name: str, types: str) -> None:
    """As of runtime/test_runner.py: no further than single steps are from the oracle that rounds nothing."""
    path, tokens = target_of(name, types), tokens_for(name, 100)
    with load_model(path, "cpu", threads=1) as model:
        single = rows_of(model, tokens, 1)
        explained = max(1e-10, nmse(single, MoEReference(path).forward(tokens)))
        for chunk in (32, 64, 512):
            wide = rows_of(model, tokens, len(tokens), chunk=chunk)
            assert nmse(wide, single) < explained


# --- the ways in which files differ -----------------------------------------------------------------------------------

Change = Callable[[Slot], Slot | None]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file with other metadata (None removes a key), other tensors (None drops one) or other types by tensor name."""
    metadata, tensors, type_of = tiny.target_metadata, tiny.target_tensors, tiny.type_of

    def write(
        name: str = "moe",
        keys: dict[str, Any] | None = None,
        change: Change = lambda slot: slot,
        types: dict[str, str] | None = None,
        **experts: Any,
    ) -> Path:
        changed = {f"qwen35moe.{key}": value for key, value in (keys or {}).items()}
        with monkeypatch.context() as patch:
            patch.setattr(
                tiny, "target_metadata", lambda *a: {k: v for k, v in (metadata(*a) | changed).items() if v is not None}
            )
            patch.setattr(tiny, "target_tensors", lambda g: [s for s in map(change, tensors(g)) if s is not None])
            patch.setattr(tiny, "type_of", lambda slot, *rest: (types or {}).get(slot.name) or type_of(slot, *rest))
            geometry = MOE_GEOMETRIES[name]
            geometry = replace(geometry, experts=replace(geometry.experts, **experts))
            return write_target(tmp_path / "other.gguf", geometry, seed=1)

    return write


def assert_the_oracle_s(path: Path, bound: float = FLOAT32_NMSE) -> None:
    tokens = tokens_for("moe_fused", 20)  # the smaller vocabulary
    wanted = MoEReference(path).forward(tokens)
    for width in (4, 20):
        assert nmse(engine_rows(path, tokens, width), wanted) < bound


@pytest.mark.parametrize(("count", "used"), [(1, 1), (3, 3), (5, 1)])
def test_any_number_of_experts_may_run(written: Callable[..., Path], count: int, used: int) -> None:
    assert_the_oracle_s(written(count=count, used=used))


def test_a_layer_may_be_fused_beside_one_that_is_split(written: Callable[..., Path]) -> None:
    def fuse(slot: Slot) -> Slot | None:
        if slot.name == "blk.1.ffn_gate_exps.weight":
            count, inner, hidden = slot.shape
            return Slot("blk.1.ffn_gate_up_exps.weight", (count, 2 * inner, hidden), slot.kind)
        return None if slot.name == "blk.1.ffn_up_exps.weight" else slot

    path = written(change=fuse)
    with load_model(path, "cpu", threads=1) as model:
        assert model.config.fused == (False, True, False, False)
    assert_the_oracle_s(path)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_shared_gate_may_have_either_rank_and_another_in_the_next_layer(
    written: Callable[..., Path], rank: int
) -> None:
    def turn(slot: Slot) -> Slot:
        other = slot.name == "blk.2.ffn_gate_inp_shexp.weight"
        return slot._replace(shape=(1, *slot.shape)[-3 + rank :]) if other else slot

    shapes = written(gate_rank=rank, change=turn)
    with load_model(shapes, "cpu", threads=1) as model:
        found = [model.file.tensors[f"blk.{i}.ffn_gate_inp_shexp.weight"].shape for i in (1, 2)]
    assert sorted(found, key=len) == [(256,), (1, 256)]
    assert_the_oracle_s(shapes)


@pytest.mark.parametrize("name", ["ffn_gate_inp", "ffn_gate_inp_shexp"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_router_of_another_type_is_run(written: Callable[..., Path], name: str, rank: int) -> None:
    """Files have F32. f16 rounds an activation to 11 bits, 1e-7 of its square."""
    assert_the_oracle_s(written(types={f"blk.{i}.{name}.weight": "f16" for i in range(4)}, gate_rank=rank), 1e-5)


def test_without_lengths_of_their_own_experts_share_that_of_a_dense_feed_forward(
    written: Callable[..., Path],
) -> None:
    keys = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None, "feed_forward_length": 512}
    assert_the_oracle_s(written(keys=keys, shared_ffn=512))  # 2 experts of 256


@pytest.mark.parametrize("scale", [0.0, 1.0, 1, 0])
def test_weights_that_are_not_scaled_are_run(written: Callable[..., Path], scale: float) -> None:
    assert_the_oracle_s(written(keys={"expert_weights_scale": scale, "expert_group_count": 1}))


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("expert_count", 0, "is 0; it must lie in 1"), ("expert_count", None, "is missing"),
        ("expert_count", "8", "is needed as int and is string"), ("expert_count", 2**31, "is 2147483648"),
        ("expert_count", [8, 8, 8, 4], r"lists \[4, 8\]; one value for all layers"),
        ("expert_used_count", 0, "is 0; it must lie in 1"), ("expert_used_count", -1, "is -1; it must lie in 1"),
        ("expert_used_count", 9, "9 of 8 experts"), ("expert_used_count", None, "is missing"),
        ("expert_used_count", [2, 2, 2, 3], r"lists \[2, 3\]; one value for all layers"),
        ("expert_weights_scale", 2.5, "2.5; only 1"), ("expert_weights_scale", -1.0, "-1; only 1"),
        ("expert_weights_scale", float("nan"), "nan; only 1"), ("expert_weights_scale", "1", "is needed as float"),
        ("expert_group_count", 4, "4; a choice of groups"), ("expert_group_count", -1, "is -1"),
        ("expert_feed_forward_length", 0, "is 0; it must lie in 1"), ("expert_feed_forward_length", None, "is missing"),
        ("expert_feed_forward_length", 2**31, "is 2147483648"),
        ("expert_shared_feed_forward_length", 0, "is 0; it must lie in 1"),
        ("expert_shared_feed_forward_length", None, "is missing"),
    ],
    ids=str,
)  # fmt: skip
def test_absurd_metadata_is_refused_by_name(written: Callable[..., Path], key: str, value: Any, found: str) -> None:
    with pytest.raises(BadMetadata, match=rf"other\.gguf.*qwen35moe\.{key}\b.*{found}"):
        load_model(written(keys={key: value}), "cpu")


@pytest.mark.parametrize("name", MOE_GEOMETRIES)
def test_every_tensor_is_missed_by_name(written: Callable[..., Path], target_of: Target, name: str) -> None:
    with load_model(target_of(name, "f32"), "cpu", threads=1) as model:
        names = [n for n in model.config.tensors() if n.startswith(("blk.0.ffn", "blk.3.ffn"))]
    assert len(names) == 2 * (7 if name == "moe_fused" else 8)
    for gone in names:
        path = written(name, change=lambda slot, gone=gone: None if slot.name == gone else slot)
        # What may be fused is missed under the names of the two.
        with pytest.raises(MissingTensor, match=f"'{gone.replace('gate_up', 'gate')}' .* is missing"):
            load_model(path, "cpu")


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("moe", "ffn_gate_inp", (9, 256)), ("moe", "ffn_gate_inp", (8, 128)), ("moe", "ffn_gate_exps", (8, 512, 256)),
        ("moe", "ffn_gate_exps", (7, 256, 256)), ("moe", "ffn_up_exps", (8, 256, 128)),
        ("moe", "ffn_up_exps", (256, 256)), ("moe", "ffn_down_exps", (8, 128, 256)),
        ("moe", "ffn_down_exps", (1, 8, 256, 128)), ("moe", "ffn_down_exps", (1, 256, 256)),
        ("moe", "ffn_gate_shexp", (128, 256)), ("moe", "ffn_gate_inp_shexp", (2, 256)),
        ("moe", "ffn_gate_inp_shexp", (256, 1)), ("moe", "ffn_gate_inp_shexp", (128,)),
        ("moe_fused", "ffn_gate_up_exps", (16, 64, 128)), ("moe_fused", "ffn_gate_up_exps", (8, 128, 128)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [0, 3])
def test_a_wrong_shape_names_both(
    written: Callable[..., Path], name: str, tensor: str, shape: tuple[int, ...], layer: int
) -> None:
    full = f"blk.{layer}.{tensor}.weight"
    path = written(name, change=lambda slot: slot._replace(shape=shape) if slot.name == full else slot)
    with pytest.raises(LoadError) as caught:
        load_model(path, "cpu")
    assert f"'{full}' has shape {shape}; its metadata asks for (" in str(caught.value)
