"""Which metadata and tensors a `qwen35` or `qwen35moe` target and a `dflash` draft consist of, for any geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .vocabulary import Vocabulary
from .writer import Value

MATRICES = ("matrix", "embedding", "output")  # kinds of tensors a quantiser may touch


@dataclass(frozen=True)
class Experts:
    """The feed-forward of a `qwen35moe` layer: `used` of `count` experts of width `ffn`, and a shared one.

    `fused`: gate and up matrices in one tensor. `gate_rank`: axes of the shared expert's gate, (hidden,) or
    (1, hidden); files have either.
    """

    count: int
    used: int
    ffn: int
    shared_ffn: int
    fused: bool = False
    gate_rank: int = 1


@dataclass(frozen=True)
class Geometry:
    """Shapes of a `qwen35` model, or with `experts` of a `qwen35moe` model, which has no `ffn`.

    Counts of heads and layers, widths in values, `context` in tokens.

    A layer is full attention when (layer + 1) % interval == 0; `recurrent`, one bool a layer, replaces that rule and is
    written as `attention.recurrent_layers`. `nextn` appends that many multi-token-prediction blocks, which the main
    model does not run.
    """

    hidden: int
    layers: int
    interval: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    k_heads: int
    v_heads: int
    state: int
    conv: int
    ffn: int
    vocab: int
    tied: bool = False
    theta: float = 1e7
    eps: float = 1e-6
    context: int = 4096
    recurrent: tuple[bool, ...] | None = None
    nextn: int = 0
    experts: Experts | None = None

    @property
    def architecture(self) -> str:
        return "qwen35moe" if self.experts else "qwen35"

    def is_recurrent(self, layer: int) -> bool:
        return self.recurrent[layer] if self.recurrent else (layer + 1) % self.interval != 0

    @property
    def value_dim(self) -> int:
        return self.v_heads * self.state

    @property
    def conv_channels(self) -> int:
        return 2 * self.k_heads * self.state + self.value_dim


@dataclass(frozen=True)
class DraftGeometry:
    """Shapes of a `dflash` draft. `taps` are HF layer ids (outputs of target layers, counted from 0), in order.

    `sliding` says for each layer whether it attends inside `window` tokens only; `causal` None leaves the key out.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    taps: tuple[int, ...]
    mask_token_id: int
    block_size: int = 16
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    causal: bool | None = None
    theta: float = 1e7
    eps: float = 1e-6
    context: int = 4096


class Slot(NamedTuple):
    """One tensor of a model: GGUF name, row-major shape, and what it is.

    `kind` is one of MATRICES, or "norm", "decay", "dt", "conv" or "router" for what is always F32.
    """

    name: str
    shape: tuple[int, ...]
    kind: str


def default_taps(layers: int, count: int) -> tuple[int, ...]:
    """The tapped layers DFlash chooses for a target of `layers` layers: `count` ids from 1 to layers - 3."""
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))


def target_metadata(g: Geometry, vocabulary: Vocabulary, name: str) -> dict[str, Value]:
    """All keys of a target's GGUF file."""
    half = g.rope_dim // 2
    sections = [half - half // 3 - (half - half // 3) // 2, (half - half // 3) // 2, half // 3, 0]
    keys: dict[str, Value] = {
        "block_count": g.layers + g.nextn,
        "context_length": g.context,
        "embedding_length": g.hidden,
        "attention.head_count": g.heads,
        "attention.head_count_kv": g.kv_heads,
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": float(g.eps),
        "rope.dimension_count": g.rope_dim,
        "rope.dimension_sections": sections,
        "rope.freq_base": float(g.theta),
        "full_attention_interval": g.interval,
        "ssm.conv_kernel": g.conv,
        "ssm.state_size": g.state,
        "ssm.group_count": g.k_heads,
        "ssm.time_step_rank": g.v_heads,
        "ssm.inner_size": g.value_dim,
    }
    if g.experts:
        keys |= {
            "expert_count": g.experts.count,
            "expert_used_count": g.experts.used,
            "expert_feed_forward_length": g.experts.ffn,
            "expert_shared_feed_forward_length": g.experts.shared_ffn,
        }
    else:
        keys["feed_forward_length"] = g.ffn
    if g.recurrent:
        keys["attention.recurrent_layers"] = [*g.recurrent, *[False] * g.nextn]
    if g.nextn:
        keys["nextn_predict_layers"] = g.nextn
    arch = g.architecture
    return _general(arch, name) | {f"{arch}.{key}": value for key, value in keys.items()} | vocabulary.metadata()


def target_tensors(g: Geometry) -> Iterator[Slot]:
    """All tensors of a target's GGUF file, in file order."""
    yield Slot("token_embd.weight", (g.vocab, g.hidden), "embedding")
    yield Slot("output_norm.weight", (g.hidden,), "norm")
    if not g.tied:
        yield Slot("output.weight", (g.vocab, g.hidden), "output")
    for layer in range(g.layers):
        mixer = _delta_net(g) if g.is_recurrent(layer) else _attention(g)
        for name, shape, kind in (*mixer, *_ffn(g)):
            yield Slot(f"blk.{layer}.{name}", shape, kind)
    for layer in range(g.layers, g.layers + g.nextn):
        for name, shape, kind in (*_attention(g), *_ffn(g), *_nextn(g)):
            yield Slot(f"blk.{layer}.{name}", shape, kind)


def _attention(g: Geometry) -> Iterator[Slot]:
    yield Slot("attn_norm.weight", (g.hidden,), "norm")
    yield Slot("attn_q.weight", (2 * g.heads * g.head_dim, g.hidden), "matrix")
    yield Slot("attn_k.weight", (g.kv_heads * g.head_dim, g.hidden), "matrix")
    yield Slot("attn_v.weight", (g.kv_heads * g.head_dim, g.hidden), "matrix")
    yield Slot("attn_q_norm.weight", (g.head_dim,), "norm")
    yield Slot("attn_k_norm.weight", (g.head_dim,), "norm")
    yield Slot("attn_output.weight", (g.hidden, g.heads * g.head_dim), "matrix")


def _delta_net(g: Geometry) -> Iterator[Slot]:
    yield Slot("attn_norm.weight", (g.hidden,), "norm")
    yield Slot("attn_qkv.weight", (g.conv_channels, g.hidden), "matrix")
    yield Slot("attn_gate.weight", (g.value_dim, g.hidden), "matrix")
    yield Slot("ssm_conv1d.weight", (g.conv_channels, g.conv), "conv")
    yield Slot("ssm_dt.bias", (g.v_heads,), "dt")
    yield Slot("ssm_a", (g.v_heads,), "decay")
    yield Slot("ssm_beta.weight", (g.v_heads, g.hidden), "matrix")
    yield Slot("ssm_alpha.weight", (g.v_heads, g.hidden), "matrix")
    yield Slot("ssm_norm.weight", (g.state,), "norm")
    yield Slot("ssm_out.weight", (g.hidden, g.value_dim), "matrix")


def _ffn(g: Geometry) -> Iterator[Slot]:
    yield Slot("post_attention_norm.weight", (g.hidden,), "norm")
    if g.experts:
        yield from _experts(g.hidden, g.experts)
        return
    yield Slot("ffn_gate.weight", (g.ffn, g.hidden), "matrix")
    yield Slot("ffn_up.weight", (g.ffn, g.hidden), "matrix")
    yield Slot("ffn_down.weight", (g.hidden, g.ffn), "matrix")


def _experts(hidden: int, e: Experts) -> Iterator[Slot]:
    yield Slot("ffn_gate_inp.weight", (e.count, hidden), "router")
    if e.fused:
        yield Slot("ffn_gate_up_exps.weight", (e.count, 2 * e.ffn, hidden), "matrix")
    else:
        yield Slot("ffn_gate_exps.weight", (e.count, e.ffn, hidden), "matrix")
        yield Slot("ffn_up_exps.weight", (e.count, e.ffn, hidden), "matrix")
    yield Slot("ffn_down_exps.weight", (e.count, hidden, e.ffn), "matrix")
    yield Slot("ffn_gate_inp_shexp.weight", (1, hidden)[-e.gate_rank :], "router")
    yield Slot("ffn_gate_shexp.weight", (e.shared_ffn, hidden), "matrix")
    yield Slot("ffn_up_shexp.weight", (e.shared_ffn, hidden), "matrix")
    yield Slot("ffn_down_shexp.weight", (hidden, e.shared_ffn), "matrix")


def _nextn(g: Geometry) -> Iterator[Slot]:
    yield Slot("nextn.eh_proj.weight", (g.hidden, 2 * g.hidden), "matrix")
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        yield Slot(f"nextn.{norm}.weight", (g.hidden,), "norm")


def draft_metadata(d: DraftGeometry, vocabulary: Vocabulary, name: str, layout: str = "llama.cpp") -> dict[str, Value]:
    """All keys of a draft file: `layout` "llama.cpp" (architecture `dflash`) or "fork" (`qwen35-dflash-draft`).

    They count tapped layers differently: llama.cpp stores the layer whose input is tapped (HF id + 1), forks the HF id.
    """
    keys: dict[str, Value] = {
        "block_count": d.layers,
        "context_length": d.context,
        "embedding_length": d.hidden,
        "feed_forward_length": d.ffn,
        "attention.head_count": d.heads,
        "attention.head_count_kv": d.kv_heads,
        "attention.key_length": d.head_dim,
        "attention.value_length": d.head_dim,
        "attention.layer_norm_rms_epsilon": float(d.eps),
        "rope.freq_base": float(d.theta),
    }
    if d.window is not None:
        keys["attention.sliding_window"] = d.window
        keys["attention.sliding_window_pattern"] = list(d.sliding)
    if d.causal is not None:
        keys["attention.causal"] = d.causal
    if layout == "llama.cpp":
        arch = "dflash"
        keys |= {"block_size": d.block_size, "target_layers": [tap + 1 for tap in d.taps]}
        keys["rope.dimension_sections"] = [d.head_dim // 2, 0, 0, 0]
        tokenizer: dict[str, Value] = vocabulary.metadata() | {"tokenizer.ggml.mask_token_id": d.mask_token_id}
    elif layout == "fork":
        arch = "qwen35-dflash-draft"
        keys |= {
            "dflash.block_size": d.block_size,
            "dflash.n_target_layers": len(d.taps),
            "dflash.target_layer_ids": list(d.taps),
            "dflash.mask_token_id": d.mask_token_id,
        }
        tokenizer = {}
    else:
        raise ValueError(f'layout is "llama.cpp" or "fork", not {layout!r}')
    return _general(arch, name) | {f"{arch}.{key}": value for key, value in keys.items()} | tokenizer


def draft_tensors(d: DraftGeometry, layout: str = "llama.cpp") -> Iterator[Slot]:
    """All tensors of a draft file, in file order: 11 for each layer and 3 of the whole."""
    fc, hidden_norm = {
        "llama.cpp": ("fc.weight", "enc.output_norm.weight"),
        "fork": ("dflash.fc.weight", "dflash.hidden_norm.weight"),
    }[layout]
    yield Slot(fc, (d.hidden, len(d.taps) * d.hidden), "matrix")
    yield Slot(hidden_norm, (d.hidden,), "norm")
    yield Slot("output_norm.weight", (d.hidden,), "norm")
    for layer in range(d.layers):
        for name, shape, kind in _draft_layer(d):
            yield Slot(f"blk.{layer}.{name}", shape, kind)


def _draft_layer(d: DraftGeometry) -> Iterator[Slot]:
    yield Slot("attn_norm.weight", (d.hidden,), "norm")
    yield Slot("attn_q.weight", (d.heads * d.head_dim, d.hidden), "matrix")
    yield Slot("attn_k.weight", (d.kv_heads * d.head_dim, d.hidden), "matrix")
    yield Slot("attn_v.weight", (d.kv_heads * d.head_dim, d.hidden), "matrix")
    yield Slot("attn_q_norm.weight", (d.head_dim,), "norm")
    yield Slot("attn_k_norm.weight", (d.head_dim,), "norm")
    yield Slot("attn_output.weight", (d.hidden, d.heads * d.head_dim), "matrix")
    yield Slot("ffn_norm.weight", (d.hidden,), "norm")
    yield Slot("ffn_gate.weight", (d.ffn, d.hidden), "matrix")
    yield Slot("ffn_up.weight", (d.ffn, d.hidden), "matrix")
    yield Slot("ffn_down.weight", (d.hidden, d.ffn), "matrix")


def _general(arch: str, name: str) -> dict[str, Value]:
    return {"general.architecture": arch, "general.name": name, "general.quantization_version": 2}


def type_of(slot: Slot, mix: str, layers: int, tied: bool = False) -> str:
    """The tensor type of `slot` under a mix: a plain type name for all matrices, or "q4_k_m".

    "q4_k_m" follows the recipe of llama.cpp's published files (llama-quant.cpp): LM head Q6_K, attn_v and ffn_down
    Q6_K in the layers that get more bits, attn_qkv Q5_K, Q4_K elsewhere. Everything that is not a matrix stays F32.
    """
    if slot.kind not in MATRICES:
        return "f32"
    if mix != "q4_k_m":
        return mix
    if slot.kind == "output" or (slot.kind == "embedding" and tied):
        return "q6_k"
    _, _, rest = slot.name.partition("blk.")
    layer, _, tensor = rest.partition(".")
    if tensor in ("attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight"):
        return "q6_k" if _more_bits(int(layer), layers) else "q4_k"
    return "q5_k" if tensor == "attn_qkv.weight" else "q4_k"


def _more_bits(layer: int, layers: int) -> bool:
    # The first and the last eighth, and every third layer between.
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def plain_values(slot: Slot, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Random values of a tensor that is not a matrix, as a freshly initialised Qwen3.5 has them."""
    if slot.kind == "norm":
        values = 1 + 0.2 * rng.standard_normal(slot.shape)
    elif slot.kind == "decay":
        # -exp(A_log), log-uniform over the range of the initialisation: heads that forget at once, heads that do not.
        values = -np.exp(rng.uniform(np.log(0.01), np.log(16), slot.shape))
    elif slot.kind == "dt":
        values = 1 + 0.5 * rng.standard_normal(slot.shape)
    elif slot.kind == "router":
        # Logits that spread by about 2: the selected experts weigh differently.
        values = 2 * rng.standard_normal(slot.shape) / np.sqrt(slot.shape[-1])
    else:
        # Wide enough for SiLU to act as a rectifier, so that queries and keys point into the same half of space.
        # Were their product near zero, the norm that follows would magnify every rounding error.
        values = rng.uniform(-2, 2, slot.shape)
    return values.astype(np.float32)
