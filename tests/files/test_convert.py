"""A draft converted from Hugging Face's files is the draft: same metadata, same bytes, same proposals."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import safetensors

from pydflash.drafts import DraftSession, load_draft
from pydflash.errors import (
    BadMetadata,
    ConfigError,
    DraftMismatch,
    LoadError,
    MissingTensor,
    UnsupportedModel,
    WriteError,
)
from pydflash.files import GGUFFile, write_gguf
from pydflash.files.convert import convert_draft
from pydflash.files.gguf_writer import encode
from pydflash.ggml_types import GGMLType
from pydflash.models import load_model
from pydflash.runtime import Session
from tests.tiny import GEOMETRIES, write_draft

GEOMETRY = GEOMETRIES["gqa6"]
TAPS = (0, 2)
# GGUF names to Hugging Face names, written out once more: this list is the oracle of the one in convert.py.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
TOP = {"fc.weight": "fc.weight", "enc.output_norm.weight": "hidden_norm.weight", "output_norm.weight": "norm.weight"}


def hf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, tensor, _ = name.split(".")
    return f"layers.{layer}.{LAYER[tensor]}.weight"


def hf_config(reference: GGUFFile, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e7,
        "max_position_embeddings": GEOMETRY.context, "block_size": 16, "vocab_size": GEOMETRY.vocab,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48,
        "dflash_config": {
            "mask_token_id": int(reference.metadata["tokenizer.ggml.mask_token_id"]), "target_layer_ids": list(TAPS),
        },
    }  # fmt: skip
    return {name: value for name, value in (config | changes).items() if value is not ...}


def write_hf(folder: Path, reference: GGUFFile, prefix: str = "", dtype: str = "F32", **changes: Any) -> Path:
    """The f32 draft ``reference`` as a Hugging Face folder, in two shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(reference, **changes)))
    items = []
    for name, info in reference.tensors.items():
        values = reference.data(name).view(np.float32)
        data = {"F32": values, "F16": values.astype(np.float16), "BF16": bfloat16(values)}[dtype].tobytes()
        items.append((prefix + hf_name(name), info.shape, data))
    for index, shard in enumerate((items[::2], items[1::2])):
        write_safetensors(folder / f"model-{index}.safetensors", shard, dtype)
    return folder


def write_safetensors(path: Path, items: list[tuple[str, tuple[int, ...], bytes]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, data in items:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in items))
    with safetensors.safe_open(path, "numpy") as checked:  # the library's own opinion of what was written
        assert set(checked.keys()) == {name for name, _, _ in items}


def bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half, cut: random f32 values become valid bf16 ones."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def reference_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "draft.gguf"
    return write_draft(path, GEOMETRY, layers=2, window=48, taps=TAPS)


def test_the_converted_draft_equals_one_written_directly(
    target_path: Path, reference_path: Path, tmp_path: Path
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
        size = convert_draft(folder, tmp_path / "out.gguf", target=target_path, type="f32")
        with GGUFFile.open(tmp_path / "out.gguf") as converted:
            assert converted.nbytes == size
            assert set(converted.tensors) == set(reference.tensors)
            for name in reference.tensors:
                assert converted.tensors[name].shape == reference.tensors[name].shape
                np.testing.assert_array_equal(converted.data(name), reference.data(name))
            skipped = {"general.name", "dflash.rope.dimension_sections"}
            for key in set(reference.metadata) - skipped:
                assert np.array_equal(converted.metadata[key], reference.metadata[key]), key
                assert converted.metadata.describe(key) == reference.metadata.describe(key)
    assert proposals(target_path, tmp_path / "out.gguf") == proposals(target_path, reference_path)


def proposals(target: Path, draft: Path) -> list[list[int]]:
    """What the draft at ``draft`` proposes after prompts."""
    found = []
    with (
        load_model(target, "cpu", threads=1) as model,
        load_draft(draft, model) as loaded,
        Session(model, 256, capture=loaded.config.taps) as session,
        DraftSession(loaded, session) as proposer,
    ):
        for start in (3, 70):
            session.forward(list(range(start, start + 12)))
            session.commit(12)
            proposer.commit(12)
            found.append(proposer.propose([5]).ids.tolist())
    return found


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "f16", "bf16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_matrices_are_quantised_as_the_gguf_package_does_it(
    target_path: Path, reference_path: Path, tmp_path: Path, type_name: str, source: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, prefix="model.", dtype=source)
        convert_draft(folder, tmp_path / "out.gguf", target=target_path, type=type_name)
        with GGUFFile.open(tmp_path / "out.gguf") as converted:
            for name, info in reference.tensors.items():
                values = reference.data(name).view(np.float32)
                if source == "BF16":
                    values = (bfloat16(values).astype(np.uint32) << 16).view(np.float32)
                if source == "F16":
                    values = values.astype(np.float16).astype(np.float32)
                kind = GGMLType.F32 if len(info.shape) == 1 else GGMLType[type_name.upper()]
                assert converted.tensors[name].type == kind
                expected = gguf.quantize(values.reshape(info.shape), gguf.GGMLQuantizationType(int(kind)))
                np.testing.assert_array_equal(
                    converted.data(name), np.ascontiguousarray(expected).view(np.uint8).ravel()
                )


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_the_quantisers_agree_on_awkward_blocks(kind: GGMLType) -> None:
    rows = np.zeros((6, 64), np.float32)
    rows[1] = np.arange(64) - 31.5  # ties of rounding
    rows[2, 5], rows[2, 6] = -3.0, 3.0  # two largest values: the first one counts
    rows[3] = 1e-30
    rows[4] = np.linspace(-127, 127, 64)
    rows[5] = np.random.default_rng(0).standard_normal(64)
    expected = gguf.quantize(rows, gguf.GGMLQuantizationType(int(kind)))
    np.testing.assert_array_equal(encode(rows, kind), np.ascontiguousarray(expected).view(np.uint8).ravel())


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"is_causal": False}, "dflash.attention.causal", False),
        (
            {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1], "causal": True}},
            "dflash.attention.causal",
            True,
        ),
        ({}, "dflash.attention.causal", None),
        ({"layer_types": ...}, "dflash.attention.sliding_window", None),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}}, "dflash.rope.freq_base", 5e5),
        ({"dflash_config": ..., "mask_token_id": 3, "target_layer_ids": [1, 2]}, "dflash.target_layers", [2, 3]),
        ({"partial_rotary_factor": 0.5}, "dflash.rope.dimension_count", 32),
        ({"rope_scaling": None}, "dflash.rope.scaling.type", None),
        ({"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}}, "dflash.rope.scaling.type", None),
    ],
)
def test_what_the_configuration_says_reaches_the_file(
    target_path: Path, reference_path: Path, tmp_path: Path, changes: dict[str, Any], key: str, expected: Any
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **changes)
    convert_draft(folder, tmp_path / "out.gguf", target=target_path, type="f16")
    with GGUFFile.open(tmp_path / "out.gguf") as converted:
        found = converted.metadata.get(key)
        assert found is expected or np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"hidden_size": 512}, DraftMismatch, "512"),
        ({"vocab_size": 9}, DraftMismatch, "vocab_size is 9"),
        ({"block_size": ...}, BadMetadata, "block_size"),
        ({"draft_vocab_size": 9}, DraftMismatch, "draft_vocab_size is 9"),
        ({"num_target_layers": 64}, DraftMismatch, "num_target_layers is 64; .* has 4 blocks"),
        ({"mask_token_id": 5}, BadMetadata, "'dflash_config.mask_token_id' is .*, 'mask_token_id' 5; correct one"),
        (
            {"dflash_config": {"mask_token_id": 10**6, "target_layer_ids": [1]}},
            DraftMismatch,
            "mask_token_id is 1000000",
        ),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": ["1"]}}, BadMetadata, "must list integers"),
        ({"max_position_embeddings": "long"}, BadMetadata, "max_position_embeddings' is needed as int and is 'long'"),
        ({"rope_theta": [1e7]}, BadMetadata, "rope_theta' is needed as float"),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            BadMetadata,
            "rope_theta' is 10000000.0, 'rope_parameters.rope_theta' 5",
        ),
        ({"head_dim": "64"}, BadMetadata, "head_dim"),
        ({"num_attention_heads": -4}, BadMetadata, "must lie in"),
        ({"intermediate_size": 1 << 40}, BadMetadata, "must lie in 0"),
        ({"is_causal": "no"}, BadMetadata, "is_causal"),
        ({"layer_types": [{}, []]}, BadMetadata, "layer_types"),
        ({"layer_types": "full"}, BadMetadata, "layer_types"),
        ({"layer_types": ..., "use_sliding_window": True}, BadMetadata, "no 'layer_types' says for which"),
        ({"use_sliding_window": False}, BadMetadata, "'use_sliding_window' is false, but 'layer_types' has sliding"),
        ({"dflash_config": {}}, BadMetadata, "target_layer_ids"),
        ({"layer_types": ["sliding_attention"]}, BadMetadata, "layer_types"),
        ({"num_hidden_layers": 3, "layer_types": ...}, MissingTensor, r"layers\.2\."),
        ({"num_hidden_layers": 1, "layer_types": ...}, LoadError, r"layers\.1\."),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_no_file_is_left(
    target_path: Path, reference_path: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **changes)
    with pytest.raises(error, match=named):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)
    assert not (tmp_path / "out.gguf").exists()


YARN = {"factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("kind", "found", "wanted"),
    [
        ("linear", {"factor": 4}, {"factor": 4.0}),
        ("yarn", YARN | {"finetuned": True, "truncate": True}, {"factor": 4.0, "original_context_length": 512}),
        ("yarn", {"factor": 4.0}, {"factor": 4.0, "original_context_length": GEOMETRY.context}),
        (
            "yarn",
            YARN | {"attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "attn_factor": 1, "mscale": None},
            {
                "factor": 4.0, "original_context_length": 512,
                "yarn_attn_factor": 1.25, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0,
            },
        ),
    ],
)  # fmt: skip
def test_scaled_positions_of_the_configuration_reach_the_file(
    target_path: Path, reference_path: Path, tmp_path: Path, place: str, spelling: str, kind: str,
    found: dict[str, Any], wanted: dict[str, Any],
) -> None:  # fmt: skip
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **{place: {spelling: kind, **found}})
    convert_draft(folder, tmp_path / "out.gguf", target=target_path, type="f16")
    with GGUFFile.open(tmp_path / "out.gguf") as converted:
        prefix = "dflash.rope.scaling."
        keys = {
            key.removeprefix(prefix): converted.metadata[key] for key in converted.metadata if key.startswith(prefix)
        }
        assert keys == {"type": kind, **wanted}
        assert converted.metadata["dflash.rope.freq_base"] == 1e7
    with load_model(target_path, "cpu", threads=1) as model, load_draft(tmp_path / "out.gguf", model) as draft:
        assert draft.config.rope.factor == 4.0


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        *[({"rope_type": kind, "factor": 4.0}, f"scaled by {kind!r}; default, linear and yarn are supported")
          for kind in ("dynamic", "longrope", "su", "llama3", "proportional")],
        ({"rope_type": 3}, "'rope_parameters.rope_type' is needed as str and is 3"),
        ({"rope_type": "linear"}, "factor' is needed as float and is missing"),
        ({"rope_type": "yarn", "factor": "4"}, "factor' is needed as float and is '4'"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"rope_type": "yarn", "factor": float("nan")}, "factor' is needed as float and is nan"),
        ({"factor": 4.0}, r"factor' \(4.0\) is not used"),
        ({"rope_type": "yarn", **YARN, "mscale": 1.0}, r"mscale' \(1.0\) is not used"),
        ({"rope_type": "yarn", **YARN, "attn_factor": 2.0}, r"attn_factor' \(2.0\) is not used"),
        ({"rope_type": "yarn", **YARN, "truncate": False}, r"truncate' \(False\) is not used"),
        ({"rope_type": "yarn", **YARN, "beta_fast": "32"}, "beta_fast' is needed as float"),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32}, r"beta_fast' \(32\) is not used"),
        ({"full_attention": {"rope_type": "default"}}, r"full_attention' \({'rope_type': 'default'}\) is not used"),
        ({"rope_theta": "1e7"}, "rope_theta' is needed as float and is '1e7'"),
        ({"rope_theta": 10**400}, "rope_theta' is needed as float and is 1000"),
        ([4.0], r"'rope_parameters' \(\[4.0\]\) is not used"),
    ],
    ids=str,
)  # fmt: skip
def test_scaled_positions_that_no_file_can_hold_are_refused(
    target_path: Path, reference_path: Path, tmp_path: Path, rope: Any, words: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, rope_parameters=rope)
    with pytest.raises(LoadError, match=words):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, r"'attention_bias' \(True\)"), ({"hidden_act": "gelu"}, r"'hidden_act' \('gelu'\)"),
        ({"mlp_bias": True}, "'mlp_bias'"),
        ({"rope_scaling": {"type": "default", "long_factor": [1.0]}}, r"'rope_scaling\.long_factor'"),
        ({"tomorrow": 1}, r"'tomorrow' \(1\)"), ({"quantization_config": {"bits": 4}}, r"'quantization_config\.bits'"),
        ({"sample_from_anchor": True}, "'sample_from_anchor'"), ({"final_logit_softcapping": 20.0}, "softcapping"),
        ({"markov_head_type": "vanilla"}, "'markov_head_type'"), ({"use_qk_norm": False}, "'use_qk_norm'"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1], "use_swa": True}}, "use_swa'"),
        (
            {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1], "conv_kernel_size": 2}},
            r"'dflash_config\.conv_kernel_size' \(2\)",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_configuration_says_and_nobody_reads_is_refused_by_name(
    target_path: Path, reference_path: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **changes)
    with pytest.raises(UnsupportedModel, match=rf"config\.json: .*{named}.* is not used by DFlash"):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)
    assert not (tmp_path / "out.gguf").exists()
    top = next(iter(changes))
    convert_draft(folder, tmp_path / "out.gguf", target=target_path, ignore=(f"{top}*",))


def test_what_published_configurations_say_besides_is_harmless(
    target_path: Path, reference_path: Path, tmp_path: Path
) -> None:
    more = {
        "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "torch_dtype": "bfloat16", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 5, "num_target_layers": 4, "rope_scaling": None, "tie_word_embeddings": True,
        "transformers_version": "4.57.3", "use_cache": True, "use_sliding_window": True, "eos_token_id": 5,
        "bos_token_id": None, "draft_vocab_size": GEOMETRY.vocab,
        "rope_parameters": {"rope_theta": 1e7, "rope_type": "default"},
    }  # fmt: skip
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **more)
    assert convert_draft(folder, tmp_path / "out.gguf", target=target_path) > 0


def test_tensors_that_nobody_reads_are_refused_by_name_whatever_their_type(
    target_path: Path, reference_path: Path, tmp_path: Path
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    sinks, table = folder / "sinks.safetensors", folder / "table.safetensors"
    write_safetensors(sinks, [("model.layers.0.self_attn.sinks", (4,), bytes(16))], "F32")
    write_safetensors(table, [("d2t", (2,), bytes(16))], "I64")
    options: dict[str, Any] = {"target": target_path}
    with pytest.raises(UnsupportedModel, match=r"tensor 'model\.layers\.0\.self_attn\.sinks' .* nor is 1 other"):
        convert_draft(folder, tmp_path / "out.gguf", **options)
    with pytest.raises(UnsupportedModel, match="tensor 'd2t' is not used by DFlash"):
        convert_draft(folder, tmp_path / "out.gguf", ignore="*.sinks", **options)
    convert_draft(folder, tmp_path / "out.gguf", ignore=("*.sinks", "d2t"), **options)
    with pytest.raises(ConfigError, match="'d3t', which matches nothing in"):
        convert_draft(folder, tmp_path / "out.gguf", ignore=("*.sinks", "d3t"), **options)


@pytest.mark.parametrize("link", ["itself", "symlink", "hard link"])
@pytest.mark.parametrize("name", ["target.gguf", "config.json", "model-0.safetensors", "model-1.safetensors"])
def test_an_output_that_is_an_input_is_refused_and_unharmed(
    target_path: Path, reference_path: Path, tmp_path: Path, name: str, link: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    target = Path(shutil.copy(target_path, folder / "target.gguf"))
    output = folder / name
    if link != "itself":
        output = tmp_path / "out.gguf"
        output.symlink_to(folder / name) if link == "symlink" else output.hardlink_to(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WriteError, match="is the input"):
        convert_draft(folder, output, target=target)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_conversion_that_fails_half_way_keeps_the_file_that_was_there(
    target_path: Path, reference_path: Path, tmp_path: Path
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "draft.gguf"
    output.write_bytes(b"a good file")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_draft(folder, output, target=target_path, progress=stop)
    assert output.read_bytes() == b"a good file"
    assert list(output.parent.iterdir()) == [output]


def test_damaged_or_missing_files_are_refused(target_path: Path, reference_path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    out = tmp_path / "out.gguf"
    with pytest.raises(ConfigError, match=r"q5_1.*q8_0"):
        convert_draft(folder, out, target=target_path, type="q5_1")
    shard = folder / "model-0.safetensors"
    content = shard.read_bytes()
    for cut in (0, 4, 100, len(content) - 1):
        shard.write_bytes(content[:cut])
        with pytest.raises(LoadError, match="damaged"):
            convert_draft(folder, out, target=target_path)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(LoadError, match="safetensors"):
        convert_draft(folder, out, target=target_path)
    assert not out.exists()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": 5}, {"rope_parameters": {"rope_theta": []}}, {"rope_theta": 10**400}, {"head_dim": "64"},
        {"head_dim": -1}, {"max_position_embeddings": []}, {"max_position_embeddings": 2**40}, {"layer_types": [[]]},
        {"layer_types": "sliding_attention"}, {"num_hidden_layers": 10**9, "layer_types": ...}, {"block_size": 2**40},
        {"dflash_config": []}, {"dflash_config": {"mask_token_id": 5, "target_layer_ids": ["0"]}},
        {"dflash_config": {"mask_token_id": 2**64, "target_layer_ids": [0]}}, {"rms_norm_eps": "1e-6"},
        {"sliding_window": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_wrong_types_or_numbers_is_refused(
    target_path: Path, reference_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference, **changes)
    with pytest.raises(LoadError, match="hf"):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "\x00", "1" * 5000, "{", "[]"], ids=lambda text: text[:5])
def test_a_configuration_that_is_none_is_refused(
    target_path: Path, reference_path: Path, tmp_path: Path, text: str
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    (folder / "config.json").write_text(text)
    with pytest.raises(LoadError, match=r"config\.json"):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)


@pytest.mark.parametrize(
    "header",
    [
        DEEP, {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"x": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, {"x": 5}, [], {"x": {"dtype": "F32"}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1.0, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**400]}},
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_a_header_of_wrong_types_or_numbers_is_refused(
    target_path: Path, reference_path: Path, tmp_path: Path, header: Any
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model-0.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(LoadError, match="hf"):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)


@pytest.mark.parametrize("shape", [(), (0, 4), (2, 2, 2)], ids=str)
def test_a_tensor_that_is_no_vector_or_matrix_is_refused(
    target_path: Path, reference_path: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with GGUFFile.open(reference_path) as reference:
        folder = write_hf(tmp_path / "hf", reference)
    shard = folder / "model-0.safetensors"
    content = shard.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name] |= {"shape": shape, "data_offsets": [0, 4 * int(np.prod(shape))]}
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(LoadError, match="vectors and matrices were expected"):
        convert_draft(folder, tmp_path / "out.gguf", target=target_path)


def test_metadata_of_every_size_and_nesting_is_written_as_it_is_read_or_refused(tmp_path: Path) -> None:
    values = {"a": 2**40, "b": -(2**40), "c": 1e300, "d": [], "e": ["x"], "f": [["x"], ["y", "z"]], "g": [[1], [2.5]]}
    write_gguf(tmp_path / "written.gguf", {"general.architecture": "x", **values}, [])
    with GGUFFile.open(tmp_path / "written.gguf") as file:
        assert {key: plain(file.metadata[key]) for key in values} == values
    for wrong in (2**70, [1, "a"], [2**40], None, {}, "\ud800"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_gguf(tmp_path / "refused.gguf", {"general.architecture": "x", "k": wrong}, [])
    assert not (tmp_path / "refused.gguf").exists()


def plain(value: Any) -> Any:
    """A metadata value without numpy's types."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value
