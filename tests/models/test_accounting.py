"""A file loads as its writer meant it, whoever that was; what it says and nobody reads is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pydflash.engine import Engine
from pydflash.errors import BadMetadata, ConfigError, LoadError, MissingTensor, UnsupportedModel
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.dialects import (
    MIXED_TYPES,
    PUBLISHED,
    ollama_keys,
    ollama_name,
    ollama_tensors,
    random_matrix,
    rewrite,
)
from tests.helpers import nmse
from tests.tiny import GEOMETRIES, write_draft

F32 = gguf.GGMLQuantizationType.F32
TargetOf = Callable[..., Path]
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "environment": {}}


def logits(path: Path, ignore: str | Sequence[str] = ()) -> npt.NDArray[np.float32]:
    """Of 20 tokens at once, then of 3."""
    with load_model(path, "cpu", threads=1, ignore=ignore) as model, Session(model, 64, "f32", "f32") as session:
        wide = session.forward(list(range(20, 40)), "all").logits.copy()
        session.commit(20)
        return np.concatenate([wide, session.forward([7, 8, 9], "all").logits])


def tensor(*shape: int, value: float = 1) -> tuple[npt.NDArray[np.float32], gguf.GGMLQuantizationType]:
    return np.full(shape, value, np.float32), F32


@pytest.fixture(scope="module")
def source(target_of: TargetOf) -> Path:
    return target_of("equal")


@pytest.fixture(scope="module")
def expected(source: Path) -> npt.NDArray[np.float32]:
    return logits(source)


# --- files that must load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_metadata_changes_nothing(
    tmp_path: Path, source: Path, expected: npt.NDArray[np.float32], name: str
) -> None:
    np.testing.assert_array_equal(logits(rewrite(source, tmp_path / "x.gguf", keys=PUBLISHED[name])), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": ollama_keys()}, {"rename": ollama_name}, {"tensors": ollama_tensors()},
        {"keys": {**ollama_keys(), "qwen35.full_attention_interval": None}},
        {"keys": ollama_keys(), "rename": ollama_name, "tensors": ollama_tensors()},
    ],
    ids=["keys", "names", "sidecars", "no interval", "all"],
)  # fmt: skip
def test_ollamas_dialect_is_the_same_model(
    tmp_path: Path, source: Path, expected: npt.NDArray[np.float32], change: dict[str, Any]
) -> None:
    np.testing.assert_array_equal(logits(rewrite(source, tmp_path / "x.gguf", **change)), expected)


def test_a_split_file_is_accounted_for_as_a_whole(
    tmp_path: Path, source: Path, expected: npt.NDArray[np.float32]
) -> None:
    np.testing.assert_array_equal(logits(rewrite(source, tmp_path / "x.gguf", parts_of=20)), expected)
    bias = {"blk.0.ffn_down.bias": tensor(128)}
    with pytest.raises(UnsupportedModel, match=r"'blk\.0\.ffn_down\.bias'"):
        load_model(rewrite(source, tmp_path / "y.gguf", tensors=bias, parts_of=20), "cpu")


def test_a_mix_of_types_computes_with_its_values(tmp_path: Path, target_of: TargetOf) -> None:
    """Every matrix in another type, as in IQ and UD files."""
    base, packed, plain = target_of("ratio3"), {}, {}
    for i, found in enumerate(gguf.GGUFReader(base).tensors):
        if len(found.shape) == 2 and "conv1d" not in found.name:
            columns, rows = map(int, found.shape)
            packed[found.name] = data, kind = random_matrix((rows, columns), MIXED_TYPES[i % len(MIXED_TYPES)], seed=i)
            plain[found.name] = gguf.dequantize(data, kind).astype(np.float32), F32
    assert {kind.name for _, kind in packed.values()} == set(MIXED_TYPES)
    got = logits(rewrite(base, tmp_path / "mix.gguf", tensors=packed))
    # The products round activations to 8 bits.
    assert nmse(got, logits(rewrite(base, tmp_path / "plain.gguf", tensors=plain))) < 1e-2


def test_blocks_of_multi_token_prediction_are_left_out_with_and_without_their_key(
    tmp_path: Path, target_of: TargetOf
) -> None:
    found = target_of("mtp")
    without = rewrite(found, tmp_path / "silent.gguf", keys={"qwen35.nextn_predict_layers": None})
    np.testing.assert_array_equal(logits(without), logits(found))


def test_a_promised_block_that_was_never_written_changes_nothing(
    tmp_path: Path, source: Path, expected: npt.NDArray[np.float32]
) -> None:
    keys = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    np.testing.assert_array_equal(logits(rewrite(source, tmp_path / "x.gguf", keys=keys)), expected)


def test_frequency_factors_of_one_change_nothing(
    tmp_path: Path, source: Path, expected: npt.NDArray[np.float32]
) -> None:
    path = rewrite(source, tmp_path / "x.gguf", tensors={"rope_freqs.weight": tensor(8)})
    np.testing.assert_array_equal(logits(path), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "meaning"),
    [
        ("blk.0.ffn_down.bias", (128,), ", a bias,"), ("output.bias", (320,), ", a bias,"),
        ("blk.3.attn_sinks.weight", (4,), ", attention sinks,"), ("blk.2.ffn_gate.scale", (1,), ", the factor"),
        ("blk.0.attn_q.weight", (512, 128), ""), ("blk.1.new_gate.weight", (4, 128), ""), ("norm.weight", (128,), ""),
        ("cls.output.weight", (2, 128), ""), ("blk.4.attn_norm.weight", (128,), ""), ("vx.weight", (4,), ""),
    ],
)  # fmt: skip
def test_a_tensor_that_nobody_reads_is_refused_by_name(
    tmp_path: Path, source: Path, name: str, shape: tuple[int, ...], meaning: str
) -> None:
    path = rewrite(source, tmp_path / "x.gguf", tensors={name: tensor(*shape)})
    with pytest.raises(UnsupportedModel) as caught:
        load_model(path, "cpu")
    assert str(caught.value).startswith(f"{path}: tensor {name!r}{meaning}")
    assert "is not used by qwen35; " in str(caught.value)
    assert "ignore=(" in str(caught.value)
    assert logits(path, ignore=name).shape == (23, 320)


def test_frequency_factors_are_refused(tmp_path: Path, source: Path) -> None:
    path = rewrite(source, tmp_path / "x.gguf", tensors={"rope_freqs.weight": tensor(8, value=2)})
    with pytest.raises(UnsupportedModel, match="frequency factors that are not all 1, is not used"):
        load_model(path, "cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen35.attention.scale", 0.5), ("qwen35.attention.causal", False), ("qwen35.attention.sliding_window", 512),
        ("qwen35.final_logit_softcapping", 30.0), ("qwen35.logit_scale", 0.25), ("qwen35.embedding_scale", 12.0),
        ("qwen35.expert_count", 8), ("qwen35.hidden_activation", "gelu"), ("qwen35.residual_scale", [1.0, 1.0]),
        ("qwen35.tomorrow", True), ("qwen35.ssm.tomorrow", "x"),
        ("adapter.type", "lora"), ("general.type", "adapter"),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_nobody_reads_is_refused_by_name(tmp_path: Path, source: Path, key: str, value: Any) -> None:
    path = rewrite(source, tmp_path / "x.gguf", keys={key: value})
    with pytest.raises(UnsupportedModel) as caught:
        load_model(path, "cpu")
    assert str(caught.value).startswith(f"{path}: metadata key {key!r} (")


def test_a_file_with_more_layers_than_it_counts_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'blk\.3\..*nor are \d+ others"):
        load_model(rewrite(source, tmp_path / "x.gguf", keys={"qwen35.block_count": 3}), "cpu")


# --- ignore -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def biased(tmp_path: Path, source: Path) -> Path:
    """Two tensors and a key that nobody reads."""
    biases = {f"blk.{i}.ffn_down.bias": tensor(128) for i in range(2)}
    return rewrite(source, tmp_path / "biased.gguf", tensors=biases, keys={"qwen35.logit_scale": 2.0})


def test_what_is_ignored_is_left_unused_and_told(biased: Path, expected: npt.NDArray[np.float32]) -> None:
    patterns = ("blk.*.ffn_down.bias", "qwen35.logit_*")
    np.testing.assert_array_equal(logits(biased, patterns), expected)
    with Engine.load(biased, ignore=patterns, **OPTIONS) as engine:
        names = ("blk.0.ffn_down.bias", "blk.1.ffn_down.bias", "qwen35.logit_scale")
        assert engine.model.ignored == names
        told = {setting.name: setting for setting in engine.settings()}
    assert told["ignored in the model"][1:] == (", ".join(names), "ignore")
    assert told["ignore"][1:] == (patterns, "argument")


@pytest.mark.parametrize("ignore", ["blk.0.*", ("blk.*.bias",), ["qwen35.logit_scale"]])
def test_what_is_not_ignored_is_still_refused(biased: Path, ignore: Any) -> None:
    with pytest.raises(UnsupportedModel):
        load_model(biased, "cpu", ignore=ignore)


@pytest.mark.parametrize(
    ("ignore", "found"),
    [
        (("blk.*.bias", "nothing.*"), "'nothing.*', which matches nothing in .*biased.gguf"),
        ("BLK.0.*", "'BLK.0.*', which matches nothing"), ("", "ignore is ''"), ((3,), r"ignore is \(3,\)"),
        (5, "ignore is 5"), (["blk.*", ""], "ignore is "),
    ],
)  # fmt: skip
def test_a_pattern_that_cannot_be_meant_is_refused(biased: Path, ignore: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        load_model(biased, "cpu", ignore=ignore)


def test_an_engine_gives_each_file_the_patterns_that_match_it(tmp_path: Path, biased: Path) -> None:
    draft = write_draft(tmp_path / "plain.gguf", GEOMETRIES["equal"])
    draft = rewrite(draft, tmp_path / "draft.gguf", tensors={"blk.1.attn_sinks.weight": tensor(4)})
    both = ("*.ffn_down.bias", "*.logit_scale", "*.attn_sinks.weight")
    with Engine.load(biased, draft, ignore=both, **OPTIONS) as engine:
        told = {setting.name: setting.value for setting in engine.settings()}
    assert told["ignored in the draft"] == "blk.1.attn_sinks.weight"
    with pytest.raises(ConfigError, match=r"'x.weight', .* nothing in .*biased\.gguf and .*draft\.gguf"):
        Engine.load(biased, draft, ignore=(*both, "x.weight"), **OPTIONS)
    with pytest.raises(ConfigError, match=r"'x.weight', .* nothing in .*biased\.gguf;"):
        Engine.load(biased, "ngram", ignore=("x.weight",), **OPTIONS)


# --- facts that stand in two places -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"qwen35.vocab_size": 321}, "vocab_size: 321; token_embd.weight has 320 rows"),
        ({"qwen35.nextn_predict_layers": 1}, "is 1 of 4 blocks, but block 3 has no nextn tensors"),
        ({"qwen35.attention.head_count_kv": [0, 0, 2, 2]}, "the zeros of .*head_count_kv differ"),
        ({"qwen35.attention.head_count_kv": [0, 0, 0]}, "the zeros of .*head_count_kv differ"),
        ({"qwen35.attention.head_count_kv": [2, 2, 2]}, "lists 3 of 4 layers"),
        ({"qwen35.attention.head_count": [4, 4, 4, 3]}, "heads over"),
        ({"qwen35.feed_forward_length": [256, 256, 256, 128]}, r"lists \[128, 256\]; one value"),
        ({"qwen35.embedding_length": [1.0] * 4}, "must list integers"),
        ({"qwen35.feed_forward_length": [256] * 10_000}, "lists 10,000 values; at most"),
        ({"qwen35.attention.recurrent_layers": ["a", "b", "c", "d"]}, "must list integers"),
        ({"qwen35.rope.dimension_sections": ["3", "3", "2"]}, "must list integers"),
        ({"qwen35.rope.dimension_sections": [4, 2, 2, 0]}, "does not turn 8 pairs"),
        ({"qwen35.rope.dimension_sections": [3, 3, 1, 1]}, "does not turn 8 pairs"),
        ({"qwen35.rope.dimension_sections": [-3, 3, 2, 0]}, "does not turn 8 pairs"),
        ({"qwen35.rope.dimension_sections": [0, 0, 0, 0]}, "does not turn 8 pairs"),
        ({"qwen35.rope.dimension_sections": [4, 4]}, "does not turn 8 pairs"),
        ({"qwen35.rope.dimension_sections": [2, 2, 2, 1, 1]}, "lists 5 values; at most 4"),
        ({"qwen35.context_length": (-1, gguf.GGUFValueType.INT32)}, "context_length is -1"),
    ],
    ids=str,
)  # fmt: skip
def test_a_contradiction_is_refused_with_both_sides(
    tmp_path: Path, source: Path, keys: dict[str, Any], found: str
) -> None:
    with pytest.raises(BadMetadata, match=rf"x\.gguf: .*{found}"):
        load_model(rewrite(source, tmp_path / "x.gguf", keys=keys), "cpu")


def test_value_heads_in_another_order_are_refused_where_it_matters(
    tmp_path: Path, source: Path, target_of: TargetOf, expected: npt.NDArray[np.float32]
) -> None:
    keys = {"qwen35.ssm.v_head_reordered": False}
    np.testing.assert_array_equal(logits(rewrite(source, tmp_path / "same.gguf", keys=keys)), expected)
    with pytest.raises(BadMetadata, match="v_head_reordered: false: value heads in the order of the original"):
        load_model(rewrite(target_of("ratio3"), tmp_path / "x.gguf", keys=keys), "cpu")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tokens: [*tokens[:9], tokens[8], *tokens[10:]], "tokens holds '.*' twice, as ids 8 and 9"),
        (lambda tokens: [*tokens, "[PAD320]"], "token_type has 320 entries for 321 tokens"),
    ],
)
def test_a_fault_of_the_tokenizer_is_found_before_weights_are_read(
    tmp_path: Path, source: Path, change: Callable[[list[str]], list[str]], found: str
) -> None:
    tokens = gguf.GGUFReader(source).fields["tokenizer.ggml.tokens"].contents()
    path = rewrite(source, tmp_path / "x.gguf", keys={"tokenizer.ggml.tokens": change(tokens)})
    with pytest.raises(BadMetadata, match=rf"x\.gguf: tokenizer\.ggml\.{found}"):
        load_model(path, "cpu", progress=lambda done, total: pytest.fail("weights were read"))


@pytest.mark.parametrize("more", [-1, 1])
def test_a_token_without_a_row_and_a_row_without_a_token_are_refused(tmp_path: Path, source: Path, more: int) -> None:
    fields = gguf.GGUFReader(source).fields
    lists = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")}
    longer = {"tokens": [*lists["tokens"], "[PAD320]"], "token_type": [*lists["token_type"], 5]}
    keys = {f"tokenizer.ggml.{name}": longer[name][: 320 + more] for name in lists}
    with pytest.raises(BadMetadata, match=f"holds {320 + more} tokens and token_embd.weight 320 rows"):
        load_model(rewrite(source, tmp_path / "x.gguf", keys=keys), "cpu")


def test_other_names_of_a_tensor_do_not_hide_that_it_is_missing(tmp_path: Path, source: Path) -> None:
    path = rewrite(source, tmp_path / "x.gguf", rename=lambda name: name.replace("ssm_dt.bias", "ssm_delta"))
    with pytest.raises(MissingTensor, match=r"'blk\.0\.ssm_dt\.bias'"):
        load_model(path, "cpu")
    assert issubclass(UnsupportedModel, LoadError)
