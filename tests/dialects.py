"""Files as other programs write them: a GGUF file copied with other keys, names and tensors; what publishers add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

__all__ = ["MIXED_TYPES", "PUBLISHED", "ollama_keys", "ollama_name", "ollama_tensors", "random_matrix", "rewrite"]

V = gguf.GGUFValueType
Quantised = tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]

# Metadata of public files, beside that of the architecture.
BASE = {
    "general.type": "model", "general.basename": "Qwen3.6", "general.size_label": "27B",
    "general.license": "apache-2.0", "general.base_model.count": 1, "general.base_model.0.name": "Qwen3.6 27B",
    "general.base_model.0.organization": "Qwen", "general.tags": ["image-text-to-text"], "general.file_type": 15,
    "quantize.imatrix.file": "imatrix.gguf", "quantize.imatrix.dataset": "calibration.txt",
    "quantize.imatrix.entries_count": (496, V.INT32), "quantize.imatrix.chunks_count": (80, V.INT32),
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "bartowski": {**BASE, "general.quantized_by": "bartowski", "tokenizer.ggml.add_bos_token": False},
    "unsloth": {
        **BASE, "general.quantized_by": "Unsloth", "general.sampling.top_k": (20, V.INT32),
        "general.sampling.top_p": 0.95, "general.sampling.temp": 1.0,
    },
    "mradermacher": {
        "mradermacher.quantize_version": "2", "mradermacher.quantized_by": "mradermacher", "general.languages": ["en"],
    },
    "64-bit and signed": {
        "general.parameter_count": (35_951_822_704, V.UINT64), "qwen35.context_length": (4096, V.UINT64),
        "qwen35.embedding_length": (128, V.INT64), "qwen35.rope.freq_base": (1e7, V.FLOAT64),
        "qwen35.full_attention_interval": None, "qwen35.attention.value_length": None,
    },
    "an image encoder": {
        "qwen35.vision.block_count": 27, "qwen35.image_token_id": 7, "clip.has_vision_encoder": True,
        "qwen35.n_deepstack_layers": 0,
    },
    "a list for each layer": {
        "qwen35.attention.head_count": [4] * 4, "qwen35.attention.head_count_kv": [2] * 4,
        "qwen35.feed_forward_length": [256] * 4, "qwen35.attention.key_length": [64] * 4,
    },
    "values that change nothing": {
        "qwen35.rope.scaling.type": "none", "qwen35.rope.scaling.factor": 1.0, "qwen35.attention.causal": True,
        "qwen35.vocab_size": 320, "qwen35.expert_count": 0, "qwen35.logit_scale": 1.0,
    },
}  # fmt: skip

MIXED_TYPES = ("Q2_K", "Q3_K", "Q4_1", "Q5_0", "IQ2_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS")
"""Types of matrices in IQ and UD files, beside those that every device multiplies with."""

_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,)}  # bytes at which a block keeps its f16 scales; 0 for the others


def random_matrix(shape: tuple[int, int], kind: str, seed: int) -> Quantised:
    """Random blocks of small values."""
    dtype = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[dtype]
    blocks = np.random.default_rng(seed).integers(0, 256, (shape[0] * shape[1] // size, nbytes), np.uint8)
    scale = np.array([1e-3], np.float16).view(np.uint8)
    for at in _SCALES.get(kind, (0,)):
        blocks[:, at : at + 2] = scale
    if kind == "Q4_1":  # its minimum
        blocks[:, 2:4] = np.array([-8e-3], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1), dtype


def ollama_keys(layers: int = 4, kv_heads: int = 2, sections: tuple[int, ...] = (3, 3, 2)) -> dict[str, Any]:
    """What Ollama's converter writes in another way than llama.cpp's, or besides."""
    listed = [kv_heads if (layer + 1) % 4 == 0 else 0 for layer in range(layers)]
    keys = {
        "attention.head_count_kv": listed, "rope.dimension_sections": list(sections), "mrope_sections": list(sections),
        "rope.mrope_section": list(sections), "rope.mrope_interleaved": True, "ssm.v_head_reordered": True,
        "vision.block_count": 27, "vision.attention.layer_norm_epsilon": 1e-6, "vision.image_mean": [0.5, 0.5, 0.5],
        "vision.deepstack_visual_indexes": [5, 11, 17], "image_token_id": 7, "vision_start_token_id": 8,
        "vision_end_token_id": 9,
    }  # fmt: skip
    return {f"qwen35.{key}": value for key, value in keys.items()} | {"tokenizer.ggml.eos_token_ids": [7, 8]}


def ollama_name(name: str) -> str:
    return name.replace("ssm_dt.bias", "ssm_dt")


def ollama_tensors() -> dict[str, Quantised]:
    """Of an image encoder and of multi-token prediction."""
    zeros, f32 = np.zeros((4, 128), np.float32), gguf.GGMLQuantizationType.F32
    names = (
        "v.blk.0.attn_q.weight",
        "v.patch_embed.weight",
        "mm.0.weight",
        "mtp.layers.0.attn_q.weight",
        "mtp.fc.weight",
    )
    return {name: (zeros, f32) for name in names}


def rewrite(
    source: Path,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Quantised] | None = None,
    rename: Callable[[str], str] = lambda name: name,
    architecture: str | None = None,
    parts_of: int = 0,
) -> Path:
    """Copy a GGUF file with other ``keys``, where None drops one and (value, type) gives the type, and other or more
    ``tensors``. ``parts_of``: tensors in a part of a split file, whose first part's path is returned."""
    reader, keys, tensors = gguf.GGUFReader(source), dict(keys or {}), dict(tensors or {})
    name = architecture or str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, name, split_max_tensors=parts_of)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in keys:
            item = field.types[-1] if field.types[0] == V.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
    for key, value in keys.items():
        if value is not None:
            writer.add_key_value(key, *_typed(value))
    for tensor in reader.tensors:
        data, kind = tensors.pop(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(rename(tensor.name), data, raw_dtype=kind)
    for more, (data, kind) in tensors.items():
        writer.add_tensor(more, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*"))[0] if parts_of else path


def _typed(value: Any) -> tuple[Any, ...]:
    """A value with its GGUF type, and that of its items."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        return value, V.ARRAY, V.INT32 if type(value[0]) is int else _typed(value[0])[1]
    kinds = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}
    return value, kinds[type(value)]
