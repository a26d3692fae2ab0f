"""A DFlash draft from Hugging Face's files (config.json, *.safetensors) to a GGUF file in llama.cpp's layout."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.arguments import a_function, a_path, shown
from pydflash.errors import BadMetadata, ConfigError, DraftMismatch, LoadError, MissingTensor
from pydflash.files.gguf import GGUFFile
from pydflash.files.gguf_writer import WRITABLE_TYPES, TensorSource, encode, write_gguf
from pydflash.ggml_types import GGMLType

__all__ = ["convert_draft"]

_ROWS = 1 << 22  # values converted at a time, so that memory does not grow with a matrix
_HEADER_LIMIT = 100 << 20
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# GGUF name to Hugging Face name; those with {} exist once per layer.
_NAMES = {
    "fc.weight": "fc.weight",
    "enc.output_norm.weight": "hidden_norm.weight",
    "output_norm.weight": "norm.weight",
    "blk.{}.attn_norm.weight": "layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_q_norm.weight": "layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "layers.{}.self_attn.k_norm.weight",
    "blk.{}.attn_output.weight": "layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "layers.{}.mlp.down_proj.weight",
}
_IGNORED = ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq")  # the target's, and a constant


def convert_draft(
    source: str | Path,
    output: str | Path,
    *,
    target: str | Path,
    type: str = "q8_0",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Convert the folder ``source`` to the GGUF file ``output`` and return its size in bytes.

    ``target``: the GGUF file the draft belongs to; its tokenizer is copied, so that a wrong pair is noticed. ``type``:
    type of the matrices: q8_0, q4_0, f16, bf16 or f32; norms are always f32. ``progress(done, total)`` counts bytes
    written. Raises LoadError, BadMetadata, MissingTensor, DraftMismatch or ConfigError, and WriteError where
    ``output`` cannot be written or is one of the files read. Whatever is raised, a file that was at ``output`` is as
    it was.
    """
    if not isinstance(type, str) or type not in WRITABLE_TYPES:
        raise ConfigError(f"type is {shown(type)}; valid types are {', '.join(WRITABLE_TYPES)}")
    source, output = a_path(source, "source"), a_path(output, "output")
    a_function(progress, "progress")
    with GGUFFile.open(target) as target_file:
        config = _read_config(source)
        weights = _weight_files(source)
        tensors = _open_all(weights)
        metadata = _metadata(config, source) | _tokenizer(target_file, config)
        sources = [_source(name, tensor, WRITABLE_TYPES[type]) for name, tensor in _named(tensors, config, source)]
        inputs = (*target_file.paths, config.path, *weights)
        return write_gguf(output, metadata, _counted(sources, progress), inputs)


# --- configuration ----------------------------------------------------------------------------------------------------


class _Config:
    """config.json with checked access; where a key may be in either place, ``dflash_config`` comes first."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        inner = self.values.get("dflash_config") or {}
        return (
            inner.get(key, self.values.get(key, default)) if isinstance(inner, dict) else self.values.get(key, default)
        )

    def need(self, key: str, kind: type[Any]) -> Any:
        value = self.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "missing" if value is None else f"{value!r}"
            raise BadMetadata(
                f"{self.path}: {key!r} is needed as {kind.__name__} and is {found}; is this a DFlash draft?"
            )
        return value


def _read_config(folder: Path) -> _Config:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be read: {error}; download the whole folder of the draft") from error
    if not isinstance(values, dict):
        raise LoadError(f"{path}: does not hold a JSON object; download the whole folder of the draft")
    return _Config(path, values)


def _metadata(config: _Config, folder: Path) -> dict[str, Any]:
    """The ``dflash.*`` keys of llama.cpp's layout, which counts tapped layers from 1."""
    layers = config.need("num_hidden_layers", int)
    heads, hidden = config.need("num_attention_heads", int), config.need("hidden_size", int)
    size = config.get("head_dim") or hidden // max(heads, 1)
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") if "rope_theta" not in rope else rope["rope_theta"]
    keys: dict[str, Any] = {
        "block_count": layers,
        "context_length": int(config.get("max_position_embeddings", 0)),
        "embedding_length": hidden,
        "feed_forward_length": config.need("intermediate_size", int),
        "attention.head_count": heads,
        "attention.head_count_kv": config.need("num_key_value_heads", int),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": config.need("rms_norm_eps", float),
        "rope.freq_base": float(theta) if theta is not None else config.need("rope_theta", float),
        "block_size": config.need("block_size", int),
        "target_layers": [int(layer) + 1 for layer in config.need("target_layer_ids", list)],
    }
    kinds = config.get("layer_types") or ["full_attention"] * layers
    sliding = [kind == "sliding_attention" for kind in kinds]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise BadMetadata(f"{config.path}: 'layer_types' is {kinds!r} for {layers} layers; sliding and full are known")
    if any(sliding):
        keys |= {
            "attention.sliding_window": config.need("sliding_window", int),
            "attention.sliding_window_pattern": sliding,
        }
    causal = config.values.get("is_causal", config.get("causal"))
    if causal is not None:
        keys["attention.causal"] = bool(causal)
    return {
        "general.architecture": "dflash",
        "general.name": folder.resolve().name,
        "general.quantization_version": 2,
        **{f"dflash.{key}": value for key, value in keys.items()},
    }


def _tokenizer(target: GGUFFile, config: _Config) -> dict[str, Any]:
    """The target's tokenizer keys, and the draft's mask token. DraftMismatch where the two do not fit."""
    architecture = target.require("general.architecture", str)
    pairs = {
        "hidden_size": target.get(f"{architecture}.embedding_length", int),
        "vocab_size": target.metadata.count("tokenizer.ggml.tokens"),
    }
    for key, there in pairs.items():
        here = config.get(key)
        if here is not None and there is not None and here != there:
            raise DraftMismatch(f"{config.path}: {key} is {here}, that of {target.path} is {there}; they do not match")
    keys = {key: target.metadata[key] for key in target.metadata if key.startswith("tokenizer.")}
    return keys | {"tokenizer.ggml.mask_token_id": config.need("mask_token_id", int)}


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file: F32, F16 or BF16, mapped."""

    shape: tuple[int, ...]
    dtype: str
    data: npt.NDArray[np.uint8]

    def pieces(self, multiple: int) -> Iterator[npt.NDArray[np.float32]]:
        """The values in order, flat, a few million at a time, each piece a multiple of ``multiple`` values."""
        flat = self.data.view(_DTYPES[self.dtype])
        step = max(1, _ROWS // multiple) * multiple
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            if self.dtype == "BF16":
                yield (piece.astype(np.uint32) << np.uint32(16)).view(np.float32)
            else:
                yield piece.astype(np.float32)


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise LoadError(f"{folder}: holds no *.safetensors file; download the whole folder of the draft")
    return paths


def _open_all(paths: list[Path]) -> dict[str, _Tensor]:
    """Every tensor of the files by name."""
    tensors: dict[str, _Tensor] = {}
    for path in paths:
        tensors |= _open_safetensors(path)
    return tensors


def _open_safetensors(path: Path) -> dict[str, _Tensor]:
    """Map one file: u64 length of a JSON header {name: {dtype, shape, data_offsets}}, then the data."""
    damaged = f"{path}: the file is damaged or not a safetensors file; download it again"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _HEADER_LIMIT
            if length >= min(_HEADER_LIMIT, size - 7):
                raise LoadError(damaged)
            header_bytes = file.read(length)
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[8 + length :]
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error}; check permissions and free memory") from error
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        return {name: _entry(entry, data) for name, entry in header.items() if entry["dtype"] in _DTYPES}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{damaged} ({error})") from error


def _entry(entry: Mapping[str, Any], data: npt.NDArray[np.uint8]) -> _Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
    if not 0 <= start <= end <= len(data) or end - start != wanted:
        raise ValueError(f"a tensor of shape {shape} lies in bytes {start} to {end} of {len(data)}")
    return _Tensor(shape, entry["dtype"], data[start:end])


def _named(tensors: Mapping[str, _Tensor], config: _Config, folder: Path) -> Iterator[tuple[str, _Tensor]]:
    """The GGUF name of each tensor with the tensor. Raises MissingTensor; LoadError for a tensor that a DFlash draft
    does not have."""
    theirs = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    layers = config.need("num_hidden_layers", int)
    taken = set()
    for ours, name in _NAMES.items():
        for layer in range(layers if "{}" in ours else 1):
            wanted = name.format(layer)
            if wanted not in theirs:
                raise MissingTensor(f"{folder}: tensor {wanted!r} is missing; is this a DFlash draft, and complete?")
            taken.add(wanted)
            yield ours.format(layer), theirs[wanted]
    left = sorted(name for name in theirs.keys() - taken if not name.endswith(_IGNORED))
    if left:
        raise LoadError(f"{folder}: tensor {left[0]!r} and {len(left) - 1} more are not part of any known DFlash draft")


def _source(name: str, tensor: _Tensor, dtype: GGMLType) -> TensorSource:
    """Matrices in the requested type, norms in f32."""
    if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        raise LoadError(f"tensor {name!r} of the draft has shape {tensor.shape}; vectors and matrices were expected")
    kind = dtype if len(tensor.shape) == 2 else GGMLType.F32
    columns = tensor.shape[-1]
    encode(np.zeros((1, columns), np.float32), kind)  # refuses rows that are not whole blocks, before writing

    def chunks() -> Iterator[npt.NDArray[np.uint8]]:
        for piece in tensor.pieces(columns):
            yield encode(piece.reshape(-1, columns), kind)

    return TensorSource(name, tensor.shape, kind, chunks)


def _counted(sources: list[TensorSource], progress: Callable[[int, int], None] | None) -> list[TensorSource]:
    """The same tensors, reporting the bytes that were written."""
    if progress is None:
        return sources
    total, done = sum(source.nbytes for source in sources), 0

    def counted(source: TensorSource) -> Callable[[], Iterator[npt.NDArray[np.uint8]]]:
        def chunks() -> Iterator[npt.NDArray[np.uint8]]:
            nonlocal done
            for chunk in source.chunks():
                yield chunk
                done += chunk.nbytes
                progress(done, total)

        return chunks

    return [TensorSource(s.name, s.shape, s.type, counted(s)) for s in sources]
