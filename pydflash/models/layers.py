"""Feed-forward layers that architectures share. T rows of a step, C hidden columns, F inner ones, E experts."""

from __future__ import annotations

from pydflash import ops
from pydflash.models.weights import Weights
from pydflash.native import Shape, Tensor

__all__ = ["SwiGLU"]


class SwiGLU:
    """``down(silu(gate(x)) * up(x))`` (Shazeer, GLU Variants Improve Transformer)."""

    def __init__(self, weights: Weights, names: str) -> None:
        """``names``: of the projections, with a place for "gate", "up" and "down"."""
        self.gate, self.up, self.down = (weights.linear(names.format(part)) for part in ("gate", "up", "down"))

    def __call__(self, x: Tensor) -> Tensor:
        """(T, C) to (T, C)."""
        return self.down(ops.swiglu(self.gate(x), self.up(x)))

    @staticmethod
    def tensors(names: str, hidden: int, inner: int) -> dict[str, Shape]:
        """The weights' names and shapes."""
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return {f"{names.format(part)}.weight": shape for part, shape in shapes.items()}
