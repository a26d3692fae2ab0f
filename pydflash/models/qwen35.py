"""Qwen3.5/3.6, dense (GGUF architecture ``qwen35``): hybrid layers, each with a SwiGLU feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydflash.models.hybrid import Hybrid, HybridConfig
from pydflash.models.keys import Keys
from pydflash.models.layers import SwiGLU
from pydflash.models.weights import Weights
from pydflash.native import Shape

__all__ = ["Config", "Qwen35"]


@dataclass(frozen=True)
class Config(HybridConfig):
    """``ffn``: inner columns of the feed-forward."""

    architecture = "qwen35"

    ffn: int

    @classmethod
    def _read_feed_forward(cls, keys: Keys, _layers: int) -> Mapping[str, Any]:
        return {"ffn": keys.number("feed_forward_length")}

    def _feed_forward_tensors(self, _layer: int) -> Mapping[str, Shape]:
        return SwiGLU.tensors("ffn_{}", self.hidden, self.ffn)


class Qwen35(Hybrid):
    """The forward pass of :class:`Hybrid`, with dense feed-forwards."""

    def feed_forward(self, weights: Weights, layer: int) -> SwiGLU:
        return SwiGLU(weights, f"blk.{layer}.ffn_{{}}")
