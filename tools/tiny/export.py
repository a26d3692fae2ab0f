"""Write the trained pair as GGUF files and read the rounded weights back.

Each tensor of a file is described once, by an `Entry`: where it comes from, its name and type, and the transformation
between the two layouts with its inverse. Encoding writes the file; decoding its bytes gives the weights that the file
really holds, so that every stored reference output belongs to the shipped bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from pydflash.files import GGUFFile
from tools.synth.blocks import TYPES
from tools.synth.writer import Tensor, Value, write_gguf
from tools.tiny import kquants
from tools.tiny.draft import DraftConfig
from tools.tiny.vocabulary import CHAT_TEMPLATE, Vocabulary, build

Array = npt.NDArray[np.float32]
Transform = Callable[[Array], Array]

LICENSE = "PSF-2.0"  # the licence of the text the weights were made from
FILE_TYPE_Q4_K_M, FILE_TYPE_Q8_0 = 15, 7


def same(x: Array) -> Array:
    return x


@dataclass(frozen=True)
class Entry:
    """One tensor: parameter `source` of the PyTorch model is tensor `name` of type `kind` in the file."""

    source: str
    name: str
    kind: str = "F32"
    encode: Transform = same
    decode: Transform = same


# ------------------------------------------------------------------------------------------------- target layout
def plus_one(source: str, name: str) -> Entry:
    """Qwen3.5 norms store weight - 1; files store the weight."""
    return Entry(source, name, "F32", lambda x: x + 1, lambda x: x - 1)


def tiled(source: str, name: str, kind: str, order: npt.NDArray[np.int64], axis: int = 0) -> Entry:
    """V heads are grouped by K head in the model and tiled over the K heads in the file: reorder `axis`."""
    back = np.argsort(order)
    return Entry(source, name, kind, lambda x: x.take(order, axis), lambda x: x.take(back, axis))


def tiled_heads(config: Qwen3_5TextConfig, width: int, before: int = 0) -> npt.NDArray[np.int64]:
    """The file's order of `before` untouched indices followed by the V heads, `width` indices each."""
    k_heads, v_heads = config.linear_num_key_heads, config.linear_num_value_heads
    grouped = np.arange(v_heads * width).reshape(k_heads, v_heads // k_heads, width)
    return np.concatenate([np.arange(before), before + grouped.swapaxes(0, 1).ravel()])


def target_entries(config: Qwen3_5TextConfig) -> list[Entry]:
    """All tensors of the target with the types of the Q4_K_M recipe, a little richer where the budget allows."""
    entries = [
        Entry("model.embed_tokens.weight", "token_embd.weight", "Q4_K"),
        plus_one("model.norm.weight", "output_norm.weight"),
        Entry("lm_head.weight", "output.weight", "Q6_K"),
    ]
    layers = config.num_hidden_layers
    for n, layer_type in enumerate(config.layer_types or []):
        source, name = f"model.layers.{n}.", f"blk.{n}."
        entries += [
            plus_one(source + "input_layernorm.weight", name + "attn_norm.weight"),
            plus_one(source + "post_attention_layernorm.weight", name + "post_attention_norm.weight"),
        ]
        mixer = delta_net_entries if layer_type == "linear_attention" else attention_entries
        entries += mixer(config, source, name)
        more_bits = n < layers // 8 or n >= 7 * layers // 8 or (n - layers // 8) % 3 == 2
        entries += [
            Entry(source + "mlp.gate_proj.weight", name + "ffn_gate.weight", "Q4_K"),
            Entry(source + "mlp.up_proj.weight", name + "ffn_up.weight", "Q4_K"),
            Entry(source + "mlp.down_proj.weight", name + "ffn_down.weight", "Q6_K" if more_bits else "Q4_K"),
        ]
    return entries


def attention_entries(_config: Qwen3_5TextConfig, source: str, name: str) -> list[Entry]:
    source += "self_attn."
    return [
        Entry(source + "q_proj.weight", name + "attn_q.weight", "Q4_K"),
        Entry(source + "k_proj.weight", name + "attn_k.weight", "Q8_0"),
        Entry(source + "v_proj.weight", name + "attn_v.weight", "Q6_K"),
        Entry(source + "o_proj.weight", name + "attn_output.weight", "Q4_K"),
        plus_one(source + "q_norm.weight", name + "attn_q_norm.weight"),
        plus_one(source + "k_norm.weight", name + "attn_k_norm.weight"),
    ]


def delta_net_entries(config: Qwen3_5TextConfig, source: str, name: str) -> list[Entry]:
    source += "linear_attn."
    width = config.linear_value_head_dim
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim  # query and key channels keep their order
    channels, values = tiled_heads(config, width, before=keys), tiled_heads(config, width)
    heads = tiled_heads(config, 1)
    back = np.argsort(heads)
    return [
        tiled(source + "in_proj_qkv.weight", name + "attn_qkv.weight", "Q5_K", channels),
        tiled(source + "in_proj_z.weight", name + "attn_gate.weight", "Q4_K", values),
        tiled(source + "in_proj_b.weight", name + "ssm_beta.weight", "Q8_0", heads),
        tiled(source + "in_proj_a.weight", name + "ssm_alpha.weight", "Q8_0", heads),
        tiled(source + "out_proj.weight", name + "ssm_out.weight", "Q5_K", values, axis=1),
        tiled(source + "dt_bias", name + "ssm_dt.bias", "F32", heads),
        Entry(source + "A_log", name + "ssm_a", "F32", lambda x: -np.exp(x[heads]), lambda x: np.log(-x[back])),
        Entry(
            source + "conv1d.weight",
            name + "ssm_conv1d.weight",
            "F32",
            lambda x: x[:, 0].take(channels, 0),
            lambda x: x.take(np.argsort(channels), 0)[:, None],
        ),
        Entry(source + "norm.weight", name + "ssm_norm.weight"),
    ]


def target_metadata(config: Qwen3_5TextConfig, vocabulary: Vocabulary) -> dict[str, Value]:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    assert config.layer_types is not None
    keys: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.recurrent_layers": [t == "linear_attention" for t in config.layer_types],
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "vocab_size": config.vocab_size,
    }
    return {
        **general("qwen35", "pydflash tiny target", FILE_TYPE_Q4_K_M),
        **{f"qwen35.{key}": value for key, value in keys.items()},
        **tokenizer_metadata(vocabulary),
    }


# -------------------------------------------------------------------------------------------------- draft layout
def draft_entries(config: DraftConfig) -> list[Entry]:
    """All tensors of the draft, matrices as Q8_0; its embedding and head are the target's."""
    entries = [
        Entry("fc.weight", "fc.weight", "Q8_0"),
        Entry("hidden_norm.weight", "enc.output_norm.weight"),
        Entry("norm.weight", "output_norm.weight"),
    ]
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    for n in range(len(config.sliding)):
        for source, name in names.items():
            kind = "F32" if "norm" in name else "Q8_0"
            entries.append(Entry(f"layers.{n}.{source}.weight", f"blk.{n}.{name}.weight", kind))
    return entries


def draft_metadata(config: DraftConfig, vocabulary: Vocabulary, context_length: int) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "block_count": len(config.sliding),
        "context_length": context_length,
        "embedding_length": config.hidden,
        "feed_forward_length": config.feed_forward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.eps,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": list(config.sliding),
        "rope.freq_base": config.rope_theta,
        # Sections of a draft for an M-RoPE target: everything on the first axis, the same as plain RoPE.
        "rope.dimension_sections": [config.head_dim // 2, 0, 0, 0],
        "block_size": config.block,
        "target_layers": [layer + 1 for layer in config.target_layer_ids],  # files count the layer that reads the tap
    }
    return {
        **general("dflash", "pydflash tiny draft", FILE_TYPE_Q8_0),
        **{f"dflash.{key}": value for key, value in keys.items()},
        **tokenizer_metadata(vocabulary),
        "tokenizer.ggml.mask_token_id": config.mask_token_id,
    }


# -------------------------------------------------------------------------------------------------------- common
def general(architecture: str, name: str, file_type: int) -> dict[str, Value]:
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.license": LICENSE,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }


def tokenizer_metadata(vocabulary: Vocabulary) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.eos_token_id": vocabulary.id("<|endoftext|>"),
        "tokenizer.ggml.eot_token_id": vocabulary.id("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": vocabulary.id("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def chunks_of(raw: kquants.Bytes) -> Callable[[], list[memoryview]]:
    return lambda: [memoryview(np.ascontiguousarray(raw).reshape(-1))]


def load_rounded(model: nn.Module, entries: list[Entry], values: Callable[[Entry], Array]) -> None:
    """Load `values`, which has the shapes of the file, into the parameters of `model`."""
    rounded = {e.source: np.ascontiguousarray(e.decode(values(e)), dtype=np.float32) for e in entries}
    model.load_state_dict({source: torch.from_numpy(value) for source, value in rounded.items()})


def read_model(file: GGUFFile, model: nn.Module, entries: list[Entry]) -> None:
    """Load the weights of `file`, which `write_model` wrote, into `model`."""

    def values(entry: Entry) -> Array:
        info = file.tensors[entry.name]
        if info.type.name != entry.kind:
            raise ValueError(f"{file.path}: tensor {entry.name!r} is {info.type.name}, not {entry.kind}")
        return kquants.dequantize(file.data(entry.name).reshape(*info.shape[:-1], -1), entry.kind)

    load_rounded(model, entries, values)


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    return build(file.require("tokenizer.ggml.tokens", list), file.require("tokenizer.ggml.merges", list))


def write_model(path: Path, model: nn.Module, entries: list[Entry], metadata: dict[str, Value]) -> dict[str, object]:
    """Write `model` to `path` and load the rounded weights back into it. Returns size, tensor count and errors.

    `rounding` is the relative root-mean-square change of the matrices, per type. Raises ValueError if a parameter of
    the model has no entry.
    """
    state = {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}
    if missing := set(state) - {entry.source for entry in entries}:
        raise ValueError(f"no tensor of the file takes the parameters {sorted(missing)}")
    tensors, rounded = [], {}
    change: dict[str, list[float]] = {}
    for entry in entries:
        values = entry.encode(state[entry.source]).astype(np.float32)
        raw = kquants.quantize(values, entry.kind)
        back = kquants.dequantize(raw, entry.kind)
        error = np.linalg.norm(back - values) / (np.linalg.norm(values) + 1e-12)
        change.setdefault(entry.kind, []).append(float(error))
        rounded[entry.name] = back
        tensors.append(Tensor(entry.name, values.shape, TYPES[entry.kind.lower()], chunks_of(raw)))
    size = write_gguf(path, metadata, tensors)
    load_rounded(model, entries, lambda entry: rounded[entry.name])
    rounding = {kind: float(np.mean(values)) for kind, values in sorted(change.items())}
    return {"bytes": size, "tensors": len(tensors), "rounding": rounding}
