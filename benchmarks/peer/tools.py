"""Run llama.cpp's own benchmark programs and read what they print."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PeerCycle", "PeerError", "PeerSpeed", "bench", "cycle", "library_path"]


class PeerError(RuntimeError):
    """A program of the peer failed, ran out of time, or printed something else than expected."""


@dataclass(frozen=True)
class PeerSpeed:
    """One test of llama-bench. ``values``: tokens per second, one a repeat."""

    prompt: int
    generated: int
    depth: int
    ubatch: int
    cache: str
    values: list[float]


@dataclass(frozen=True)
class PeerCycle:
    """A run of llama-speculative-simple: milliseconds of a cycle, and of its draft where the program tells.

    ``cycles``: proposals made. ``drafted``, ``accepted``: mean tokens proposed and kept of one. ``total_ms``: all
    after the prompt, divided by the cycles.
    """

    prompt: int
    cycles: int
    drafted: float
    accepted: float
    total_ms: float
    draft_ms: float | None
    log: str


def library_path(extra: Sequence[Path] = ()) -> dict[str, str]:
    """The environment with ``extra`` and the folders of pip's CUDA packages in the loader's path."""
    folders = [str(path) for path in extra]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folders += sorted(str(path) for path in Path(root).glob("*/lib"))
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": ":".join([*folders, *([inherited] if inherited else [])])}


def _run(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None) -> tuple[str, str]:
    """Standard output and error of a command. Raises PeerError."""
    environment = environment if environment is not None else library_path()
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=timeout, env=environment, stdin=subprocess.DEVNULL, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(
            f"{Path(command[0]).name} was stopped after {timeout:.0f} s: {' '.join(command[1:])}"
        ) from error
    except OSError as error:
        raise PeerError(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise PeerError(f"{Path(command[0]).name} {' '.join(command[1:])} ended with {done.returncode}:\n{tail}")
    return done.stdout, done.stderr


def bench(
    program: Path,
    model: Path,
    arguments: Sequence[str],
    *,
    repeats: int,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[PeerSpeed]:
    """llama-bench with ``arguments`` (its own options), one PeerSpeed a test. Raises PeerError."""
    command = [str(program), "-m", str(model), "-r", str(repeats), "-o", "jsonl", *arguments]
    out, _ = _run(command, timeout, environment)
    tests = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not tests:
        raise PeerError(f"{program.name} printed no result: {out[-400:]!r}")
    return [
        PeerSpeed(
            test["n_prompt"],
            test["n_gen"],
            test["n_depth"],
            test["n_ubatch"],
            f"{test['type_k']}-{test['type_v']}",
            test["samples_ts"],
        )
        for test in tests
    ]


def cycle(
    program: Path,
    model: Path,
    draft: Path,
    draft_max: int,
    tokens: int,
    arguments: Sequence[str] = (),
    *,
    words: int = 100,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> PeerCycle:
    """llama-speculative-simple with its DFlash, greedy: ``tokens`` tokens after ``words`` words. Raises PeerError."""
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(" ".join(f"word{i % 97}" for i in range(words)))
        command = [str(program), "-m", str(model), "-md", str(draft), "--spec-type", "draft-dflash"]
        command += ["--spec-draft-n-max", str(draft_max), "-n", str(tokens), "-f", str(prompt), "-c", "4096"]
        command += ["--temp", "0", "--ignore-eos", "-lv", "4", *arguments]
        out, err = _run(command, timeout, environment)
    return parse_cycle(out + "\n" + err)


def parse_cycle(log: str) -> PeerCycle:
    """What llama-speculative-simple prints at its end. Raises PeerError."""
    encoded = re.search(r"encoded\s+(\d+) tokens in", log)
    decoded = re.search(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds", log)
    calls = re.search(r"statistics\s+draft-dflash: #calls\(b,g,a\) =\s*\d+\s+(\d+)\s+(\d+)(.*)", log)
    if encoded is None or decoded is None or calls is None:
        raise PeerError(f"no statistics in the output of llama-speculative-simple; it ends with:\n{log[-1500:]}")
    cycles = int(calls.group(1))
    made, kept = (re.search(rf"#{name} tokens =\s*(\d+)", calls.group(3)) for name in ("gen", "acc"))
    times = re.search(r"dur\(b,g,a\) = [\d.]+, ([\d.]+), [\d.]+ ms", calls.group(3))
    return PeerCycle(
        prompt=int(encoded.group(1)),
        cycles=cycles,
        drafted=int(made.group(1)) / cycles if made and cycles else 0.0,
        accepted=int(kept.group(1)) / cycles if kept and cycles else 0.0,
        total_ms=1e3 * float(decoded.group(2)) / max(cycles, 1),
        draft_ms=float(times.group(1)) / cycles if times and cycles else None,
        log=log,
    )
