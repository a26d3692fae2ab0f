"""The tiny target: a Hugging Face Qwen3.5 text model with the real head geometry and everything else shrunk.

Two attention layers and six gated delta-net layers; six query heads share one KV head of 256, two key heads serve six
value heads of 128, so every kernel instance and layout rule of the large model is exercised.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from tools.tiny import delta_rule
from tools.tiny.corpus import Ids, Mixture, Shares, window
from tools.tiny.optimizer import Optimizer

Log = Callable[[str], None]


def build_target(vocab_size: int, device: torch.device) -> hf.Qwen3_5ForCausalLM:
    """A randomly initialised target in float32."""
    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=256,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        full_attention_interval=4,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,
    )
    return hf.Qwen3_5ForCausalLM(config).to(device)


def target_layer_ids(layers: int, taps: int = 5) -> list[int]:
    """The tapped layers of the DFlash recipe: evenly spaced between the second and the third-last."""
    return [round(1 + i * (layers - 3 - 1) / (taps - 1)) for i in range(taps)]


@torch.no_grad()
def observe(model: hf.Qwen3_5ForCausalLM, ids: Tensor, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, T, vocab) and the residual stream (B, T, hidden) after each decoder layer of `layers`."""
    residual: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: residual.__setitem__(layer, output)

    hooks = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        logits = head(model, model.model(ids, use_cache=False).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, [residual[layer] for layer in layers]


def head(model: hf.Qwen3_5ForCausalLM, hidden: Tensor) -> Tensor:
    """Logits in float32 even under autocast: bfloat16 makes ties, and a tie decides what greedy decoding says."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = model.lm_head(hidden.float())
    return logits


def features(model: hf.Qwen3_5ForCausalLM, ids: Tensor, layers: list[int]) -> tuple[Tensor, Tensor]:
    """Logits (B, T, vocab) and what the draft sees: the tapped residuals side by side, (B, T, taps * hidden)."""
    logits, residual = observe(model, ids, layers)
    return logits, torch.cat(residual, dim=-1)


# ----------------------------------------------------------------------------------------- faster mixer kernels
@contextmanager
def fast_mixers() -> Iterator[None]:
    """Within the block the target's delta-net layers use the functions of `delta_rule`."""
    names = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    original = {name: getattr(hf, name) for name in names}
    for name, fast in zip(names, (delta_rule.convolution, delta_rule.chunked, delta_rule.one_token), strict=True):
        setattr(hf, name, fast)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(hf, name, function)


@torch.no_grad()
def check_fast_mixers(model: hf.Qwen3_5ForCausalLM, ids: Tensor) -> float:
    """Largest difference of a logit with and without `fast_mixers`, cached or not; raises RuntimeError above 1e-3."""
    expected = model(ids, use_cache=False).logits
    with fast_mixers():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :-3], use_cache=True)
        last = [(cache := model(ids[:, [t]], past_key_values=cache.past_key_values)).logits for t in (-3, -2, -1)]
    difference = max(float((whole - expected).abs().max()), float((torch.cat(last, 1) - expected[:, -3:]).abs().max()))
    if not difference < 1e-3:
        raise RuntimeError(f"the fast mixers change a logit by {difference}")
    return difference


# -------------------------------------------------------------------------------------------------------- training
def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products on a GPU; plain float32 elsewhere, where bfloat16 is often emulated."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def cosine_with_warmup(progress: float) -> float:
    """Learning-rate factor for progress 0..1: 2 % linear warm-up, then a half cosine to 0."""
    return min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_target(
    model: hf.Qwen3_5ForCausalLM,
    mixture: Mixture,
    shares: Shares,
    *,
    seconds: float,
    max_steps: int,
    batch: int,
    length: int,
    seed: int,
    log: Log,
) -> dict[str, float]:
    """Train on next-token cross entropy until `seconds` of wall time or `max_steps` are used; returns totals."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(seed)
    optimizer = Optimizer(model, matrix_lr=0.02, other_lr=3e-3)
    model.train()
    start, step, since, loss_sum = time.monotonic(), 0, 0, torch.zeros((), device=device)
    with ThreadPoolExecutor(1) as reader, fast_mixers():
        pending = reader.submit(mixture.windows, rng, shares, batch, length)
        while step < max_steps and (elapsed := time.monotonic() - start) < seconds:
            ids = torch.from_numpy(pending.result()).to(device, non_blocking=True)
            pending = reader.submit(mixture.windows, rng, shares, batch, length)
            with autocast(device):
                logits = model(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step(cosine_with_warmup(max(elapsed / seconds, step / max_steps)))
            loss_sum += loss.detach()
            step, since = step + 1, since + 1
            if step % 50 == 0 or step == 1:
                mean = float(loss_sum) / since  # waits for the device, so that the rate is real
                rate = step * batch * length / (time.monotonic() - start)
                log(f"target step {step}: loss {mean:.3f}, {rate:,.0f} tokens/s")
                loss_sum, since = torch.zeros_like(loss_sum), 0
    model.eval()
    return {"steps": step, "tokens": step * batch * length, "seconds": time.monotonic() - start}


@torch.no_grad()
def held_out_loss(
    model: hf.Qwen3_5ForCausalLM, ids: Ids, byte_lengths: np.ndarray, *, batch: int, length: int, rounds: int
) -> dict[str, float]:
    """Mean loss over `rounds` batches of fixed windows of `ids`: nats per token and bits per byte of text."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)
    nats, tokens, size = 0.0, 0, 0
    for _ in range(rounds):
        rows = np.stack([window(rng, ids, length + 1) for _ in range(batch)])
        x = torch.from_numpy(rows).to(device)
        logits = model(x[:, :-1], use_cache=False).logits
        nats += float(F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
        tokens += batch * length
        size += int(byte_lengths[rows[:, 1:]].sum())
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size}


# ------------------------------------------------------------------------------------------------------ generation
@torch.no_grad()
def continue_greedily(
    model: hf.Qwen3_5ForCausalLM, prompts: Tensor, tokens: int, *, temperature: Tensor, seconds: float, seed: int
) -> Tensor:
    """Continue `prompts` (B, P) by up to `tokens` tokens with the library's cache, all rows in step.

    `temperature` (B,) is 0 for greedy rows. Stops early when `seconds` are used. Returns (B, P + generated).
    """
    generator = torch.Generator(prompts.device).manual_seed(seed)
    start, ids = time.monotonic(), [prompts]
    some_sampled = bool((temperature > 0).any())
    step, cache = prompts, None
    sampled = temperature > 0
    for _ in range(tokens):
        with autocast(prompts.device):
            out = model.model(step, past_key_values=cache, use_cache=True)
        logits, cache = head(model, out.last_hidden_state[:, -1]), out.past_key_values
        step = logits.argmax(-1, keepdim=True)
        if some_sampled:
            p = torch.softmax(logits / temperature.clamp(min=0.1)[:, None], dim=-1)
            step = torch.where(sampled[:, None], torch.multinomial(p, 1, generator=generator), step)
        ids.append(step)
        if time.monotonic() - start > seconds and len(ids) > 32:  # a pool of text must hold at least one whole block
            break
    return torch.cat(ids, dim=1)


@torch.no_grad()
def recall_accuracy(model: hf.Qwen3_5ForCausalLM, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Share of prompts whose greedy continuation is the answer (teacher forcing decides the same for a whole match)."""
    hits = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
        logits = model(ids, use_cache=False).logits[0]
        hits += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return hits / len(prompts)
