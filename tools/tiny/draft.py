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

from tools.tiny.optimizer import Optimizer
from tools.tiny.target import Log, autocast, cosine_with_warmup, fast_mixers, features


@dataclass(frozen=True)
class DraftConfig:
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    feed_forward: int = 768
    sliding: tuple[bool, ...] = (True, True, False)
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

    def visible(self, position: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """What rows at `position` (B, A, R) see of context at s (B, 1 or A, S), (B, A, R, S), and of the block, (R, R).

        A sliding layer is causal inside the block and sees the last `window` positions, a full layer sees all of both.
        The context ends before the anchor, whose own target state does not exist yet.
        """
        s = s[:, :, None]  # (B, 1 or A, 1, S)
        of_context = ((s >= 0) & (s < position[..., :1, None])).expand(*position.shape, s.shape[-1])
        rows = position.shape[-1]
        of_block = torch.ones(rows, rows, dtype=torch.bool, device=position.device)
        if self.sliding:
            of_context = of_context & (position[..., None] - s < self.config.window)
            of_block = of_block.tril()
        return of_context, of_block

    def context(self, h_ctx: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, 1 or A, S, kv heads, D) and positions (B, 1 or A, S) that blocks at `start` (B, A) may need.

        A full layer's blocks share the whole context; a sliding layer's get the `window` positions before them,
        negative where the text has not begun.
        """
        batch, length = h_ctx.shape[:2]
        s = torch.arange(length, device=h_ctx.device)
        k, v = self.keys_and_values(h_ctx, s)
        if not self.sliding:
            return k[:, None], v[:, None], s.expand(batch, 1, length)
        s = start[..., None] + torch.arange(-self.config.window, 0, device=start.device)  # (B, A, window)
        row = s.clamp(0, length - 1) + length * torch.arange(batch, device=start.device)[:, None, None]
        # Selecting from float32: its gradient adds up many rows in one place.
        k, v = (x.float().flatten(0, 1).index_select(0, row.flatten()).view(*s.shape, *x.shape[2:]) for x in (k, v))
        return k, v, s

    def forward(self, h: Tensor, position: Tensor, h_ctx: Tensor) -> Tensor:
        """h (B, A, R, hidden): A blocks of R rows per sequence; h_ctx (B, S, hidden): context at positions 0..S-1."""
        c = self.config
        group = c.heads // c.kv_heads
        q = self.q_norm(self.q_proj(h).view(*h.shape[:-1], c.heads, c.head_dim))
        q = rope(q, position, c.rope_theta).unflatten(-2, (c.kv_heads, group)) * c.head_dim**-0.5
        k, v = self.keys_and_values(h, position)
        k_ctx, v_ctx, s = self.context(h_ctx, position[..., 0])
        of_context, of_block = self.visible(position, s)
        # A full layer has one context (x) for all blocks (y) of a sequence, a sliding layer one each.
        blocks = (h.shape[0], s.shape[1], -1)

        def per_context(x: Tensor) -> Tensor:
            return x.view(*blocks, *x.shape[2:])

        score_ctx = torch.einsum("bxyrkgd,bxskd->bxyrkgs", per_context(q), k_ctx).reshape(*q.shape[:-1], -1)
        score_ctx = score_ctx.float().masked_fill(~of_context[:, :, :, None, None], -torch.inf)
        score = torch.einsum("barkgd,batkd->barkgt", q, k).float()
        score = score.masked_fill(~of_block[:, None, None], -torch.inf)
        p = torch.softmax(torch.cat([score_ctx, score], dim=-1), dim=-1).to(v.dtype)
        p_ctx, p_block = p.split([s.shape[-1], h.shape[2]], dim=-1)
        out = torch.einsum("bxyrkgs,bxskd->bxyrkgd", per_context(p_ctx), v_ctx.to(v.dtype)).reshape(q.shape)
        out = out + torch.einsum("barkgt,batkd->barkgd", p_block, v)
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
    """Text ids (N, T) and what the target makes of them: features (N, T, taps * hidden) and its next tokens (N, T).

    Blocks are drawn from position `first` on.
    """

    ids: Tensor
    first: int
    features: Tensor
    choice: Tensor


@torch.no_grad()
def observed(target: Qwen3_5ForCausalLM, ids: Tensor, first: int, layers: list[int], batch: int = 64) -> Pool:
    """The pool of `ids`; features are kept in bfloat16 on a GPU, so that training never runs the target."""
    kept, choice = [], []
    with fast_mixers(), autocast(ids.device):
        for rows in ids.split(batch):
            logits, taps = features(target, rows, layers)
            kept.append(taps.bfloat16() if ids.is_cuda else taps)
            choice.append(logits.argmax(-1))
    return Pool(ids, first, torch.cat(kept), torch.cat(choice))


def block_loss(logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float = 0.5) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of rows 1.. of logits (B, A, R, vocab); and which `valid` rows are right, (B, A, R - 1).

    `labels` and `valid` (B, A, R - 1) belong to rows 1.. too. A row weighs what its log-probability adds to the
    expected number of accepted tokens: the sum, over it and the rows after it, of the chance that all rows up to that
    one are right. An early miss makes the rest of the block worthless. Chances are the draft's own, raised towards 1 by
    `smoothing`, which is the paper's alpha. Source: D-PACE (arXiv:2605.18810, equations 7 and 8); unlike there, the sum
    of the weights divides the loss.
    """
    loss = F.cross_entropy(logits[:, :, 1:].flatten(0, 2).float(), labels.flatten(), reduction="none").view_as(labels)
    with torch.no_grad():
        chance = (1 - smoothing) * torch.exp(-loss) + smoothing
        accepted = (chance * valid).cumprod(-1)  # the chance that a row and all before it are right
        weight = accepted.flip(-1).cumsum(-1).flip(-1) * valid
        right = (logits[:, :, 1:].argmax(-1) == labels) & valid
    return (loss * weight).sum() / weight.sum(), right


def greedy_labels(ids: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """What greedy decoding says after anchors ids[..., 0] and where it is known; ids, choice (..., R) to (..., R - 1).

    The target's choice after each token is the label of the next row. It is known up to and including the first row
    where the text goes another way.
    """
    labels, agrees = choice[..., :-1], choice[..., :-1] == ids[..., 1:]
    before = torch.cat([torch.ones_like(agrees[..., :1]), agrees[..., :-1]], dim=-1)
    return labels, before.cumprod(-1).bool()


class Tally:
    """Sums of loss and accuracy that stay on the device until they are read."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.steps, self.loss = 0, torch.zeros((), device=device)
        self.right, self.valid = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
        self.accepted, self.blocks = torch.zeros((), device=device), 0

    def add(self, loss: Tensor, right: Tensor, valid: Tensor) -> None:
        self.steps, self.loss = self.steps + 1, self.loss + loss.detach()
        self.right, self.valid = self.right + right.sum((0, 1)), self.valid + valid.sum((0, 1))
        self.accepted, self.blocks = self.accepted + right.cumprod(-1).sum(), self.blocks + right[..., 0].numel()

    def __str__(self) -> str:
        accuracy = self.right / self.valid.clamp(min=1)
        return (
            f"loss {float(self.loss) / self.steps:.3f}, row accuracy {float(accuracy[0]):.3f} .. "
            f"{float(accuracy[-1]):.3f}, acceptance length at least {1 + float(self.accepted) / self.blocks:.2f}"
        )


class Sampler:
    """Draws blocks of `pools`, a pool in proportion to its rows: (taps, anchors, starts, labels, valid) of a batch."""

    def __init__(self, pools: list[Pool], block: int, batch: int, anchors: int, seed: int) -> None:
        self.pools, self.batch, self.anchors = pools, batch, anchors
        device = pools[0].ids.device
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
        self.share = np.array([len(pool.ids) for pool in pools]) / sum(len(pool.ids) for pool in pools)
        self.offset = torch.arange(block, device=device)

    def draw(self) -> tuple[Tensor, ...]:
        return self.draw_of(self.pools[int(self.rng.choice(len(self.pools), p=self.share))])

    def draw_of(self, pool: Pool) -> tuple[Tensor, ...]:
        device, last = pool.ids.device, pool.ids.shape[1] - len(self.offset)
        row = torch.randint(len(pool.ids), (self.batch,), generator=self.generator, device=device)
        shape = (self.batch, self.anchors)
        start = torch.randint(pool.first, last + 1, shape, generator=self.generator, device=device)
        at = (row[:, None, None], start[..., None] + self.offset)  # (B, A, R)
        ids = pool.ids[at]
        labels, valid = greedy_labels(ids, pool.choice[at])
        return pool.features[row], ids[..., 0], start, labels, valid


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
    """Train on blocks of `pools` until `seconds` or `max_steps` are used; returns totals."""
    begin, device = time.monotonic(), pools[0].ids.device
    sampler = Sampler(pools, draft.config.block, batch, anchors, seed)
    target.requires_grad_(False)
    optimizer = Optimizer(draft, matrix_lr=0.02, other_lr=2e-3)

    def block_step(taps: Tensor, anchor: Tensor, start: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device):
            logits = draft(target, anchor, start, draft.context(taps.to(draft.fc.weight.dtype)))
        return block_loss(logits, labels, valid)

    if device.type == "cuda":  # a step then takes a fraction of its time
        block_step = torch.compile(block_step, dynamic=False)
        for pool in {pool.ids.shape[1]: pool for pool in pools}.values():  # before the schedule begins
            block_step(*sampler.draw_of(pool))[0].backward()
        draft.zero_grad()
        log("compiled")
    start_time, step, tally = time.monotonic(), 0, Tally(draft.config.block - 1, device)
    seconds -= start_time - begin
    draft.train()
    while step < max_steps and (elapsed := time.monotonic() - start_time) < seconds:
        *inputs, valid = sampler.draw()
        loss, right = block_step(*inputs, valid)
        loss.backward()
        optimizer.step(cosine_with_warmup(max(elapsed / seconds, step / max_steps)))
        tally.add(loss, right, valid)
        step += 1
        if step % 100 == 0 or step == 1:
            log(f"draft step {step}: {tally}")
            tally = Tally(draft.config.block - 1, device)
    draft.eval()
    return {"steps": step, "blocks": step * batch * anchors, "seconds": time.monotonic() - start_time}
