r"""Is speculation lossless? Greedy decoding with and without a draft over many prompts, compared token by token.

    python -m benchmarks.lossless TARGET DRAFT --prompts tests/data/held_out.jsonl --tokens 256 --device cuda \
        --json out.json

Without ``--prompts``, one prompt of random tokens. Exits with 1 when any token differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydflash.decode import Sampler, SamplingParams, autoregressive, collect, speculative
from pydflash.drafts import CycleCosts, DraftSession, ProposalLength, adapts, load_draft
from pydflash.files import replacing
from pydflash.models import load_model
from pydflash.runtime import Session


def read_prompts(path: Path | None, encode: Any, vocab: int, count: int) -> list[list[int]]:
    """Token ids of the file's ``prompt`` fields that have a continuation, or one random prompt of 64 tokens."""
    if path is None:
        return [np.random.default_rng(0).integers(0, vocab, 64).tolist()]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [encode(row["prompt"]) for row in rows if "continuation" in row][:count]


def compare(
    session: Session, draft: DraftSession, prompt: Sequence[int], tokens: int, adaptive: bool
) -> dict[str, Any]:
    """One prompt both ways: the tokens' hash, whether they agree, seconds and acceptance."""
    greedy = Sampler(SamplingParams(), session.model.config.vocab)
    session.reset()
    draft.reset()
    expected, plain = collect(autoregressive(session, prompt, greedy, max_tokens=tokens))
    session.reset()
    draft.reset()
    length = ProposalLength(CycleCosts()) if adaptive else None
    found, fast = collect(speculative(session, draft, prompt, greedy, max_tokens=tokens, length=length))
    return {
        "equal": expected == found,
        "sha256": hashlib.sha256(np.asarray(expected, np.int32).tobytes()).hexdigest(),
        "tokens": len(expected),
        "autoregressive_seconds": plain.decode_seconds,
        "speculative_seconds": fast.decode_seconds,
        "steps": fast.steps,
        "proposals": fast.drafted_per_position[0] if fast.drafted else 0,
        "trace": fast.trace,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=10**6, help="prompts to take from the file")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-k", default="f16")
    parser.add_argument("--cache-v", default="f16")
    parser.add_argument("--adaptive", action=argparse.BooleanOptionalAction, help="lengths of proposals [on the CPU]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with load_model(args.target, args.device, threads=args.threads) as model, load_draft(args.draft, model) as draft:
        prompts = read_prompts(args.prompts, model.tokenizer.encode, model.config.vocab, args.count)
        adaptive = adapts(args.adaptive, model.backend)
        context = max(map(len, prompts)) + args.tokens + 16
        begin = time.perf_counter()
        with (
            Session(model, context, args.cache_k, args.cache_v, capture=draft.config.taps) as session,
            DraftSession(draft, session) as proposer,
        ):
            compare(session, proposer, prompts[0], min(args.tokens, 32), adaptive)  # builds the graphs
            rows = [compare(session, proposer, prompt, args.tokens, adaptive) for prompt in prompts]
        device = model.backend.description
    total = {
        key: sum(row[key] for row in rows)
        for key in ("tokens", "steps", "proposals", "autoregressive_seconds", "speculative_seconds")
    }
    differing = [i for i, row in enumerate(rows) if not row["equal"]]
    summary = {
        "device": device,
        "prompts": len(rows),
        "adaptive": adaptive,
        "differing": differing,
        "tokens_per_step": (total["tokens"] - len(rows)) / total["steps"],
        "speedup": total["autoregressive_seconds"] / total["speculative_seconds"],
        **total,
        "seconds": time.perf_counter() - begin,
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps({"summary": summary, "rows": rows}).encode())
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
