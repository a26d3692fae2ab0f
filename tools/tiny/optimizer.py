"""Muon for weight matrices, AdamW for everything else, over float32 master weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a stack of matrices (n, rows, cols) towards 1 by a quintic Newton-Schulz iteration.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), same coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = g.bfloat16() if g.is_cuda else g
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


class Optimizer:
    """One `step(factor)` updates all trainable parameters of `model` and clears their gradients.

    Matrices (2-D, except embeddings and heads) follow Muon with Nesterov momentum 0.95, equal shapes stacked into one
    batched iteration; the rest follows AdamW. `factor` scales both learning rates (the schedule).
    """

    def __init__(self, model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float = 0.1) -> None:
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        others = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden_matrix = parameter.ndim == 2 and min(parameter.shape) >= 64
            if hidden_matrix and "embed_tokens" not in name and "lm_head" not in name:
                self.groups.setdefault(parameter.shape, []).append(parameter)
            else:
                others.append(parameter)
        self.momentum = {shape: g[0].detach().new_zeros((len(g), *shape)) for shape, g in self.groups.items()}
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay
        decayed, kept = [p for p in others if p.ndim == 2], [p for p in others if p.ndim != 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
            lr=other_lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=next(model.parameters()).is_cuda,
        )
        self.parameters = [*others, *(p for group in self.groups.values() for p in group)]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * factor
        self.adam.step()
        for shape, parameters in self.groups.items():
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
            momentum = self.momentum[shape].lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            lr = self.matrix_lr * factor * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - self.matrix_lr * factor * self.weight_decay).sub_(change, alpha=lr)
        for parameter in self.parameters:
            parameter.grad = None
