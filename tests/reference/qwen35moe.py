"""The `qwen35moe` architecture in plain numpy: `qwen35` with a mixture of experts in place of every feed-forward.

Written from the model's mathematics, one row and one expert at a time.
"""

from __future__ import annotations

import numpy as np

from tests.reference.qwen35 import Array, Reference, Weights, sigmoid, silu, softmax, swiglu

__all__ = ["MoEReference", "expert", "mixture", "route"]


def route(logits: Array, used: int) -> tuple[Array, Array]:
    """The experts of one row, the most likely first (the lower number of equal ones), and their weights.

    logits (experts,); both results (used,). The router's softmax runs over all experts; the selected probabilities are
    then divided by their sum.
    """
    probabilities = softmax(logits)
    chosen = np.argsort(-probabilities, kind="stable")[:used]
    return chosen, probabilities[chosen] / probabilities[chosen].sum()


def expert(x: Array, weights: Weights, block: str, number: int) -> Array:
    """SwiGLU of one expert on one row x (hidden,)."""
    fused = f"{block}ffn_gate_up_exps.weight"
    if fused in weights:
        gate, up = np.split(x @ weights[fused][number].T, 2)  # the gate's rows come first
    else:
        gate, up = (x @ weights[f"{block}ffn_{name}_exps.weight"][number].T for name in ("gate", "up"))
    return (silu(gate) * up) @ weights[f"{block}ffn_down_exps.weight"][number].T


def mixture(x: Array, weights: Weights, block: str, used: int) -> Array:
    """The routed experts' part of a feed-forward, (rows, hidden) to (rows, hidden)."""
    out = np.zeros_like(x)
    for row, logits in enumerate(x @ weights[f"{block}ffn_gate_inp.weight"].T):
        for number, share in zip(*route(logits, used)):
            out[row] += share * expert(x[row], weights, block, number)
    return out


class MoEReference(Reference):
    """A `qwen35moe` model with one sequence's state."""

    architecture = "qwen35moe"

    def _feed_forward(self, x: Array, block: str) -> Array:
        w = self.weights
        # The shared expert runs for every row and is gated by one number a row; the routed ones are not gated.
        gate = sigmoid(x @ w[f"{block}ffn_gate_inp_shexp.weight"].reshape(-1))
        shared = gate[:, None] * swiglu(x, w, block, "_shexp")
        return mixture(x, w, block, w.key("expert_used_count")) + shared
