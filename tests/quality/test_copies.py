"""Copies of a model are the same function, and outlier channels hurt a q4_0 K cache until it is rotated."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.kv_quality.copies import Outliers, copy_model, inject, write_f32
from benchmarks.kv_quality.measure import REFERENCE, Caches, Yardstick
from benchmarks.kv_quality.texts import held_out_lines, texts
from pydflash.errors import ConfigError
from pydflash.files import GGUFFile
from pydflash.models import load_model
from pydflash.models.qwen35 import Config
from pydflash.runtime import Session
from tests.helpers import nmse, run_chunks
from tests.shipped import TARGET, TEST_DATA, held_out_prompts, needs_pair

pytestmark = needs_pair

ROPE, HEAD = 64, 256


@pytest.fixture(scope="module")
def f32_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "target.gguf"
    write_f32(TARGET, path)
    return path


def test_outlier_channels_come_in_the_pairs_that_rope_turns() -> None:
    for count in (1, 4, 8, 12, 16, 40, 256):
        for layer in (3, 7):
            channels = Outliers(count, 16).channels(layer, HEAD, ROPE).tolist()
            assert len(set(channels)) == count
            turned = {c for c in channels if c < ROPE}
            assert turned == {(c + ROPE // 2) % ROPE for c in turned}
            assert all(0 <= c < HEAD for c in channels)


def test_outlier_channels_are_strewn_and_differ_between_layers() -> None:
    channels = Outliers(8, 16).channels(3, HEAD, ROPE)
    assert np.array_equal(channels // 32, np.arange(8))  # one in each block of a q4_0 or q8_0 cache
    assert np.array_equal(channels, Outliers(8, 16).channels(3, HEAD, ROPE))
    assert not np.array_equal(channels, Outliers(8, 16).channels(7, HEAD, ROPE))
    assert not np.array_equal(channels, Outliers(8, 16, seed=1).channels(3, HEAD, ROPE))


@pytest.mark.parametrize("text", ["", "12", "x16", "12x", "0x16", "12x0", "-1x2", "12 x 16", "none"])
def test_a_wrong_description_of_outliers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="CHANNELSxFACTOR such as 12x16"):
        Outliers.parse(text)


def test_a_description_of_outliers_is_read() -> None:
    assert Outliers.parse("12x16") == Outliers(12, 16.0)
    assert Outliers.parse("3x2.5") == Outliers(3, 2.5)


def test_more_outliers_than_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit heads of 256"):
        Outliers(257, 16).channels(3, HEAD, ROPE)


def test_injection_changes_the_norms_of_q_and_k_and_nothing_else(tmp_path: Path) -> None:
    path, outliers = tmp_path / "copy.gguf", Outliers(12, 16)
    inject(TARGET, path, outliers)
    with GGUFFile.open(TARGET) as before, GGUFFile.open(path) as after:
        layers = Config.read(before).attention_layers
        changed = {name for name in before.tensors if not np.array_equal(before.data(name), after.data(name))}
        assert changed == {f"blk.{layer}.attn_{norm}_norm.weight" for layer in layers for norm in "qk"}
        header = min(info.offset for info in before.tensors.values())
        assert TARGET.read_bytes()[:header] == path.read_bytes()[:header]
        for layer in layers:
            factors = np.ones(HEAD, np.float32)
            factors[outliers.channels(layer, HEAD, ROPE)] = 16
            for norm, factor in (("q", 1 / factors), ("k", factors)):
                name = f"blk.{layer}.attn_{norm}_norm.weight"
                old, new = (file.data(name).view(np.float32) for file in (before, after))
                assert np.array_equal(new, old * factor)


def logits(path: Path, width: int, cache: str = "f32") -> np.ndarray:
    with load_model(path, "cpu", threads=1) as model, Session(model, 256, cache, cache, "none") as session:
        ids = model.tokenizer.encode(held_out_prompts(2)[1])[:80]
        return run_chunks(session, ids, width)


@pytest.mark.parametrize("width", [16, 80])
def test_outliers_of_a_power_of_two_change_no_bit_of_the_logits(f32_target: Path, tmp_path: Path, width: int) -> None:
    """Every product of a score is of one number halved and one doubled so many times: the same product."""
    path = tmp_path / "copy.gguf"
    inject(f32_target, path, Outliers(12, 16))
    assert np.array_equal(logits(path, width), logits(f32_target, width))


def test_outliers_of_any_factor_change_logits_by_rounding_alone(f32_target: Path, tmp_path: Path) -> None:
    """float32 rounds each scaled number once, 6e-8 of it; over 8 layers that stays below an NMSE of 1e-11."""
    path = tmp_path / "copy.gguf"
    inject(f32_target, path, Outliers(12, 10))
    assert 0 < nmse(logits(path, 16), logits(f32_target, 16)) < 1e-11


def test_f32_weights_are_the_values_that_the_file_stands_for(f32_target: Path) -> None:
    with GGUFFile.open(f32_target) as copy:
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(TARGET)).tensors}
        assert set(copy.tensors) == set(stored)
        for name, tensor in stored.items():
            values = copy.data(name).view(np.float32)
            assert np.array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)), name


def test_a_copy_can_be_both_in_f32_and_with_outliers(f32_target: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    copy_model(TARGET, one, f32=True, outliers=Outliers(4, 8))
    inject(f32_target, two, Outliers(4, 8))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gguf", "two.gguf"]


def test_rotation_brings_the_divergence_of_a_q4_0_cache_down_tenfold(f32_target: Path, tmp_path: Path) -> None:
    """The outliers and the texts of docs/kv-cache.md."""
    path = tmp_path / "outliers.gguf"
    inject(f32_target, path, Outliers(8, 32))
    lines = held_out_lines(TEST_DATA / "held_out.jsonl")
    with load_model(path, "cpu", threads=1) as model:
        yardstick = Yardstick(model, list(texts(lines, model.tokenizer.encode, [256, 512, 1024], 6)))
        plain, rotated = (yardstick.measure(Caches("q4_0", "f16", basis)) for basis in ("none", "hadamard-256"))
    assert plain.kld_mean >= 10 * rotated.kld_mean
    assert plain.kld_999 >= 10 * rotated.kld_999
    assert plain.recalled <= 9
    assert rotated.recalled == len(rotated.recall) == 18


def test_the_reference_does_not_differ_from_itself() -> None:
    with load_model(TARGET, "cpu", threads=1) as model:
        lines = held_out_lines(TEST_DATA / "held_out.jsonl")
        quality = Yardstick(model, list(texts(lines, model.tokenizer.encode, [80], 2))).measure(REFERENCE)
    assert (quality.kld_mean, quality.kld_999, quality.top1) == (0, 0, 1)
    assert 0 < quality.attention_error < 1e-3  # f16 keeps 11 bits, an f32 cache 24
