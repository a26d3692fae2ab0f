"""A DFlash draft from Hugging Face's files (config.json, *.safetensors) to a GGUF file in llama.cpp's layout."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pydflash.arguments import a_function, a_path, shown
from pydflash.errors import BadMetadata, ConfigError, DraftMismatch, LoadError, MissingTensor
from pydflash.files.gguf import GGUFFile
from pydflash.files.gguf_writer import WRITABLE_TYPES, TensorSource, encode, write_gguf
from pydflash.files.unread import check_patterns, matcher, refuse_unread
from pydflash.ggml_types import GGMLType

__all__ = ["convert_draft"]

T = TypeVar("T")
D = TypeVar("D")

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
_UNUSED = matcher(("*embed_tokens.weight", "*lm_head.weight", "*rotary_emb.inv_freq"))  # the target's, and a constant

_HARMLESS = matcher(
    (
        "architectures", "auto_map.*", "model_type", "dtype", "torch_dtype", "transformers_version", "_*",
        "initializer_range", "use_cache", "*attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings", "target_model_id", "max_window_layers", "sliding_window",
        "output_attentions", "output_hidden_states", "return_dict", "id2label.*", "label2id.*",
        "rope_*.finetuned", "rope_*.mrope_section", "rope_*.mrope_interleaved",
        "rope_*.original_max_position_embeddings",
    )
)  # fmt: skip
"""Keys of config.json that change nothing in what a draft computes; layer_types says which layers have a window."""

_ROPE = ("parameters", "scaling")  # the second in files of older versions of Hugging Face's library
_NEUTRAL: Mapping[str, tuple[bool | float | str, ...]] = {
    "attention_bias": (False,),
    "attention_value_scale": (1,),
    "final_logit_softcapping": (0,),
    "hidden_act": ("silu",),
    "input_embedding_scale": (1,),
    "mlp_bias": (False,),
    "output_multiplier": (1,),
    "rope_is_neox_style": (True,),
    **{
        f"{place}.{name}": value
        for place in ("rope_parameters", "rope_scaling")
        for name, value in (
            ("factor", (1,)),
            ("attn_factor", (1,)),
            ("extrapolation_factor", (1,)),
            ("truncate", (True,)),
        )
    },
    "sample_from_anchor": (False,),
    "use_qk_norm": (True,),
    "use_swa": (False,),
}
"""Keys of config.json, in dflash_config or outside, that change nothing when they have one of these values."""


def convert_draft(
    source: str | Path,
    output: str | Path,
    *,
    target: str | Path,
    type: str = "q8_0",
    progress: Callable[[int, int], None] | None = None,
    ignore: str | Sequence[str] = (),
) -> int:
    """Convert the folder ``source`` to the GGUF file ``output`` and return its size in bytes.

    ``target``: the GGUF file the draft belongs to; its tokenizer is copied, so that a wrong pair is noticed. ``type``:
    type of the matrices: q8_0, q4_0, f16, bf16 or f32; norms are always f32. ``progress(done, total)`` counts bytes
    written. ``ignore``: patterns, such as "*.sinks", of tensors and keys of config.json that may stay unused. Raises
    LoadError (UnsupportedModel for what is neither used, harmless nor ignored), ConfigError, and WriteError where
    ``output`` cannot be written or is one of the files read. Whatever is raised, a file that was at ``output`` is as it
    was.
    """
    if not isinstance(type, str) or type not in WRITABLE_TYPES:
        raise ConfigError(f"type is {shown(type)}; valid types are {', '.join(WRITABLE_TYPES)}")
    source, output = a_path(source, "source"), a_path(output, "output")
    a_function(progress, "progress")
    with GGUFFile.open(target) as target_file:
        config = _read_config(source)
        weights = _weight_files(source)
        tensors = _open_all(weights)
        patterns = check_patterns(ignore, source, (*config.values, *tensors))
        metadata = _metadata(config, source) | _tokenizer(target_file, config)
        config.refuse_unread(patterns)
        named = _named(tensors, config, source, patterns)
        sources = [_source(name, tensor, WRITABLE_TYPES[type]) for name, tensor in named]
        inputs = (*target_file.paths, config.path, *weights)
        return write_gguf(output, metadata, _counted(sources, progress), inputs)


# --- configuration ----------------------------------------------------------------------------------------------------


class _Config:
    """config.json with checked access, which notes what was read.

    Names in an object within have its name before theirs: ``dflash_config.mask_token_id``. Where a value may stand in
    ``dflash_config`` or outside, both places count and must agree. null counts as missing.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        inner = {
            f"{key}.{name}": v for key, value in values.items() if isinstance(value, dict) for name, v in value.items()
        }
        outer = {key: value for key, value in values.items() if not isinstance(value, dict)}
        self.values = {key: value for key, value in (outer | inner).items() if value is not None}
        self._read: set[str] = set()

    def get(self, key: str, kind: type[T], default: D, *others: str) -> T | D:
        """The value of ``key``, or of the ``others`` that mean the same; BadMetadata for one of another type or two
        that differ."""
        names = [name for one in (key, *others) for name in (f"dflash_config.{one}", one)]
        found = {name: self._typed(name, kind) for name in names if name in self.values}
        self._read.update(found)
        for name, value in found.items():
            first, wanted = next(iter(found.items()))
            if value != wanted:
                raise BadMetadata(f"{self.path}: {first!r} is {wanted!r}, {name!r} {value!r}; correct one")
        return next(iter(found.values()), default)

    def need(self, key: str, kind: type[T], *others: str) -> T:
        value = self.get(key, kind, None, *others)
        if value is None:
            raise BadMetadata(
                f"{self.path}: {key!r} is needed as {kind.__name__} and is missing; is this a DFlash draft?"
            )
        return value

    def integers(self, key: str) -> list[int]:
        values = self.need(key, list)
        if not all(type(value) is int for value in values):
            raise BadMetadata(f"{self.path}: {key!r} is {values!r:.80}; it must list integers")
        return values

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self.values[name]
        if kind is float and type(value) is int and abs(value) < 1 << 63:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise BadMetadata(f"{self.path}: {name!r} is needed as {kind.__name__} and is {value!r:.80}")
        return value

    def refuse_unread(self, ignore: Sequence[str]) -> None:
        """UnsupportedModel for a value that was not read, may change what the draft computes and is not ignored."""

        def is_harmless(name: str) -> bool:
            value, neutral = self.values[name], _NEUTRAL.get(name.removeprefix("dflash_config."), ())
            return _HARMLESS(name) or (not isinstance(value, list) and value in neutral)

        unread = (name for name in self.values if name not in self._read and not is_harmless(name))
        refuse_unread(self.path, "DFlash", unread, ignore, lambda name: f"{name!r} ({self.values[name]!r:.40})")


def _read_config(folder: Path) -> _Config:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: cannot be read: {error}; download the whole folder of the draft") from error
    if not isinstance(values, dict):
        raise LoadError(f"{path}: does not hold a JSON object; download the whole folder of the draft")
    return _Config(path, values)


def _metadata(config: _Config, folder: Path) -> dict[str, Any]:
    """The ``dflash.*`` keys of llama.cpp's layout, which counts tapped layers from 1."""
    layers = config.need("num_hidden_layers", int)
    heads, hidden = config.need("num_attention_heads", int), config.need("hidden_size", int)
    size = config.get("head_dim", int, 0) or hidden // max(heads, 1)
    keys: dict[str, Any] = {
        "block_count": layers,
        "context_length": config.get("max_position_embeddings", int, 0),
        "embedding_length": hidden,
        "feed_forward_length": config.need("intermediate_size", int),
        "attention.head_count": heads,
        "attention.head_count_kv": config.need("num_key_value_heads", int),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": config.need("rms_norm_eps", float),
        "block_size": config.need("block_size", int),
        "target_layers": [layer + 1 for layer in config.integers("target_layer_ids")],
        **_rope(config, size),
        **_windows(config, layers),
    }
    causal = config.get("causal", bool, None)
    causal = config.get("is_causal", bool, causal)
    if causal is not None:
        keys["attention.causal"] = causal
    _check_values(config, keys)
    return {
        "general.architecture": "dflash",
        "general.name": folder.resolve().name,
        "general.quantization_version": 2,
        **{f"dflash.{key}": value for key, value in keys.items()},
    }


# Members of rope_parameters and their keys here.
_YARN = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def _rope(config: _Config, head_size: int) -> dict[str, Any]:
    """The ``rope.*`` keys, as llama.cpp's converter writes them. BadMetadata for a scaling that they do not express."""

    def places(name: str) -> list[str]:
        return [f"rope_{place}.{name}" for place in _ROPE]

    def member(name: str, kind: type[T]) -> T | None:
        first, second = places(name)
        return config.get(first, kind, None, second)

    keys: dict[str, Any] = {"rope.freq_base": config.need("rope_theta", float, *places("rope_theta"))}
    part = config.get("partial_rotary_factor", float, 1.0, *places("partial_rotary_factor"))
    if not 0 < part <= 1:
        raise BadMetadata(f"{config.path}: 'partial_rotary_factor' is {part:g}; it must lie in 0..1")
    if part < 1:
        keys["rope.dimension_count"] = int(head_size * part)
    kind = member("rope_type", str) or member("type", str) or "default"
    if kind not in ("default", "none", "linear", "yarn"):
        raise BadMetadata(f"{config.path}: RoPE is scaled by {kind!r}; default, linear and yarn are supported")
    if kind in ("linear", "yarn"):
        first, second = places("factor")
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": config.need(first, float, second)}
        if keys["rope.scaling.factor"] < 1:
            raise BadMetadata(f"{config.path}: RoPE's factor is {keys['rope.scaling.factor']:g}; it must be at least 1")
    if kind == "yarn":
        keys |= {f"rope.scaling.{_YARN[name]}": value for name in _YARN if (value := member(name, float)) is not None}
        original = member("original_max_position_embeddings", int)
        original = config.need("max_position_embeddings", int) if original is None else original
        keys["rope.scaling.original_context_length"] = original
    return keys


def _windows(config: _Config, layers: int) -> dict[str, Any]:
    """The keys of sliding windows; none for a draft of full attention."""
    kinds = config.get("layer_types", list, None)
    slides = config.get("use_sliding_window", bool, None)
    if kinds is None and slides:
        raise BadMetadata(f"{config.path}: 'use_sliding_window' is true, but no 'layer_types' says for which layers")
    kinds = ["full_attention"] * layers if kinds is None else kinds
    sliding = [kind == "sliding_attention" for kind in kinds]
    if len(kinds) != layers or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
        raise BadMetadata(f"{config.path}: 'layer_types' is {kinds!r} for {layers} layers; sliding and full are known")
    if any(sliding) and slides is False:
        raise BadMetadata(f"{config.path}: 'use_sliding_window' is false, but 'layer_types' has sliding layers")
    if not any(sliding):
        return {}
    window = config.need("sliding_window", int)
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": sliding}


def _check_values(config: _Config, keys: Mapping[str, Any]) -> None:
    """BadMetadata for a number that a GGUF file of this layout cannot hold."""
    for key, value in keys.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(n, float | str) or 0 <= n < 1 << 31 for n in numbers):
            raise BadMetadata(
                f"{config.path}: what becomes {key!r} is {value!r:.80}; it must lie in 0..{(1 << 31) - 1}"
            )


def _tokenizer(target: GGUFFile, config: _Config) -> dict[str, Any]:
    """The target's tokenizer keys, and the draft's mask token. DraftMismatch where the two do not fit."""
    architecture = target.require("general.architecture", str)
    tokens = target.metadata.count("tokenizer.ggml.tokens")
    pairs = {
        "hidden_size": target.get(f"{architecture}.embedding_length", int),
        "vocab_size": tokens,
        "draft_vocab_size": tokens,
    }
    for key, there in pairs.items():
        here = config.get(key, int, None)
        if here is not None and there is not None and here != there:
            raise DraftMismatch(f"{config.path}: {key} is {here}, that of {target.path} is {there}; they do not match")
    layers = config.get("num_target_layers", int, None)
    blocks = target.get(f"{architecture}.block_count", int, layers)
    predicted = target.get(f"{architecture}.nextn_predict_layers", int, 0)  # blocks that count as layers in some files
    if layers is not None and layers not in (blocks, (blocks or 0) - predicted):
        raise DraftMismatch(f"{config.path}: num_target_layers is {layers}; {target.path} has {blocks} blocks")
    mask = config.need("mask_token_id", int)
    if not 0 <= mask < (tokens or 1 << 31):
        raise DraftMismatch(f"{config.path}: mask_token_id is {mask}; {target.path} has {tokens} tokens")
    keys = {key: target.metadata[key] for key in target.metadata if key.startswith("tokenizer.")}
    return keys | {"tokenizer.ggml.mask_token_id": mask}


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file, mapped. ``dtype``: the file's; F32, F16 and BF16 can be read."""

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
        return {name: _entry(entry, data) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LoadError(f"{damaged} ({error})") from error


def _entry(entry: Mapping[str, Any], data: npt.NDArray[np.uint8]) -> _Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    dtype = str(entry["dtype"])
    wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else end - start
    if not 0 <= start <= end <= len(data) or end - start != wanted:
        raise ValueError(f"a tensor of shape {shape} lies in bytes {start} to {end} of {len(data)}")
    return _Tensor(shape, dtype, data[start:end])


def _named(
    tensors: Mapping[str, _Tensor], config: _Config, folder: Path, ignore: Sequence[str]
) -> Iterator[tuple[str, _Tensor]]:
    """The GGUF name of each tensor with the tensor.

    Raises MissingTensor, LoadError for a type that cannot be read, UnsupportedModel for a tensor that a DFlash draft
    does not have and ``ignore`` does not let pass.
    """
    theirs = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    layers = config.need("num_hidden_layers", int)
    taken = set()
    for ours, name in _NAMES.items():
        for layer in range(layers if "{}" in ours else 1):
            wanted = name.format(layer)
            if wanted not in theirs:
                raise MissingTensor(f"{folder}: tensor {wanted!r} is missing; is this a DFlash draft, and complete?")
            if theirs[wanted].dtype not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise LoadError(f"{folder}: tensor {wanted!r} is {theirs[wanted].dtype}; {known} can be converted")
            taken.add(wanted)
            yield ours.format(layer), theirs[wanted]
    unread = (name for name in tensors if name.removeprefix("model.") not in taken and not _UNUSED(name))
    refuse_unread(folder, "DFlash", unread, ignore, lambda name: f"tensor {name!r}")


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
