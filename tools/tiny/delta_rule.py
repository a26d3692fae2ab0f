"""The target's delta-net arithmetic, written for speed in training; same signatures as the library's functions.

The library's plain PyTorch versions are references: they slice the sequence inside a loop, and the gradient of a slice
is a whole tensor of zeros. Here a sequence is cut once, and what does not depend on the state is left out of the loop.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_kwargs: object
) -> Tensor:
    """Causal depthwise convolution (B, C, T) as a sum of shifted products.

    The library's grouped convolution has a slow weight gradient on GPUs; four multiply-adds are memory bound instead.
    """
    taps = weight.shape[-1]
    padded = F.pad(x.to(weight.dtype), (taps - 1, 0))
    length = x.shape[-1]
    out = torch.zeros_like(x, dtype=weight.dtype) if bias is None else bias[:, None].expand(x.shape)
    for tap in range(taps):
        out = out + padded[..., tap : tap + length] * weight[:, tap, None]
    return (F.silu(out) if activation == "silu" else out).to(x.dtype)


class UnitLowerInverse(torch.autograd.Function):
    """Inverse of I + A for strictly lower triangular A (..., n, n); the gradient costs two products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        identity = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradients[0] @ inverse.mT).tril(-1)


def normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over query, key (B, T, H, K), value (B, T, H, V), log decay g and beta (B, T, H).

    Returns (B, T, H, V) and, on request, the final state (B, H, K, V). Queries and keys are normalised here.
    Source: "Gated Delta Networks" (arXiv:2412.06464), section 3.3, the chunkwise form.
    """
    batch, length, heads, size = key.shape
    padding = -length % CHUNK

    def cut(x: Tensor) -> Tensor:
        """(B, T, H, ...) to (B * H, chunks, CHUNK, ...) in float32, zeros at the end."""
        x = F.pad(x.float().transpose(1, 2), (0, 0) * (x.ndim - 3) + (0, padding))
        return x.reshape(batch * heads, -1, CHUNK, *x.shape[3:])

    with torch.autocast(query.device.type, enabled=False):
        q, k, v, rate = cut(normalized(query.float()) * size**-0.5), cut(normalized(key.float())), cut(value), cut(beta)
        decay = cut(g).cumsum(-1)  # (N, chunks, CHUNK): log decay since the chunk began
        causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        k_beta, since = k * rate[..., None], decay.exp()[..., None]
        inverse = UnitLowerInverse.apply((k_beta @ k.mT * between).tril(-1))
        new_value, reads = inverse @ (v * rate[..., None]), inverse @ (k_beta * since)
        attention = q @ k.mT * between
        writes = (k * (decay[..., -1:] - decay).exp()[..., None]).mT
        kept = decay[..., -1].exp()[..., None, None]

        state = q.new_zeros(batch * heads, size, v.shape[-1])
        if initial_state is not None:
            state = initial_state.float().flatten(0, 1)
        states, values = [], []
        for u, w, write, keep in zip(
            new_value.unbind(1), reads.unbind(1), writes.unbind(1), kept.unbind(1), strict=True
        ):
            states.append(state)
            values.append(torch.baddbmm(u, w, state, alpha=-1))
            state = torch.baddbmm(state * keep, write, values[-1])
        out = (q * since) @ torch.stack(states, 1) + attention @ torch.stack(values, 1)
    out = out.reshape(batch, heads, length + padding, -1)[:, :, :length].transpose(1, 2).to(query.dtype)
    return out, state.unflatten(0, (batch, heads)) if output_final_state else None


def one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    **_kwargs: object,
) -> tuple[Tensor, Tensor]:
    """`chunked` for T = 1 with a state: one pass over it per product."""
    batch, _, heads, size = key.shape

    def row(x: Tensor) -> Tensor:
        return x.float().reshape(batch * heads, 1, -1)

    with torch.autocast(query.device.type, enabled=False):
        q, k = row(normalized(query.float())) * size**-0.5, row(normalized(key.float()))
        state = initial_state.float().flatten(0, 1) * row(g).exp()
        change = torch.baddbmm(row(value), k, state, alpha=-1) * row(beta)
        state = state.baddbmm_(k.mT, change)
        out = (q @ state).view(batch, 1, heads, -1).to(query.dtype)
    return out, state.unflatten(0, (batch, heads))
