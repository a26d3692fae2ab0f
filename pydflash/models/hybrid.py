"""What the hybrids of Qwen3.5/3.6 share: gated delta-net layers with a gated full-attention layer every few.

T rows of a step; H, Hkv, D query heads, key/value heads and their size; Hk, Hv, S key heads, value heads and state size
of the delta-net. Sources: Gated Delta Networks (Yang et al. 2024), Gated Attention (Qiu et al. 2025), Qwen3.5's
reference code.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from pydflash import ops
from pydflash.errors import BadMetadata
from pydflash.files import GGUFFile
from pydflash.limits import MAX_TAPS
from pydflash.models.accounting import mtp_blocks
from pydflash.models.keys import Keys
from pydflash.models.rope import read_rope
from pydflash.models.weights import Weights
from pydflash.native import Shape, Tensor
from pydflash.ops import NormRope, Rope
from pydflash.state import Batch, CacheFormat, DeltaSpec, DeltaState, KVCache, KVSpec, LayerSpec, LayerState

__all__ = ["Hybrid", "HybridConfig"]

_BIAS = re.compile(r"blk\.\d+\.attn_[qkv]\.bias")
_LAYER_KINDS = ("full_attention_interval", "attention.recurrent_layers")

C = TypeVar("C", bound="HybridConfig")


@dataclass(frozen=True)
class HybridConfig(ABC):
    """Hyperparameters, named after their GGUF keys' meaning. A subclass adds those of its feed-forward.

    ``biases``: Q, K and V have biases, in every attention layer; a file with only some of them is incomplete.
    """

    architecture: ClassVar[str]

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int
    rope: Rope
    eps: float
    k_heads: int
    v_heads: int
    state_size: int
    conv_kernel: int
    context: int
    tied: bool
    biases: bool
    recurrent: tuple[bool, ...] = field(repr=False)

    @classmethod
    def read(cls: type[C], file: GGUFFile) -> C:
        """From a file's metadata. Raises BadMetadata."""
        keys = Keys(file, cls.architecture)
        layers, head_size = _layers(keys), keys.number("attention.key_length")
        recurrent = _recurrent_layers(keys, layers)
        attention = [layer for layer in range(layers) if not recurrent[layer]]
        embedding = file.tensors.get("token_embd.weight")
        common: dict[str, Any] = {
            "layers": layers,
            "hidden": keys.number("embedding_length"),
            "vocab": embedding.shape[0] if embedding else 0,
            "heads": keys.number_of(attention, "attention.head_count"),
            "kv_heads": keys.number_of(attention, "attention.head_count_kv"),
            "head_size": head_size,
            "rope": read_rope(file, keys.prefix, keys.number("rope.dimension_count"), head_size),
            "eps": keys.real("attention.layer_norm_rms_epsilon"),
            "k_heads": keys.number("ssm.group_count"),
            "v_heads": keys.number("ssm.time_step_rank"),
            "state_size": keys.number("ssm.state_size"),
            "conv_kernel": keys.number("ssm.conv_kernel", 2),
            "context": file.require_within(f"{cls.architecture}.context_length", 0, 1 << 40, default=0),
            "tied": "output.weight" not in file.tensors,
            "biases": any(_BIAS.fullmatch(name) for name in file.tensors),
            "recurrent": recurrent,
        }
        config = cls(**common, **cls._read_feed_forward(keys, layers))
        config._check(keys)
        return config

    @classmethod
    @abstractmethod
    def _read_feed_forward(cls, keys: Keys, layers: int) -> Mapping[str, Any]:
        """The subclass's own fields."""

    @abstractmethod
    def _feed_forward_tensors(self, layer: int) -> Mapping[str, Shape]:
        """Of ``layer``: name after ``blk.N.`` to shape."""

    def _check(self, keys: Keys) -> None:
        file, prefix = keys.file, keys.prefix
        inner = int(file.require(f"{prefix}ssm.inner_size", int))
        values = keys.number("attention.value_length", default=self.head_size)
        tiled = file.get(f"{prefix}ssm.v_head_reordered", bool, default=True)
        rows = file.get(f"{prefix}vocab_size", int, default=self.vocab)
        rules = {
            "attention.head_count": (
                self.heads % self.kv_heads == 0,
                f"{self.heads} heads over {self.kv_heads} K/V heads",
            ),
            "attention.value_length": (
                values == self.head_size,
                f"differs from key_length {self.head_size}",
            ),
            "attention.key_length": (
                self.head_size in (64, 128, 256),
                f"{self.head_size}; 64, 128 and 256 are supported",
            ),
            "ssm.v_head_reordered": (
                tiled or self.v_heads == self.k_heads,
                "false: value heads in the order of the original model; convert it with llama.cpp",
            ),
            "vocab_size": (rows == self.vocab, f"{rows}; token_embd.weight has {self.vocab} rows"),
            "ssm.time_step_rank": (
                self.v_heads % self.k_heads == 0,
                f"{self.v_heads} value heads over {self.k_heads} key heads",
            ),
            "ssm.inner_size": (
                inner == self.v_heads * self.state_size,
                f"{inner}, not {self.v_heads} heads of {self.state_size}",
            ),
            "ssm.state_size": (
                self.state_size in (32, 64, 128, 256),
                f"{self.state_size}; 32, 64, 128 and 256 are supported",
            ),
            "ssm.conv_kernel": (self.conv_kernel <= MAX_TAPS, f"{self.conv_kernel}; at most {MAX_TAPS}"),
            "attention.layer_norm_rms_epsilon": (0.0 < self.eps < 1.0, f"{self.eps}"),
        }
        for key, (holds, found) in rules.items():
            if not holds:
                raise BadMetadata(f"{file.path}: {prefix}{key}: {found}")
        keys.check_sections(self.rope.dims // 2, interleaved=True)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, recurrent in enumerate(self.recurrent) if not recurrent)

    @property
    def delta_layers(self) -> tuple[int, ...]:
        return tuple(i for i, recurrent in enumerate(self.recurrent) if recurrent)

    def tensors(self) -> dict[str, Shape]:
        """Every tensor that the forward pass reads: GGUF name to row-major shape."""
        c, kv, inner = self.hidden, self.kv_heads * self.head_size, self.v_heads * self.state_size
        channels = 2 * self.k_heads * self.state_size + inner
        shapes: dict[str, Shape] = {"token_embd.weight": (self.vocab, c), "output_norm.weight": (c,)}
        if not self.tied:
            shapes["output.weight"] = (self.vocab, c)
        for i, recurrent in enumerate(self.recurrent):
            block: dict[str, Shape] = {
                "attn_norm.weight": (c,), "post_attention_norm.weight": (c,), **self._feed_forward_tensors(i),
            }  # fmt: skip
            if recurrent:
                block |= {
                    "attn_qkv.weight": (channels, c), "attn_gate.weight": (inner, c),
                    "ssm_conv1d.weight": (channels, self.conv_kernel),
                    "ssm_alpha.weight": (self.v_heads, c), "ssm_beta.weight": (self.v_heads, c),
                    "ssm_a": (self.v_heads,), "ssm_dt.bias": (self.v_heads,), "ssm_norm.weight": (self.state_size,),
                    "ssm_out.weight": (c, inner),
                }  # fmt: skip
            else:
                q = self.heads * self.head_size
                block |= {
                    "attn_q.weight": (2 * q, c), "attn_k.weight": (kv, c), "attn_v.weight": (kv, c),
                    "attn_output.weight": (c, q),
                    "attn_q_norm.weight": (self.head_size,), "attn_k_norm.weight": (self.head_size,),
                }  # fmt: skip
                if self.biases:
                    block |= {"attn_q.bias": (2 * q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
            shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        return shapes


def _layers(keys: Keys) -> int:
    """Blocks but for those of multi-token prediction (MTP), which come last, are not run and may be missing."""
    file, held, key = keys.file, len(keys.file.tensors), f"{keys.prefix}nextn_predict_layers"
    blocks = file.require_within(f"{keys.prefix}block_count", 1, held, because=f"the file holds {held} tensors")
    predicting = mtp_blocks(file)
    if key in file.metadata:
        layers = blocks - file.require_within(key, 0, blocks - 1, because=f"of {blocks} blocks")
    else:
        layers = next((n for n in range(blocks, 1, -1) if n - 1 not in predicting), 1)
    for block in range(layers, blocks):
        if f"blk.{block}.attn_norm.weight" in file.tensors and block not in predicting:
            raise BadMetadata(
                f"{file.path}: {key} is {blocks - layers} of {blocks} blocks, but block {block} has no nextn tensors: "
                "it is a layer like the others; convert the model again"
            )
    return layers


def _recurrent_layers(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers are delta-net layers: an explicit list, or all but every ``full_attention_interval``-th.

    Ollama's list of K/V heads says it too, by zeros; BadMetadata where the two differ.
    """
    path, prefix, heads = keys.file.path, keys.prefix, "attention.head_count_kv"
    interval = keys.number("full_attention_interval", default=4)  # read even where a list takes its place
    recurrent = [(i + 1) % interval != 0 for i in range(layers)]
    if f"{prefix}attention.recurrent_layers" in keys.file.metadata:
        recurrent = [bool(flag) for flag in keys.listed("attention.recurrent_layers")[:layers]]
    if keys.is_listed(heads) and 0 in (counts := keys.listed(heads)[:layers]):
        without = [count == 0 for count in counts]
        if without != recurrent and any(f"{prefix}{key}" in keys.file.metadata for key in _LAYER_KINDS):
            raise BadMetadata(f"{path}: the zeros of {prefix}{heads} differ from what {' or '.join(_LAYER_KINDS)} says")
        recurrent = without
    if len(recurrent) < layers:
        raise BadMetadata(f"{path}: {prefix}attention.recurrent_layers lists {len(recurrent)} of {layers} layers")
    return tuple(recurrent)


class GatedAttention:
    """Full attention with q/k norm, partial RoPE and an output gate."""

    def __init__(self, weights: Weights, layer: int, config: HybridConfig) -> None:
        def norm_rope(name: str) -> NormRope:
            return NormRope(weights[f"{block}.{name}.weight"], config.eps, config.rope)

        block = f"blk.{layer}"
        self.config = config
        self.attn_q, self.attn_k = weights.linear(f"{block}.attn_q"), weights.linear(f"{block}.attn_k")
        self.attn_v, self.attn_output = weights.linear(f"{block}.attn_v"), weights.linear(f"{block}.attn_output")
        self.attn_q_norm, self.attn_k_norm = norm_rope("attn_q_norm"), norm_rope("attn_k_norm")

    def remembers(self, cache: CacheFormat) -> KVSpec:
        c = self.config
        return KVSpec(*cache, c.rope, c.kv_heads, c.head_size)

    def __call__(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        c, T = self.config, x.shape[0]
        H, Hkv, D = c.heads, c.kv_heads, c.head_size
        q, gate = self.attn_q(x).reshape(T, H, 2 * D).split([D, D])  # (T, H, D) each
        k = self.attn_k(x).reshape(T, Hkv, D)
        v = self.attn_v(x).reshape(T, Hkv, D)
        o = cache.attend(q, k, v, self.attn_q_norm, self.attn_k_norm, batch)  # (T, H, D)
        return self.attn_output(ops.sigmoid_gate(o, gate).reshape(T, H * D))


class GatedDeltaNet:
    """Linear attention with a state that is decayed, corrected and read at every token."""

    def __init__(self, weights: Weights, layer: int, config: HybridConfig) -> None:
        block = f"blk.{layer}"
        self.config = config
        self.attn_qkv, self.attn_gate = weights.linear(f"{block}.attn_qkv"), weights.linear(f"{block}.attn_gate")
        self.ssm_alpha, self.ssm_beta = weights.linear(f"{block}.ssm_alpha"), weights.linear(f"{block}.ssm_beta")
        self.ssm_conv1d, self.ssm_norm = weights[f"{block}.ssm_conv1d.weight"], weights[f"{block}.ssm_norm.weight"]
        self.ssm_a, self.ssm_dt = weights[f"{block}.ssm_a"], weights[f"{block}.ssm_dt.bias"]
        self.ssm_out = weights.linear(f"{block}.ssm_out")

    def remembers(self, _cache: CacheFormat) -> DeltaSpec:
        c = self.config
        return DeltaSpec(c.k_heads, c.v_heads, c.state_size, c.conv_kernel)

    def __call__(self, x: Tensor, batch: Batch, state: DeltaState) -> Tensor:
        c, T = self.config, x.shape[0]
        Hv, S = c.v_heads, c.state_size
        qkv, z, alpha, beta = self.attn_qkv(x), self.attn_gate(x), self.ssm_alpha(x), self.ssm_beta(x)
        windows, states = state.tensors["window"], state.tensors["state"]
        who = (batch.counts, batch.state_slots)
        inputs = ops.delta_inputs(
            qkv, alpha, beta, self.ssm_conv1d, self.ssm_a, self.ssm_dt, windows, *who, keep=batch.keep
        )  # (16 N + T, q | k | v | g | beta) of N sequences
        o = ops.delta_rule(inputs, states, *who, k_heads=c.k_heads, eps=c.eps, keep=batch.keep)
        o = ops.gated_rms_norm(o.reshape(T, Hv, S), z.reshape(T, Hv, S), self.ssm_norm, c.eps)
        return self.ssm_out(o.reshape(T, Hv * S))


class Block:
    """``x += mixer(norm(x)); x += feed_forward(norm(x))``."""

    def __init__(
        self, weights: Weights, layer: int, config: HybridConfig, feed_forward: Callable[[Tensor], Tensor]
    ) -> None:
        block = f"blk.{layer}"
        self.eps = config.eps
        self.mixer = (GatedDeltaNet if config.recurrent[layer] else GatedAttention)(weights, layer, config)
        self.attn_norm = weights[f"{block}.attn_norm.weight"]
        self.post_attention_norm = weights[f"{block}.post_attention_norm.weight"]
        self.feed_forward = feed_forward

    def __call__(self, x: Tensor, batch: Batch, state: LayerState) -> Tensor:
        mixer = cast("Callable[[Tensor, Batch, LayerState], Tensor]", self.mixer)  # the state is what it asked for
        x = x + mixer(ops.rms_norm(x, self.attn_norm, self.eps), batch, state)
        return x + self.feed_forward(ops.rms_norm(x, self.post_attention_norm, self.eps))


class Hybrid(ABC):
    """The forward pass. It holds weights only; everything that changes is passed in."""

    def __init__(self, config: HybridConfig, weights: Weights) -> None:
        self.config = config
        self.token_embd = weights["token_embd.weight"]
        self.blocks = [Block(weights, i, config, self.feed_forward(weights, i)) for i in range(config.layers)]
        self.output_norm = weights["output_norm.weight"]
        self.output = weights.linear("token_embd" if config.tied else "output")

    @abstractmethod
    def feed_forward(self, weights: Weights, layer: int) -> Callable[[Tensor], Tensor]:
        """(T, hidden), normalised, to (T, hidden)."""

    def remembers(self, cache: CacheFormat) -> tuple[LayerSpec, ...]:
        """What each layer keeps of a sequence."""
        return tuple(block.mixer.remembers(cache) for block in self.blocks)

    def forward(
        self, tokens: Tensor, batch: Batch, states: Sequence[LayerState], capture: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """(T,) int32 to the residual stream after the last layer, (T, hidden), and after each layer in ``capture``."""
        x = ops.get_rows(self.token_embd, tokens)
        captured: dict[int, Tensor] = {}
        for layer, (block, state) in enumerate(zip(self.blocks, states)):
            x = batch.graph.effect(block(x, batch, state))  # ggml walks back recursively, so no further than this
            captured[layer] = x
        return x, [captured[layer] for layer in capture]

    def head(self, x: Tensor) -> Tensor:
        """(T, hidden) residual stream to (T, vocab) logits."""
        return self.output(ops.rms_norm(x, self.output_norm, self.config.eps))
