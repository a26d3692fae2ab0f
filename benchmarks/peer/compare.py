"""pydflash and llama.cpp side by side on one device: same files, one run, one table.

    python -m benchmarks.peer.compare MODEL --draft DRAFT --llama-bench PATH --speculative PATH --device cuda --json OUT

The parts run in order of importance: cycle (DFlash), tg (decode at depth 0), pp (prefill), depth (decode after 32,768
tokens). Each side of each part is a separate process with a time limit; a failure is printed and the next part runs.
Every result is appended to OUT as a line of JSON when it is known, and the table is printed after each part, so that
the run can be cut at any time. ``--budget`` seconds after the start no new process is started.

A peer cycle is the decode time of llama-speculative-simple over its number of proposals, first cycles included. It
shortens its last proposals so as not to exceed the requested tokens, which flatters it by a few percent; ours is the
mean over cycles that keep the same number of rows as random weights accept (one, the bonus token), three warm-up
cycles excluded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.peer import tools
from benchmarks.speed import numbers
from pydflash.measure.bench import Report, Result

T = TypeVar("T")
PAIRS = ("f16-f16", "q4_0-q8_0", "q4_0-q4_0", "q8_0-q8_0")
PARTS = ("cycle", "tg", "pp", "depth")


@dataclass
class Table:
    """Rows of (ours, peer) by name; ``lower`` marks quantities of which less is better."""

    ours: dict[str, float] = field(default_factory=dict)
    peer: dict[str, float] = field(default_factory=dict)
    lower: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        lines = [f"{'what':32} {'ours':>10} {'peer':>10} {'ours/peer':>10}"]
        for name in dict.fromkeys([*self.ours, *self.peer]):
            own, peer = self.ours.get(name), self.peer.get(name)
            ratio = f"{own / peer:10.3f}" if own and peer else f"{'-':>10}"
            unit = "ms" if name in self.lower else "tok/s"
            cells = [f"{value:10.2f}" if value is not None else f"{'-':>10}" for value in (own, peer)]
            lines.append(f"{name:32} {cells[0]} {cells[1]} {ratio} {unit}")
        return "\n".join(lines)


class OutOfTime(Exception):
    """The budget is spent."""


class Comparison:
    """Runs the parts and collects the table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.table = options, Table()
        self.report = Report(options.json, side="peer", model=options.model.name)
        self.started = time.monotonic()
        device = options.device
        self.peer_device = ["-ngl", "99", "-fa", "on"] if device != "cpu" else ["-ngl", "0", "-fa", "on"]
        if options.threads:
            self.peer_device += ["-t", str(options.threads)]

    def run(self) -> None:
        """All requested parts, most important first."""
        parts: dict[str, Callable[[], None]] = {
            "cycle": self.cycle,
            "tg": self.decode,
            "pp": self.prefill,
            "depth": self.depth,
        }
        for name in PARTS:
            if name in self.options.parts:
                print(f"--- {name}, {time.monotonic() - self.started:.0f} s after the start", flush=True)
                parts[name]()
                print(self.table, flush=True)

    # --- parts ------------------------------------------------------------------------------------------------------

    def cycle(self) -> None:
        options = self.options
        widths = ",".join(map(str, options.draft_max))
        self.own(
            [
                "--draft",
                str(options.draft),
                "--draft-max",
                widths,
                "--cycles",
                str(options.cycles),
                "--decode",
                "0",
                "--prefill",
                "",
            ]
        )
        for draft_max in options.draft_max:
            self.attempt(self.peer_cycle, draft_max)

    def decode(self) -> None:
        self.own(["--decode", "64", "--depth", "0", "--prefill", "", *self._own_pairs()])
        for pair in self.options.pairs:
            self.attempt(self.peer_bench, ["-p", "0", "-n", "64", *self._peer_pair(pair)])

    def prefill(self) -> None:
        lengths, chunks = (",".join(map(str, values)) for values in (self.options.prefill, self.options.chunk))
        self.own(["--decode", "0", "--prefill", lengths, "--chunk", chunks])
        self.attempt(self.peer_bench, ["-p", lengths, "-n", "0", "-b", "2048", "-ub", chunks])

    def depth(self) -> None:
        depth, chunk = str(self.options.depth), str(self.options.chunk[-1])
        for pair in self.options.pairs:
            k, v = pair.split("-")
            common = ["--decode", "32", "--depth", depth, "--prefill", "", "--chunk", chunk]
            self.own([*common, "--cache-k", k, "--cache-v", v])
            arguments = ["-p", "0", "-n", "32", "-d", depth, "-b", "2048", "-ub", chunk, *self._peer_pair(pair)]
            self.attempt(self.peer_bench, arguments)

    # --- the two sides ----------------------------------------------------------------------------------------------

    def attempt(self, action: Callable[[T], None], argument: T) -> None:
        """Run one process of a part; what goes wrong is printed and recorded, and the next one runs."""
        try:
            action(argument)
        except (tools.PeerError, OSError, ValueError, KeyError, OutOfTime) as error:
            print(f"FAILED: {type(error).__name__}: {error}", flush=True)

    def left(self) -> float:
        """Seconds that a process started now may take. Raises OutOfTime."""
        left = float(self.options.budget) - (time.monotonic() - self.started)
        if left < 5:
            raise OutOfTime(f"the budget of {self.options.budget} s is spent")
        return min(left, 150.0)

    def own(self, arguments: Sequence[str]) -> None:
        """benchmarks.speed as a process; its results are read from its output file even when it fails half way."""
        self.attempt(self._own, arguments)

    def _own(self, arguments: Sequence[str]) -> None:
        options, path = self.options, self.options.json
        before = len(path.read_text().splitlines()) if path.exists() else 0
        command = [sys.executable, "-m", "benchmarks.speed", str(options.model), "--device", options.device]
        command += ["--repeats", str(options.repeats), "--json", str(path), *arguments]
        command += ["--threads", str(options.threads)] if options.threads else []
        try:
            code = subprocess.run(command, timeout=self.left(), check=False).returncode
        except subprocess.TimeoutExpired:
            print("benchmarks.speed was stopped: out of time", flush=True)
        else:
            if code:
                print(f"benchmarks.speed ended with {code}: {' '.join(arguments)}", flush=True)
        for line in (path.read_text().splitlines() if path.exists() else [])[before:]:
            self._enter(json.loads(line))

    def _enter(self, result: dict[str, Any]) -> None:
        """A line of benchmarks.speed as a row of the table."""
        what, settings = result["what"], result["settings"]
        if what.startswith("cycle"):
            self.table.ours[what] = result["mean"]
            self.table.lower.add(what)
        elif what.startswith("pp"):
            self.table.ours[f"{what} ubatch {settings['chunk']}"] = result["median"]
        elif what.startswith("tg"):
            self.table.ours[f"{what} {settings['cache']}"] = result["median"]

    def peer_cycle(self, draft_max: int) -> None:
        options = self.options
        extra = [*self.peer_device, "-ngld", "99" if options.device != "cpu" else "0", "-fit", "off"]
        run = tools.cycle(
            options.speculative,
            options.model,
            options.draft,
            draft_max,
            options.peer_tokens,
            extra,
            timeout=self.left(),
        )
        settings: dict[str, str | int] = {"draft_max": draft_max, "cycles": run.cycles, "prompt": run.prompt}
        settings |= {"accepted": f"{run.accepted:.3f}", "drafted": f"{run.drafted:.2f}"}
        parts = [("total", run.total_ms)]
        if run.draft_ms is not None:
            parts += [("draft", run.draft_ms), ("verify", run.total_ms - run.draft_ms)]
        for part, value in parts:
            name = f"cycle {draft_max}/0 {part}"
            self.table.peer[name] = self.report.add(Result(name, "ms", [value], settings)).mean
            self.table.lower.add(name)

    def peer_bench(self, arguments: Sequence[str]) -> None:
        options = self.options
        tests = tools.bench(
            options.llama_bench,
            options.model,
            [*self.peer_device, *arguments],
            repeats=options.repeats,
            timeout=self.left(),
        )
        for test in tests:
            if test.prompt:
                what, name = f"pp{test.prompt}", f"pp{test.prompt} ubatch {test.ubatch}"
            else:
                what, name = f"tg{test.generated}@{test.depth}", f"tg{test.generated}@{test.depth} {test.cache}"
            settings: dict[str, str | int] = {"chunk": test.ubatch, "depth": test.depth, "cache": test.cache}
            self.table.peer[name] = self.report.add(Result(what, "tok/s", test.values, settings)).median

    def _own_pairs(self) -> list[str]:
        k_types, v_types = zip(*(pair.split("-") for pair in self.options.pairs))
        return ["--cache-k", ",".join(k_types), "--cache-v", ",".join(v_types)]

    @staticmethod
    def _peer_pair(pair: str) -> list[str]:
        k, v = pair.split("-")
        return ["-ctk", k, "-ctv", v]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--speculative", type=Path, required=True, help="the llama-speculative-simple program")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, help="of the CPU, both sides")
    parser.add_argument("--parts", type=lambda t: t.split(","), default=list(PARTS), metavar=",".join(PARTS))
    parser.add_argument(
        "--pairs", type=lambda t: t.split(","), default=list(PAIRS), metavar="K-V,...", help="cache types"
    )
    parser.add_argument("--draft-max", type=numbers, default=[15, 7, 3], metavar="N,...")
    parser.add_argument("--cycles", type=int, default=48)
    parser.add_argument(
        "--peer-tokens", type=int, default=160, help="tokens that the peer generates to measure a cycle"
    )
    parser.add_argument("--prefill", type=numbers, default=[512, 2048], metavar="N,...")
    parser.add_argument(
        "--chunk", type=numbers, default=[512, 2048], metavar="N,...", help="prefill steps; depth uses the last"
    )
    parser.add_argument("--depth", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("--json", type=Path, required=True, help="append results here, one JSON object a line")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    Comparison(options).run()


if __name__ == "__main__":
    main()
