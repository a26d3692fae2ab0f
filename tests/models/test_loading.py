"""A file that cannot be run is refused with an error that names the file and what is wrong in it; nothing aborts."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pydflash.errors import (
    BadMetadata,
    LoadError,
    MissingTensor,
    NoDevice,
    PydflashError,
    UnsupportedArchitecture,
)  # fmt: skip
from pydflash.models import Model, load_model
from pydflash.native import cuda_device_count
from tests import tiny
from tools.synth.layout import Slot

BASE = tiny.GEOMETRIES["equal"]
Change = Callable[[Slot], Slot | None]


def damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any] | None = None, change: Change | None = None
) -> Path:
    """A target file with other metadata (None removes a key) or other tensors (None drops one)."""
    metadata, tensors = tiny.target_metadata, tiny.target_tensors

    def altered(*args: Any) -> dict[str, Any]:
        return {k: v for k, v in (metadata(*args) | (keys or {})).items() if v is not None}

    monkeypatch.setattr(tiny, "target_metadata", altered)
    if change is not None:
        monkeypatch.setattr(tiny, "target_tensors", lambda g: (s for s in map(change, tensors(g)) if s is not None))
    return tiny.write_target(path, BASE)


@pytest.fixture(scope="module")
def target(model_of: Callable[..., Model]) -> Model:
    return model_of("equal")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0), ("attention.head_count", 3), ("attention.head_count", 2**31),
        ("attention.head_count_kv", 0), ("attention.head_count_kv", 8), ("attention.key_length", 0),
        ("attention.key_length", 80), ("attention.key_length", 2**30), ("attention.value_length", 32),
        ("embedding_length", 0), ("embedding_length", 2**31), ("feed_forward_length", 0), ("block_count", 0),
        ("block_count", 2**20), ("block_count", 2**31), ("block_count", 2**32 - 1),
        ("nextn_predict_layers", 4), ("nextn_predict_layers", 2**31),
        ("nextn_predict_layers", -1), ("nextn_predict_layers", -1_000_000), ("nextn_predict_layers", -(2**31)),
        ("rope.dimension_count", 0), ("rope.dimension_count", 17), ("rope.dimension_count", 66),
        ("rope.dimension_sections", [11, 11, 10, 0]), ("rope.freq_base", 0.0), ("rope.freq_base", -1.0),
        ("rope.freq_base", float("nan")), ("rope.freq_base", float("inf")),
        ("attention.layer_norm_rms_epsilon", 0.0), ("attention.layer_norm_rms_epsilon", float("nan")),
        ("full_attention_interval", 0), ("attention.recurrent_layers", [True]), ("ssm.conv_kernel", 1),
        ("ssm.conv_kernel", 100), ("ssm.state_size", 0), ("ssm.state_size", 33), ("ssm.group_count", 0),
        ("ssm.group_count", 3), ("ssm.time_step_rank", 0), ("ssm.time_step_rank", 6), ("ssm.inner_size", 7),
        ("attention.head_count", None), ("rope.freq_base", None), ("ssm.inner_size", None),
        ("attention.head_count", "four"), ("rope.freq_base", "big"),
    ],
    ids=str,
)  # fmt: skip
def test_absurd_metadata_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    path = damaged(tmp_path / "bad.gguf", monkeypatch, {f"qwen35.{key}": value})
    with pytest.raises(LoadError) as caught:
        load_model(path, "cpu")
    assert isinstance(caught.value, BadMetadata | MissingTensor)
    assert "bad.gguf" in str(caught.value)
    assert "qwen35." in str(caught.value) or isinstance(caught.value, MissingTensor)


@pytest.mark.parametrize("name", ["llama", "qwen3", "dflash", "QWEN35"])
def test_another_architecture_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = damaged(tmp_path / "bad.gguf", monkeypatch, {"general.architecture": name})
    with pytest.raises(UnsupportedArchitecture, match=f"architecture '{name}'; this package runs 'qwen35'"):
        load_model(path, "cpu")


def test_a_draft_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="architecture 'dflash'"):
        load_model(tiny.write_draft(tmp_path / "draft.gguf", BASE), "cpu")


def test_every_tensor_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Model) -> None:
    names = [n for n in target.config.tensors() if not n.startswith("blk.") or n.startswith(("blk.0.", "blk.3."))]
    for name in names:
        if name == "output.weight":
            continue  # without it the embedding is the head
        with monkeypatch.context() as patch:
            path = damaged(tmp_path / "bad.gguf", patch, change=lambda s, name=name: None if s.name == name else s)
        with pytest.raises(MissingTensor, match=f"'{name}' .* is missing"):
            load_model(path, "cpu")


@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight", "blk.0.attn_qkv.weight", "blk.3.attn_q.weight"])
def test_a_wrong_shape_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def widen(slot: Slot) -> Slot:
        return slot._replace(shape=(slot.shape[0], slot.shape[1] + 32)) if slot.name == name else slot

    path = damaged(tmp_path / "bad.gguf", monkeypatch, change=widen)
    with pytest.raises(LoadError, match=rf"'{name}' has shape \(\d+, 160\); its metadata asks for \(\d+, 128\)"):
        load_model(path, "cpu")


def test_an_empty_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(tmp_path / "bad.gguf", monkeypatch, {"tokenizer.ggml.tokens": None})
    with pytest.raises(PydflashError):
        load_model(path, "cpu")


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    zipped = tmp_path / "x.gguf"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a", "b" * 1000)
    for path in (tmp_path / "missing.gguf", tmp_path, zipped):
        with pytest.raises(LoadError, match=path.name):
            load_model(path, "cpu")


def test_a_target_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tiny.write_target(tmp_path / "whole.gguf", BASE).read_bytes()
    cut = tmp_path / "cut.gguf"
    for i in range(50):
        cut.write_bytes(whole[: len(whole) * i // 50])
        with pytest.raises(LoadError, match=r"cut\.gguf"):
            load_model(cut, "cpu")


def test_a_missing_cuda_device_is_named(tmp_path: Path) -> None:
    path = tiny.write_target(tmp_path / "target.gguf", BASE)
    with pytest.raises(NoDevice, match=f"cuda:{cuda_device_count()}"):
        load_model(path, f"cuda:{cuda_device_count()}")
