"""Store PyTorch outputs of the shipped weights, for tests of an engine that loads the same files.

All arrays belong to the rounded weights, in float32, without tensor-core rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from pydflash.files import replacing
from tools.tiny.draft import Draft
from tools.tiny.speculate import Run
from tools.tiny.target import features, observe


@torch.no_grad()
def write_target_reference(path: Path, target: Qwen3_5ForCausalLM, prompts: list[list[int]]) -> int:
    """`ids_i` (T,), `logits_i` (T, vocab) per prompt; `residual_0` (layers, T, hidden) after each layer of prompt 0."""
    device = next(target.parameters()).device
    arrays: dict[str, Any] = {}
    for i, prompt in enumerate(prompts):
        every_layer = list(range(target.config.num_hidden_layers))
        logits, residual = observe(target, torch.tensor([prompt], device=device), every_layer)
        arrays[f"ids_{i}"] = np.array(prompt, np.int32)
        arrays[f"logits_{i}"] = logits[0].cpu().numpy()
        if i == 0:
            arrays["residual_0"] = torch.cat(residual).cpu().numpy()
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return path.stat().st_size


@torch.no_grad()
def write_draft_reference(
    path: Path, target: Qwen3_5ForCausalLM, draft: Draft, prompts: list[list[int]], runs: list[Run], top: int = 64
) -> int:
    """Draft inputs and outputs after each prompt, and the accepted lengths of whole runs.

    Per prompt i: `ids_i` (T,), `features_i` (T, taps * hidden), `h_ctx_i` (T, hidden), `anchor_i` (the token that the
    target chooses after the prompt, at position T), `top_ids_i` and `top_logits_i` (block, top), best first; for
    prompt 0 also `logits_0` (block, vocab). Per run j: `run_ids_j` (prompt), `run_tokens_j` (output), `run_lengths_j`
    (tokens per verify, bonus included, the last one in full); the first output token belongs to no verify.
    """
    device = next(target.parameters()).device
    arrays: dict[str, Any] = {}
    for i, prompt in enumerate(prompts):
        logits, taps = features(target, torch.tensor([prompt], device=device), list(draft.config.target_layer_ids))
        h_ctx = draft.context(taps)
        anchor = logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)
        block = draft(target, anchor, torch.full_like(anchor, len(prompt)), h_ctx)[0, 0]
        best = block.topk(top, dim=-1)
        arrays |= {
            f"ids_{i}": np.array(prompt, np.int32),
            f"features_{i}": taps[0].cpu().numpy(),
            f"h_ctx_{i}": h_ctx[0].cpu().numpy(),
            f"anchor_{i}": np.array(int(anchor), np.int32),
            f"top_ids_{i}": best.indices.cpu().numpy().astype(np.int32),
            f"top_logits_{i}": best.values.cpu().numpy(),
        }
        if i == 0:
            arrays["logits_0"] = block.cpu().numpy()
    for j, run in enumerate(runs):
        arrays[f"run_ids_{j}"] = np.array(run.prompt, np.int32)
        arrays[f"run_tokens_{j}"] = np.array(run.output, np.int32)
        arrays[f"run_lengths_{j}"] = np.array(run.lengths, np.int32)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return path.stat().st_size
