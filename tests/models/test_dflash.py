"""A draft's file that cannot be used is refused with an error that names the file and what is wrong in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pydflash.drafts import load_draft
from pydflash.errors import BadMetadata, DraftMismatch, LoadError, MissingTensor, UnsupportedArchitecture
from pydflash.models import Model
from tests import tiny

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
