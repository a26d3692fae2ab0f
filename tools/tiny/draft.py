"""The tiny DFlash draft and its training (DFlash, arXiv:2602.06036, sections 3 and 4).

The draft proposes a block of 16 tokens in one forward pass. Row 0 is the last known token (the anchor), rows 1 to 15
are mask tokens; row i predicts the token at its own position. Its context are hidden states of the target, projected
once and injected as keys and values into every layer. Embedding and LM head are the target's, frozen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from tools.tiny.corpus import Ids
from tools.tiny.optimizer import Optimizer
from tools.tiny.target import Log, autocast, cosine_with_warmup, fast_convolution, features


@dataclass(frozen=True)
class DraftConfig:
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    feed_forward: int = 768
    sliding: tuple[bool, ...] = (True, True, True, False)
    window: int = 64
    block: int = 16
    rope_theta: float = 1e7
    eps: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rope(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotate x (..., heads, D) at `position` (...): pairs (i, i + D/2) turn by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[..., None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DraftConfig, sliding: bool) -> None:
        super().__init__()
        self.config, self.sliding = config, sliding
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.eps)
        self.k_norm = RMSNorm(config.head_dim, config.eps)

    def keys_and_values(self, h: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (..., kv heads, D) of rows h (..., hidden) at `position` (...): context and block share this path."""
        shape = (*h.shape[:-1], self.config.kv_heads, self.config.head_dim)
        k = rope(self.k_norm(self.k_proj(h).view(shape)), position, self.config.rope_theta)
        return k, self.v_proj(h).view(shape)

    def visible(self, position: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """What rows at `position` (B, A, R) may see: of the context (B, A, R, S), of their own block (R, R).

        A sliding layer is causal inside the block and sees the last `window` positions, a full layer sees all of both.
        The context ends before the anchor, whose own target state does not exist yet.
        """
        s = torch.arange(context, device=position.device)
        of_context = (s < position[..., :1, None]).expand(*position.shape, context)
        rows = position.shape[-1]
        of_block = torch.ones(rows, rows, dtype=torch.bool, device=position.device)
        if self.sliding:
            of_context = of_context & (position[..., None] - s < self.config.window)
            of_block = of_block.tril()
        return of_context, of_block

    def forward(self, h: Tensor, position: Tensor, h_ctx: Tensor) -> Tensor:
        """h (B, A, R, hidden): A blocks of R rows per sequence; h_ctx (B, S, hidden): context at positions 0..S-1."""
        c = self.config
        group = c.heads // c.kv_heads
        q = self.q_norm(self.q_proj(h).view(*h.shape[:-1], c.heads, c.head_dim))
        q = rope(q, position, c.rope_theta).unflatten(-2, (c.kv_heads, group)) * c.head_dim**-0.5
        k, v = self.keys_and_values(h, position)
        context_position = torch.arange(h_ctx.shape[1], device=h.device)
        k_ctx, v_ctx = self.keys_and_values(h_ctx, context_position)
        of_context, of_block = self.visible(position, h_ctx.shape[1])

        score_ctx = torch.einsum("barkgd,bskd->bakgrs", q, k_ctx).float()
        score = torch.einsum("barkgd,batkd->bakgrt", q, k).float()
        score_ctx = score_ctx.masked_fill(~of_context[:, :, None, None], -torch.inf)
        score = score.masked_fill(~of_block, -torch.inf)
        p = torch.softmax(torch.cat([score_ctx, score], dim=-1), dim=-1).to(v.dtype)
        p_ctx, p_block = p.split([h_ctx.shape[1], h.shape[2]], dim=-1)
        out = torch.einsum("bakgrs,bskd->barkgd", p_ctx, v_ctx) + torch.einsum("bakgrt,batkd->barkgd", p_block, v)
        return self.o_proj(out.flatten(-3))


class Layer(nn.Module):
    def __init__(self, config: DraftConfig, sliding: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = Attention(config, sliding)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x: Tensor, position: Tensor, h_ctx: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position, h_ctx)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Draft(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden, config.hidden, bias=False)
        self.hidden_norm = RMSNorm(config.hidden, config.eps)
        self.layers = nn.ModuleList([Layer(config, sliding) for sliding in config.sliding])
        self.norm = RMSNorm(config.hidden, config.eps)

    def context(self, taps: Tensor) -> Tensor:
        """h_ctx (B, S, hidden) of the target features `taps` (B, S, n_taps * hidden)."""
        return self.hidden_norm(self.fc(taps))

    def forward(self, target: Qwen3_5ForCausalLM, anchor: Tensor, start: Tensor, h_ctx: Tensor) -> Tensor:
        """Logits (B, A, block, vocab) of blocks that begin with token `anchor` (B, A) at position `start` (B, A)."""
        rows = torch.arange(self.config.block, device=anchor.device)
        ids = torch.full((*anchor.shape, self.config.block), self.config.mask_token_id, device=anchor.device)
        ids[..., 0] = anchor
        x = target.model.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, start[..., None] + rows, h_ctx)
        logits: Tensor = target.lm_head(self.norm(x))
        return logits


# -------------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Pool:
    """Text ids (N, T) whose positions from `prompt_length` on were written by the target."""

    ids: Tensor
    prompt_length: int


def block_loss(logits: Tensor, labels: Tensor, gamma: float = 7.0) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of rows 1.. of logits (B, A, R, vocab) against labels (B, A, R); and each row's accuracy.

    Row k weighs exp(-(k - 1) / gamma): an early miss makes the rest of the block worthless.
    """
    rows = logits.shape[2]
    weight = torch.exp(-torch.arange(rows - 1, device=logits.device) / gamma)
    loss = F.cross_entropy(logits[:, :, 1:].flatten(0, 2).float(), labels[:, :, 1:].flatten(), reduction="none")
    loss = (loss.view(-1, rows - 1) * weight).sum() / (weight.sum() * labels.shape[0] * labels.shape[1])
    accuracy = (logits[:, :, 1:].argmax(-1) == labels[:, :, 1:]).float().mean(dim=(0, 1))
    return loss, accuracy


def expected_length(row_accuracy: Tensor) -> float:
    """Acceptance length, bonus token included, if rows were right independently: 1 + sum of products."""
    return 1 + float(row_accuracy.cumprod(0).sum())


def draw_anchors(rng: np.random.Generator, batch: int, count: int, first: int, last: int) -> Ids:
    """`count` anchor positions per sequence in first..last."""
    return rng.integers(first, last + 1, size=(batch, count))


def train_draft(
    draft: Draft,
    target: Qwen3_5ForCausalLM,
    pools: list[Pool],
    *,
    seconds: float,
    max_steps: int,
    batch: int,
    anchors: int,
    seed: int,
    log: Log,
) -> dict[str, float]:
    """Train on text of `pools`, drawn in proportion to their rows.

    Anchors lie where the rest of the block is text that the target wrote. Runs until `seconds` or `max_steps` are
    used; returns totals.
    """
    device, rng, config = pools[0].ids.device, np.random.default_rng(seed), draft.config
    share = np.array([len(pool.ids) for pool in pools]) / sum(len(pool.ids) for pool in pools)
    target.requires_grad_(False)
    optimizer = Optimizer(draft, matrix_lr=0.02, other_lr=2e-3)
    rows = torch.arange(config.block, device=device)
    start_time, step, since = time.monotonic(), 0, 0
    accuracy_sum, loss_sum = torch.zeros(config.block - 1, device=device), 0.0
    draft.train()
    with fast_convolution():
        while step < max_steps and (elapsed := time.monotonic() - start_time) < seconds:
            pool = pools[int(rng.choice(len(pools), p=share))]
            ids = pool.ids[torch.from_numpy(rng.integers(len(pool.ids), size=batch)).to(device)]
            last = ids.shape[1] - config.block
            start = torch.from_numpy(draw_anchors(rng, batch, anchors, pool.prompt_length - 1, last)).to(device)
            labels = ids[torch.arange(batch, device=device)[:, None, None], start[..., None] + rows]  # (B, A, R)
            with autocast(device):
                _, taps = features(target, ids, list(config.target_layer_ids))
                logits = draft(target, labels[..., 0], start, draft.context(taps))
            loss, accuracy = block_loss(logits, labels)
            loss.backward()
            optimizer.step(cosine_with_warmup(max(elapsed / seconds, step / max_steps)))
            accuracy_sum, loss_sum, step = accuracy_sum + accuracy, loss_sum + float(loss.detach()), step + 1
            since += 1
            if step % 50 == 0 or step == 1:
                rows_right = accuracy_sum / since
                log(
                    f"draft step {step}: loss {loss_sum / since:.3f}, row accuracy {float(rows_right[0]):.3f} .. "
                    f"{float(rows_right[-1]):.3f}, expected length {expected_length(rows_right):.2f}"
                )
                accuracy_sum, loss_sum, since = torch.zeros_like(accuracy_sum), 0.0, 0
    draft.eval()
    return {"steps": step, "blocks": step * batch * anchors, "seconds": time.monotonic() - start_time}
