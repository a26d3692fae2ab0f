"""Qwen3.5/3.6 (GGUF architecture ``qwen35``): gated delta-net layers with a gated full-attention layer every few.

T rows of a step; H, Hkv, D query heads, key/value heads and their size; Hk, Hv, S key heads, value heads and state size
of the delta-net. Sources: Gated Delta Networks (Yang et al. 2024), Gated Attention (Qiu et al. 2025), Qwen3.5's
reference code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydflash import ops
from pydflash.errors import BadMetadata, UnsupportedArchitecture
from pydflash.gguf import GGUFFile
from pydflash.limits import MAX_TAPS
from pydflash.ops import NormRope
from pydflash.state import DeltaState, KVCache, StepInputs
from pydflash.tensor import Shape, Tensor
from pydflash.weights import Weights

__all__ = ["Config", "Qwen35"]

_LIMIT = 1 << 20  # no count or size in a real file comes near; products of two stay far below 2^63


@dataclass(frozen=True)
class Config:
    """Hyperparameters, named after their GGUF keys' meaning."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int
    rope_dims: int
    rope_base: float
    eps: float
    k_heads: int
    v_heads: int
    state_size: int
    conv_kernel: int
    context: int
    tied: bool
    recurrent: tuple[bool, ...] = field(repr=False)

    @classmethod
    def read(cls, file: GGUFFile) -> Config:
        """From a file's metadata. Raises UnsupportedArchitecture or BadMetadata."""
        architecture = file.require("general.architecture", str)
        if architecture != "qwen35":
            raise UnsupportedArchitecture(f"{file.path}: architecture {architecture!r}; this package runs 'qwen35'")

        def number(key: str, at_least: int = 1) -> int:
            return file.require_within(f"qwen35.{key}", at_least, _LIMIT)

        layers = _layers(file)
        embedding = file.tensors.get("token_embd.weight")
        config = cls(
            layers=layers,
            hidden=number("embedding_length"),
            ffn=number("feed_forward_length"),
            vocab=embedding.shape[0] if embedding else 0,
            heads=number("attention.head_count"),
            kv_heads=number("attention.head_count_kv"),
            head_size=number("attention.key_length"),
            rope_dims=number("rope.dimension_count"),
            rope_base=float(file.require("qwen35.rope.freq_base", float)),
            eps=float(file.require("qwen35.attention.layer_norm_rms_epsilon", float)),
            k_heads=number("ssm.group_count"),
            v_heads=number("ssm.time_step_rank"),
            state_size=number("ssm.state_size"),
            conv_kernel=number("ssm.conv_kernel", 2),
            context=int(file.get("qwen35.context_length", int, default=0)),
            tied="output.weight" not in file.tensors,
            recurrent=_recurrent_layers(file, layers),
        )
        config._check(file)
        return config

    def _check(self, file: GGUFFile) -> None:
        inner = int(file.require("qwen35.ssm.inner_size", int))
        sections = file.get("qwen35.rope.dimension_sections", list, default=None)
        rules = {
            "attention.head_count": (
                self.heads % self.kv_heads == 0,
                f"{self.heads} heads over {self.kv_heads} K/V heads",
            ),
            "attention.value_length": (
                int(file.get("qwen35.attention.value_length", int, default=self.head_size)) == self.head_size,
                f"differs from key_length {self.head_size}",
            ),
            "attention.key_length": (
                self.head_size in (64, 128, 256),
                f"{self.head_size}; 64, 128 and 256 are supported",
            ),
            "rope.dimension_count": (
                self.rope_dims <= self.head_size and self.rope_dims % 2 == 0,
                f"{self.rope_dims} for heads of {self.head_size}",
            ),
            "rope.dimension_sections": (
                sections is None or 2 * sum(int(s) for s in sections) <= self.rope_dims,
                f"{sections} cover more than {self.rope_dims // 2} pairs",
            ),
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
            "rope.freq_base": (1.0 <= self.rope_base < 1e12, f"{self.rope_base}"),
            "attention.layer_norm_rms_epsilon": (0.0 < self.eps < 1.0, f"{self.eps}"),
        }
        for key, (holds, found) in rules.items():
            if not holds:
                raise BadMetadata(f"{file.path}: qwen35.{key}: {found}")

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
                "attn_norm.weight": (c,), "post_attention_norm.weight": (c,),
                "ffn_gate.weight": (self.ffn, c), "ffn_up.weight": (self.ffn, c), "ffn_down.weight": (c, self.ffn),
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
            shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        return shapes


def _layers(file: GGUFFile) -> int:
    """Blocks but for those of multi-token prediction, which come last and are not run."""
    held = len(file.tensors)
    blocks = file.require_within("qwen35.block_count", 1, held, because=f"the file holds {held} tensors")
    return blocks - file.require_within(
        "qwen35.nextn_predict_layers", 0, blocks - 1, default=0, because=f"of {blocks} blocks"
    )


def _recurrent_layers(file: GGUFFile, layers: int) -> tuple[bool, ...]:
    """Which layers are delta-net layers: an explicit list, or all but every ``full_attention_interval``-th."""
    listed = file.get("qwen35.attention.recurrent_layers", list, default=None)
    if listed is not None:
        if len(listed) < layers:
            raise BadMetadata(f"{file.path}: qwen35.attention.recurrent_layers lists {len(listed)} of {layers} layers")
        return tuple(bool(r) for r in listed[:layers])
    interval = int(file.get("qwen35.full_attention_interval", int, default=4))
    if not 1 <= interval <= _LIMIT:
        raise BadMetadata(f"{file.path}: qwen35.full_attention_interval is {interval}; it must be at least 1")
    return tuple((i + 1) % interval != 0 for i in range(layers))


class GatedAttention:
    """Full attention with q/k norm, partial RoPE and an output gate."""

    def __init__(self, weights: Weights, layer: int, config: Config) -> None:
        def norm_rope(name: str) -> NormRope:
            return NormRope(weights[f"{block}.{name}.weight"], config.eps, config.rope_dims, config.rope_base)

        block = f"blk.{layer}"
        self.layer, self.config = layer, config
        self.attn_q, self.attn_k = weights.linear(f"{block}.attn_q"), weights.linear(f"{block}.attn_k")
        self.attn_v, self.attn_output = weights.linear(f"{block}.attn_v"), weights.linear(f"{block}.attn_output")
        self.attn_q_norm, self.attn_k_norm = norm_rope("attn_q_norm"), norm_rope("attn_k_norm")

    def __call__(self, x: Tensor, step: StepInputs, cache: KVCache, _delta: DeltaState) -> Tensor:
        c, T = self.config, x.shape[0]
        H, Hkv, D = c.heads, c.kv_heads, c.head_size
        q, gate = self.attn_q(x).reshape(T, H, 2 * D).split([D, D])  # (T, H, D) each
        k = self.attn_k(x).reshape(T, Hkv, D)
        v = self.attn_v(x).reshape(T, Hkv, D)
        o = cache.attend(self.layer, q, k, v, self.attn_q_norm, self.attn_k_norm, step)  # (T, H, D)
        return self.attn_output(ops.sigmoid_gate(o, gate).reshape(T, H * D))


class GatedDeltaNet:
    """Linear attention with a state that is decayed, corrected and read at every token."""

    def __init__(self, weights: Weights, layer: int, config: Config) -> None:
        block = f"blk.{layer}"
        self.layer, self.config = layer, config
        self.attn_qkv, self.attn_gate = weights.linear(f"{block}.attn_qkv"), weights.linear(f"{block}.attn_gate")
        self.ssm_alpha, self.ssm_beta = weights.linear(f"{block}.ssm_alpha"), weights.linear(f"{block}.ssm_beta")
        self.ssm_conv1d, self.ssm_norm = weights[f"{block}.ssm_conv1d.weight"], weights[f"{block}.ssm_norm.weight"]
        self.ssm_a, self.ssm_dt = weights[f"{block}.ssm_a"], weights[f"{block}.ssm_dt.bias"]
        self.ssm_out = weights.linear(f"{block}.ssm_out")

    def __call__(self, x: Tensor, step: StepInputs, _cache: KVCache, delta: DeltaState) -> Tensor:
        c, T = self.config, x.shape[0]
        Hv, S = c.v_heads, c.state_size
        qkv, z, alpha, beta = self.attn_qkv(x), self.attn_gate(x), self.ssm_alpha(x), self.ssm_beta(x)
        inputs = ops.delta_inputs(
            qkv,
            alpha,
            beta,
            self.ssm_conv1d,
            self.ssm_a,
            self.ssm_dt,
            delta.window(self.layer),
            step.counts,
            keep=step.keep,
        )  # (16 + T, q | k | v | g | beta)
        o = ops.delta_rule(inputs, delta.state(self.layer), step.counts, k_heads=c.k_heads, eps=c.eps, keep=step.keep)
        o = ops.gated_rms_norm(o.reshape(T, Hv, S), z.reshape(T, Hv, S), self.ssm_norm, c.eps)
        return self.ssm_out(o.reshape(T, Hv * S))


class Block:
    """``x += mixer(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, weights: Weights, layer: int, config: Config) -> None:
        block = f"blk.{layer}"
        self.eps = config.eps
        self.mixer = (GatedDeltaNet if config.recurrent[layer] else GatedAttention)(weights, layer, config)
        self.attn_norm, self.post_attention_norm = (
            weights[f"{block}.attn_norm.weight"],
            weights[f"{block}.post_attention_norm.weight"],
        )
        self.ffn_gate, self.ffn_up = weights.linear(f"{block}.ffn_gate"), weights.linear(f"{block}.ffn_up")
        self.ffn_down = weights.linear(f"{block}.ffn_down")

    def __call__(self, x: Tensor, step: StepInputs, cache: KVCache, delta: DeltaState) -> Tensor:
        x = x + self.mixer(ops.rms_norm(x, self.attn_norm, self.eps), step, cache, delta)
        h = ops.rms_norm(x, self.post_attention_norm, self.eps)
        return x + self.ffn_down(ops.swiglu(self.ffn_gate(h), self.ffn_up(h)))


class Qwen35:
    """The forward pass. It holds weights only; everything that changes is handed in."""

    def __init__(self, config: Config, weights: Weights) -> None:
        self.config = config
        self.token_embd = weights["token_embd.weight"]
        self.blocks = [Block(weights, layer, config) for layer in range(config.layers)]
        self.output_norm = weights["output_norm.weight"]
        self.output = weights.linear("token_embd" if config.tied else "output")

    def forward(
        self, tokens: Tensor, step: StepInputs, cache: KVCache, delta: DeltaState, capture: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """(T,) int32 to the residual stream after the last layer, (T, hidden), and after each layer in ``capture``."""
        x = ops.get_rows(self.token_embd, tokens)
        captured: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            x = step.graph.effect(block(x, step, cache, delta))  # ggml walks back recursively, so no further than this
            captured[layer] = x
        return x, [captured[layer] for layer in capture]

    def head(self, x: Tensor) -> Tensor:
        """(T, hidden) residual stream to (T, vocab) logits."""
        return self.output(ops.rms_norm(x, self.output_norm, self.config.eps))
