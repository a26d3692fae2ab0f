"""Greedy speculative decoding in plain PyTorch, several prompts at once and without any cache: the reference loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from tools.tiny.draft import Draft
from tools.tiny.target import features


@dataclass
class Run:
    """One prompt's decoding: prompt, output so far, and tokens emitted per step, the bonus token included (1..16)."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output


@torch.no_grad()
def speculate(target: Qwen3_5ForCausalLM, draft: Draft, prompts: list[list[int]], tokens: int) -> list[Run]:
    """Decode every prompt greedily until it has at least `tokens` output tokens; control tokens do not stop it.

    The first output token comes from the prompt's own forward pass; each later step emits the accepted tokens and the
    bonus token. All state is recomputed from the ids in every step, so nothing can be stale: this is the reference.
    """
    layers = list(draft.config.target_layer_ids)
    runs = [Run(list(prompt)) for prompt in prompts]
    device = next(target.parameters()).device
    logits, taps = features(target, _padded([run.ids for run in runs], device), layers)
    for row, run in enumerate(runs):
        run.output.append(int(logits[row, len(run.prompt) - 1].argmax()))
    active = list(range(len(runs)))
    while active:
        start = torch.tensor([len(runs[i].ids) - 1 for i in active], device=device)  # the anchor's position
        anchor = torch.tensor([runs[i].ids[-1] for i in active], device=device)
        # Padding and rejected rows are at or after `start`, where the draft does not look.
        block = draft(target, anchor[:, None], start[:, None], draft.context(taps))[:, 0, 1:].argmax(-1).tolist()
        proposals = [runs[i].ids + block[row] for row, i in enumerate(active)]
        logits, taps = features(target, _padded(proposals, device), layers)
        choice = logits.argmax(-1)
        for row, i in enumerate(active):
            run, at = runs[i], int(start[row])
            verified = choice[row, at : at + len(block[row]) + 1].tolist()
            a = accepted_prefix(block[row], verified)
            run.output += [*block[row][:a], verified[a]]
            run.lengths.append(a + 1)
        going = [row for row, i in enumerate(active) if len(runs[i].output) < tokens]
        taps, active = taps[going], [active[row] for row in going]
    return runs


def accepted_prefix(drafted: list[int], verified: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (d, v) in enumerate(zip(drafted, verified, strict=False)) if d != v), len(drafted))


def acceptance_length(runs: list[Run]) -> float:
    """Mean tokens per step over all steps of all runs, the bonus token included."""
    steps = [length for run in runs for length in run.lengths]
    return sum(steps) / len(steps)


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """Rows of ids, filled up with 0 on the right: causal layers never see the filling."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
