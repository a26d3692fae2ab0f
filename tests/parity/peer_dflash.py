"""llama.cpp's own DFlash, run by the package `xllamacpp` in a process of its own (see peer.py for why).

Usage: ``python -m tests.parity.peer_dflash REQUEST.json``. The results are read from the server's debug log: its answer
has no token ids, and none at all when a random model's bytes are no UTF-8. For every proposed token the log names the
three best candidates.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DRAFT_MAX = 15

Row = list[tuple[int, float]]  # candidates for one token and their probabilities (three decimals), best first

_PROMPT = re.compile(rb"task \d+ \| processing task")
_TOKEN = re.compile(rb"next token: +(\d+) ")
_CANDIDATE = re.compile(rb"draft candidate +(\d+), pos +(\d+): +(\d+) \( *([\d.]+)\)")
_PROPOSAL = re.compile(rb"generate_draft: id=-?\d+, #tokens=(\d+), #draft=\d+")
_COUNTS = re.compile(rb"draft acceptance = [\d.]+ \( *(\d+) accepted / +(\d+) generated\)")


@dataclass
class Generation:
    """One prompt's new tokens, what the server counted, and the 15 rows proposed at each position of an anchor."""

    ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    proposals: dict[int, list[Row]] = field(default_factory=dict)


def peer_speculation(
    target: Path,
    draft: Path,
    prompts: Sequence[Sequence[int]],
    count: int,
    folder: Path,
    *,
    prompt_rows: int = 512,
    float_draft: bool = False,
) -> list[Generation]:
    """Greedy text of up to ``count`` tokens after each prompt, which is evaluated ``prompt_rows`` rows at a time.

    ``float_draft``: K and V of the draft's context are f32 instead of f16.
    """
    question = folder / "request.json"
    request = {"target": str(target), "draft": str(draft), "prompts": prompts, "count": count}
    request |= {"rows": prompt_rows, "float_draft": float_draft}
    question.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "tests.parity.peer_dflash", str(question)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed on {target}:\n{done.stderr[-2000:].decode(errors='replace')}")
    results = _read(done.stderr)
    assert len(results) == len(prompts)
    return results


def _read(log: bytes) -> list[Generation]:
    results: list[Generation] = []
    rows: list[Row] = []
    for line in log.splitlines():
        if _PROMPT.search(line):
            results.append(Generation())
        elif found := _TOKEN.search(line):
            results[-1].ids.append(int(found[1]))
        elif found := _CANDIDATE.search(line):
            rank, row, token = (int(found[i]) for i in (1, 2, 3))
            if rank == row == 0:
                rows = []
            if rank == 0:
                rows.append([])
            rows[row].append((token, float(found[4])))
        elif found := _PROPOSAL.search(line):
            # A replay of what was accepted, after a rollback, names the same position again.
            results[-1].proposals.setdefault(int(found[1]), rows)
        elif found := _COUNTS.search(line):
            results[-1].accepted, results[-1].drafted = int(found[1]), int(found[2])
    return results


def _run(request: dict[str, Any]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["target"]
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.n_batch = params.n_ubatch = request["rows"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Its flash attention on the CPU sums V in f16.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 5  # debug
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
    params.speculative.draft.mparams.path = request["draft"]
    params.speculative.draft.n_max = DRAFT_MAX
    if request["float_draft"]:
        params.speculative.draft.cache_type_k = params.speculative.draft.cache_type_v = params.cache_type_k
    server = xllamacpp.Server(params)
    options = {"n_predict": request["count"], "temperature": 0, "cache_prompt": False, "stream": False}
    for prompt in request["prompts"]:
        try:
            server.handle_completions({"prompt": prompt} | options)
        except RuntimeError as error:
            if "invalid UTF-8" not in str(error):
                raise


if __name__ == "__main__":
    _run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
