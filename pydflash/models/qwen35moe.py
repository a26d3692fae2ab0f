"""Qwen3.5/3.6 with experts (GGUF architecture ``qwen35moe``): hybrid layers with mixture-of-experts feed-forwards.

T rows of a step, C hidden columns; E experts of which k run for a row, of F inner columns each; one shared expert.
Source: Qwen3.5's reference code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydflash import ops
from pydflash.errors import BadMetadata
from pydflash.models.hybrid import Hybrid, HybridConfig
from pydflash.models.keys import Keys
from pydflash.models.layers import SwiGLU
from pydflash.models.weights import Weights
from pydflash.native import Shape, Tensor

__all__ = ["Config", "Qwen35MoE"]


@dataclass(frozen=True)
class Config(HybridConfig):
    """``experts``, ``used``: of which run for a row. ``expert_ffn``, ``shared_ffn``: inner columns of a routed expert
    and of the shared one. ``fused``: per layer, whether gate and up matrices lie in one tensor."""

    architecture = "qwen35moe"

    experts: int
    used: int
    expert_ffn: int
    shared_ffn: int
    fused: tuple[bool, ...] = field(repr=False)

    @classmethod
    def _read_feed_forward(cls, keys: Keys, layers: int) -> Mapping[str, Any]:
        experts, used = keys.number("expert_count"), keys.number("expert_used_count")
        _check_routing(keys, experts, used)
        # A file that does not give the experts' own lengths divides a dense feed-forward among those that run.
        dense = keys.number("feed_forward_length", 0, default=0)
        return {
            "experts": experts,
            "used": used,
            "expert_ffn": keys.number("expert_feed_forward_length", default=dense // used or None),
            "shared_ffn": keys.number("expert_shared_feed_forward_length", default=dense or None),
            "fused": tuple(f"blk.{i}.ffn_gate_up_exps.weight" in keys.file.tensors for i in range(layers)),
        }

    def _feed_forward_tensors(self, layer: int) -> Mapping[str, Shape]:
        E, F, c = self.experts, self.expert_ffn, self.hidden
        routed: dict[str, Shape] = {"ffn_gate_inp.weight": (E, c), "ffn_down_exps.weight": (E, c, F)}
        if self.fused[layer]:
            routed["ffn_gate_up_exps.weight"] = (E, 2 * F, c)
        else:
            routed |= {"ffn_gate_exps.weight": (E, F, c), "ffn_up_exps.weight": (E, F, c)}
        shared = SwiGLU.tensors("ffn_{}_shexp", c, self.shared_ffn)
        return {**routed, "ffn_gate_inp_shexp.weight": (1, c), **shared}


def _check_routing(keys: Keys, experts: int, used: int) -> None:
    """Raises BadMetadata when a file asks for another choice of experts or for other weights than are computed."""
    scale = keys.file.get(f"{keys.prefix}expert_weights_scale", float, default=1.0)
    groups = keys.number("expert_group_count", 0, default=0)
    rules = {
        "expert_used_count": (used <= experts, f"{used} of {experts} experts"),
        "expert_weights_scale": (scale in (0.0, 1.0), f"{scale:g}; only 1, or 0 for none, is supported"),
        "expert_group_count": (groups <= 1, f"{groups}; a choice of groups before that of experts is not supported"),
    }
    for key, (holds, found) in rules.items():
        if not holds:
            raise BadMetadata(f"{keys.file.path}: {keys.prefix}{key}: {found}")


class MixtureOfExperts:
    """The experts that a router selects for each row, weighted by it, and a shared one behind a gate of its own."""

    def __init__(self, weights: Weights, layer: int, config: Config) -> None:
        block = f"blk.{layer}"
        self.used = config.used
        self.ffn_gate_inp = weights.linear(f"{block}.ffn_gate_inp")
        names = ("ffn_gate_up_exps",) if config.fused[layer] else ("ffn_gate_exps", "ffn_up_exps")
        self.gate_up_exps = [weights[f"{block}.{name}.weight"] for name in names]
        self.ffn_down_exps = weights[f"{block}.ffn_down_exps.weight"]
        self.ffn_gate_inp_shexp = weights.linear(f"{block}.ffn_gate_inp_shexp")
        self.shared = SwiGLU(weights, f"{block}.ffn_{{}}_shexp")

    def __call__(self, x: Tensor) -> Tensor:
        """(T, C) to (T, C)."""
        logits = self.ffn_gate_inp(x)  # (T, E)
        ids = ops.top_k(logits, self.used)  # (T, k)
        hidden = [ops.experts(x, weight, ids) for weight in self.gate_up_exps]  # (T, k, 2F) or (T, k, F) twice
        gate, up = hidden if len(hidden) == 2 else hidden[0].split([hidden[0].shape[2] // 2] * 2)
        routed = ops.mix_experts(ops.swiglu(gate, up), self.ffn_down_exps, ids, logits)  # weights sum to 1
        return routed + self.shared(x) * ops.sigmoid(self.ffn_gate_inp_shexp(x))  # the gate is (T, 1)


class Qwen35MoE(Hybrid):
    """The forward pass of :class:`Hybrid`, with mixtures of experts."""

    config: Config

    def feed_forward(self, weights: Weights, layer: int) -> MixtureOfExperts:
        return MixtureOfExperts(weights, layer, self.config)
