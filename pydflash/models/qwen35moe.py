"""Qwen3.5/3.6 with experts (GGUF architecture ``qwen35moe``): hybrid layers with mixture-of-experts feed-forwards.

T rows of a step, C hidden columns; E experts of which k run for a row, of F inner columns each; one shared expert.
Source: Qwen3.5's reference code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydflash import ops
from pydflash.errors import BadMetadata
from pydflash.models.hybrid import Hybrid, HybridConfig, Keys
from pydflash.models.layers import SwiGLU
from pydflash.models.weights import Weights
from pydflash.native import Shape, Tensor

__all__ = ["Config", "Qwen35MoE"]


@dataclass(frozen=True)
class Config(HybridConfig):
    """``experts``, ``used``: of which run for a row. ``expert_ffn``, ``shared_ffn``: inner columns of a routed expert
    and of the shared one. ``fused``: gate and up matrices lie in one tensor. ``gate_shape``: of the shared expert's
    gate, (C,) or (1, C)."""

    architecture = "qwen35moe"

    experts: int
    used: int
    expert_ffn: int
    shared_ffn: int
    fused: bool
    gate_shape: Shape

    @classmethod
    def _read_feed_forward(cls, keys: Keys) -> Mapping[str, Any]:
        tensors = keys.file.tensors
        experts, used = keys.number("expert_count"), keys.number("expert_used_count")
        scale = keys.file.get(f"{keys.prefix}expert_weights_scale", float, default=1.0)
        if used > experts or scale not in (0.0, 1.0):
            found = f"{used} of {experts} experts are used, their weights scaled by {scale:g}"
            raise BadMetadata(f"{keys.file.path}: {found}; at most all, and no scale, are supported")
        dense = keys.number("feed_forward_length", 0, default=0)  # absent where the experts' own lengths are told
        gate = tensors.get("blk.0.ffn_gate_inp_shexp.weight")
        return {
            "experts": experts,
            "used": used,
            "expert_ffn": keys.number("expert_feed_forward_length", default=dense // used),
            "shared_ffn": keys.number("expert_shared_feed_forward_length", default=dense),
            "fused": "blk.0.ffn_gate_up_exps.weight" in tensors,
            "gate_shape": gate.shape if gate is not None else (keys.number("embedding_length"),),
        }

    def _feed_forward_tensors(self) -> Mapping[str, Shape]:
        E, F, c = self.experts, self.expert_ffn, self.hidden
        routed: dict[str, Shape] = {"ffn_gate_inp.weight": (E, c), "ffn_down_exps.weight": (E, c, F)}
        if self.fused:
            routed["ffn_gate_up_exps.weight"] = (E, 2 * F, c)
        else:
            routed |= {"ffn_gate_exps.weight": (E, F, c), "ffn_up_exps.weight": (E, F, c)}
        shared = SwiGLU.tensors("ffn_{}_shexp", c, self.shared_ffn)
        return {**routed, "ffn_gate_inp_shexp.weight": self.gate_shape, **shared}


class MixtureOfExperts:
    """The experts that a router selects for each row, weighted by it, and a shared one behind a gate of its own."""

    def __init__(self, weights: Weights, layer: int, config: Config) -> None:
        block = f"blk.{layer}"
        self.config = config
        self.ffn_gate_inp = weights.linear(f"{block}.ffn_gate_inp")
        names = ("ffn_gate_up_exps",) if config.fused else ("ffn_gate_exps", "ffn_up_exps")
        self.gate_up_exps = [weights[f"{block}.{name}.weight"] for name in names]
        self.ffn_down_exps = weights[f"{block}.ffn_down_exps.weight"]
        self.ffn_gate_inp_shexp = weights[f"{block}.ffn_gate_inp_shexp.weight"]
        self.shared = SwiGLU(weights, f"{block}.ffn_{{}}_shexp")

    def __call__(self, x: Tensor) -> Tensor:
        """(T, C) to (T, C)."""
        c = self.config
        logits = self.ffn_gate_inp(x)  # (T, E)
        ids = ops.top_k(logits, c.used)  # (T, k)
        hidden = [ops.experts(x, weight, ids) for weight in self.gate_up_exps]
        gate, up = hidden[0].split([c.expert_ffn, c.expert_ffn]) if c.fused else hidden  # (T, k, F) each
        routed = ops.mix_experts(ops.swiglu(gate, up), self.ffn_down_exps, ids, logits)  # weights sum to 1
        weight = self.ffn_gate_inp_shexp.within(x.home).reshape(1, c.hidden)
        return routed + self.shared(x) * ops.sigmoid(ops.linear(x, weight))  # the gate is (T, 1)


class Qwen35MoE(Hybrid):
    """The forward pass of :class:`Hybrid`, with mixtures of experts."""

    config: Config

    def feed_forward(self, weights: Weights, layer: int) -> MixtureOfExperts:
        return MixtureOfExperts(weights, layer, self.config)
