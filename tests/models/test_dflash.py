"""A draft's file that cannot be used is refused with an error that names the file and what is wrong in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pydflash.drafts import load_draft
from pydflash.errors import (
    BadMetadata,
    ConfigError,
    DraftMismatch,
    LoadError,
    MissingTensor,
    UnsupportedArchitecture,
    UnsupportedModel,
)
from pydflash.models import Model
from tests import tiny
from tests.dialects import rewrite

BASE = tiny.GEOMETRIES["equal"]


def damaged_draft(path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], **options: Any) -> Path:
    metadata = tiny.draft_metadata
    monkeypatch.setattr(
        tiny,
        "draft_metadata",
        lambda *args: {k: v for k, v in (metadata(*args) | keys).items() if v is not None},
    )
    return tiny.write_draft(path, BASE, **options)


@pytest.fixture(scope="module")
def target(model_of: Callable[..., Model]) -> Model:
    return model_of("equal")


def test_a_draft_of_another_model_is_refused_with_both_values(tmp_path: Path, target: Model) -> None:
    other = tiny.GEOMETRIES["ratio3"]  # hidden 256 and 384 tokens instead of 128 and 320
    with pytest.raises(DraftMismatch, match="hidden size is 256, the target's 128"):
        load_draft(tiny.write_draft(tmp_path / "wide.gguf", other), target)
    smaller = tiny.write_draft(tmp_path / "small.gguf", tiny.Geometry(128, 4, 4, 4, 2, 64, 16, 4, 4, 32, 4, 256, 300))
    with pytest.raises(DraftMismatch, match="vocabulary holds 300 tokens, the target's 320"):
        load_draft(smaller, target)


@pytest.mark.parametrize("taps", [(0, 1, 4), (0, 99)])
@pytest.mark.parametrize("layout", ["llama.cpp", "fork"])
def test_taps_out_of_range_name_both(tmp_path: Path, target: Model, taps: tuple[int, ...], layout: str) -> None:
    path = tiny.write_draft(tmp_path / "d.gguf", BASE, taps=taps, layout=layout)
    with pytest.raises(DraftMismatch, match=rf"taps layers .*{taps[-1]}\], the target has layers 0\.\.3"):
        load_draft(path, target)


def test_a_tap_before_the_first_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Model
) -> None:
    path = damaged_draft(tmp_path / "d.gguf", monkeypatch, {"dflash.target_layers": [0, 1, 2]})
    with pytest.raises(DraftMismatch, match=r"taps layers \[-1, 0, 1\]"):
        load_draft(path, target)


def test_a_mask_token_outside_the_vocabulary_names_both(tmp_path: Path, target: Model) -> None:
    path = tiny.write_draft(tmp_path / "d.gguf", BASE, mask_token_id=320)
    with pytest.raises(DraftMismatch, match="mask token is 320, the target's vocabulary holds 320"):
        load_draft(path, target)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("block_size", 10**9, "block_size is 1000000000"), ("block_size", 0, "block_size"),
        ("block_size", 1, "block_size is 1; 2 to 16"), ("block_size", 17, "block_size is 17; 2 to 16"),
        ("block_size", None, "block_size"),
        ("target_layers", None, "target_layers"), ("attention.head_count", 0, "head_count"),
        ("attention.head_count", 3, "3 heads over 2"), ("attention.key_length", 96, "heads of 96"),
        ("block_count", 0, "block_count"), ("block_count", 2**20, "block_count"),
        ("rope.freq_base", float("nan"), "freq_base"),
        ("attention.layer_norm_rms_epsilon", -1.0, "epsilon"),
        ("attention.sliding_window_pattern", [True], "sliding_window"),
    ],
    ids=str,
)  # fmt: skip
def test_absurd_metadata_of_a_draft_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Model, key: str, value: Any, words: str
) -> None:
    path = damaged_draft(tmp_path / "d.gguf", monkeypatch, {f"dflash.{key}": value})
    with pytest.raises(BadMetadata, match=words):
        load_draft(path, target)


def test_a_target_is_no_draft(tmp_path: Path, target: Model) -> None:
    with pytest.raises(UnsupportedArchitecture, match="'qwen35' is not that of a draft"):
        load_draft(tiny.write_target(tmp_path / "t.gguf", BASE), target)


@pytest.mark.parametrize("layout", ["llama.cpp", "fork"])
def test_a_truncated_draft_is_refused(tmp_path: Path, target: Model, layout: str) -> None:
    whole = tiny.write_draft(tmp_path / "whole.gguf", BASE, layout=layout).read_bytes()
    cut = tmp_path / "cut.gguf"
    for i in range(20):
        cut.write_bytes(whole[: len(whole) * i // 20])
        with pytest.raises(LoadError, match=r"cut\.gguf"):
            load_draft(cut, target)


@pytest.mark.parametrize("name", ["fc.weight", "enc.output_norm.weight", "output_norm.weight", "blk.1.attn_v.weight"])
def test_a_draft_without_a_tensor_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Model, name: str
) -> None:
    tensors = tiny.draft_tensors
    monkeypatch.setattr(tiny, "draft_tensors", lambda d, layout: (s for s in tensors(d, layout) if s.name != name))
    with pytest.raises(MissingTensor, match=name):
        load_draft(tiny.write_draft(tmp_path / "d.gguf", BASE), target)


# --- what a draft's file says besides ---------------------------------------------------------------------------------

F32 = gguf.GGMLQuantizationType.F32


@pytest.fixture(scope="module", params=["llama.cpp", "fork"])
def draft_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts") / "draft.gguf"
    return tiny.write_draft(path, BASE, window=64, layout=request.param)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("blk.0.attn_gate.weight", ""), ("blk.0.attn_sinks.weight", "attention sinks"), ("blk.1.attn_q.bias", "a bias"),
        ("blk.0.attn_conv_base", "a convolution of DFlash2"), ("blk.1.ffn_conv_proj.weight", "a convolution"),
        ("selector_predecessor.weight", "the candidate selector of DFlash2"), ("d2t", "a reduced draft vocabulary"),
        ("markov_w1.weight", "the Markov head of DSpark"), ("conf_proj.weight", "the confidence head of DSpark"),
        ("token_embd.weight", "an embedding of the draft's own"), ("output.weight", "a head of the draft's own"),
        ("fc.scale", "the factor of a quantised matrix"), ("blk.2.attn_norm.weight", ""),
        ("blk.0.layer_output_scale.weight", ""), ("dflash.aux_hidden_norm.0", ""),
    ],
)  # fmt: skip
def test_a_tensor_that_no_draft_of_this_kind_has_is_refused_by_name(
    tmp_path: Path, draft_file: Path, target: Model, name: str, meaning: str
) -> None:
    path = rewrite(draft_file, tmp_path / "d.gguf", tensors={name: (np.ones((4, 128), np.float32), F32)})
    with pytest.raises(UnsupportedModel, match=rf"d\.gguf: tensor '{name}'.*{meaning}.* is not used by "):
        load_draft(path, target)
    load_draft(path, target, ignore=name).close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5), ("attention.value_scale", 2.0), ("hidden_activation", "gelu"), ("logit_scale", 0.2),
        ("final_logit_softcapping", 20.0), ("embedding_scale", 12.0), ("sample_from_anchor", True),
        ("has_confidence_head", True), ("conv_kernel_size", 2), ("selector_rank", 64), ("decoder_arch", "laguna"),
        ("dflash.dspark.enabled", 1), ("dflash.context_kv_layer_norm", True), ("hyper_connection.count", 4),
        ("dflash.capture_layer_ids", [1, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_no_draft_of_this_kind_has_is_refused_by_name(
    tmp_path: Path, draft_file: Path, target: Model, key: str, value: Any
) -> None:
    path = rewrite(draft_file, tmp_path / "d.gguf", keys={f"{architecture(draft_file)}.{key}": value})
    with pytest.raises(UnsupportedModel, match=rf"d\.gguf: metadata key '.*\.{key}' \("):
        load_draft(path, target)


def test_what_changes_nothing_in_a_draft_is_harmless(tmp_path: Path, draft_file: Path, target: Model) -> None:
    keys = {
        "vocab_size": 320, "dflash.n_target_features": 384, "dflash.n_target_layers": 3, "hidden_activation": "silu",
        "logit_scale": 1.0, "sample_from_anchor": False, "final_logit_softcapping": 0.0, "rope.dimension_count": 64,
        "rope.dimension_sections": [32, 0, 0, 0], "attention.causal": False, "dflash.dspark.enabled": 0,
    }  # fmt: skip
    written = {f"{architecture(draft_file)}.{key}": value for key, value in keys.items()} | {"general.file_type": 7}
    for causal in (None, True):
        load_draft(rewrite(draft_file, tmp_path / "d.gguf", keys=written), target, causal=causal).close()


@pytest.mark.parametrize(
    ("keys", "error", "found"),
    [
        ({"vocab_size": 321}, DraftMismatch, "for a vocabulary of 321 tokens, the target has 320"),
        ({"attention.value_length": 128}, BadMetadata, "value_length is 128, key_length 64"),
        ({"rope.dimension_sections": [16, 0, 0, 16]}, BadMetadata, "does not turn 32 pairs"),
        ({"attention.sliding_window_pattern": ["a", "b"]}, BadMetadata, "must list integers"),
        ({"attention.sliding_window_pattern": [True] * 1000}, BadMetadata, "lists 1,000 values"),
        ({"feed_forward_length": [256, 128]}, BadMetadata, "one value for all layers"),
    ],
    ids=str,
)  # fmt: skip
def test_a_contradiction_of_a_draft_is_refused(
    tmp_path: Path, draft_file: Path, target: Model, keys: dict[str, Any], error: type[LoadError], found: str
) -> None:
    written = {f"{architecture(draft_file)}.{key}": value for key, value in keys.items()}
    with pytest.raises(error, match=found):
        load_draft(rewrite(draft_file, tmp_path / "d.gguf", keys=written), target)


@pytest.mark.parametrize("layers", [["a", "b"], [1.5, 2.5], list(range(1, 66))], ids=["texts", "floats", "too many"])
def test_tapped_layers_are_a_short_list_of_integers(tmp_path: Path, target: Model, layers: list[Any]) -> None:
    path = tiny.write_draft(tmp_path / "d.gguf", BASE)
    with pytest.raises(BadMetadata, match=r"target_layers (is array of|lists 65 values)"):
        load_draft(rewrite(path, tmp_path / "x.gguf", keys={"dflash.target_layers": layers}), target)


def test_a_draft_of_another_tokenizer_is_refused_at_the_first_token(tmp_path: Path, target: Model) -> None:
    path = tiny.write_draft(tmp_path / "d.gguf", BASE)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    other = {"tokenizer.ggml.tokens": [*tokens[:5], "\u0416", *tokens[6:]]}
    with pytest.raises(DraftMismatch, match=r"token 5 is '\u0416' in the draft and '.*' in the target"):
        load_draft(rewrite(path, tmp_path / "x.gguf", keys=other), target)
    filler = {"tokenizer.ggml.tokens": [*tokens[:-1], "<another filler>"]}
    load_draft(rewrite(path, tmp_path / "y.gguf", keys=filler), target).close()


def test_patterns_for_a_draft_without_a_file_match_nothing(target: Model) -> None:
    with pytest.raises(ConfigError, match=r"'blk\.\*', which matches nothing in ngram"):
        load_draft("ngram", target, ignore="blk.*")


def architecture(path: Path) -> str:
    return str(gguf.GGUFReader(path).fields["general.architecture"].contents())
