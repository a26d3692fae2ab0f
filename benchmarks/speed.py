"""Speed of prefill, decode and DFlash cycles, by llama-bench's definitions.

    python -m benchmarks.speed MODEL --draft DRAFT --device cuda --prefill 512,2048 --depth 0,32768 --json OUT

pp N: N random tokens into an empty sequence, head of the last row, until its argmax is on the host. tg N @ d: N
single-token steps of random tokens after d random ones, argmax on the host after each. cycle n/a: one DFlash cycle
that proposes n tokens, verifies n + 1 rows and keeps a + 1 of them, whatever was proposed; its parts are timed with a
synchronisation after each, the total without. Warm-up runs (they build graphs) are not counted. Every result is a line
of JSON, appended to OUT when it is known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pydflash.draft import Draft, DraftSession, load_draft
from pydflash.models import Model, load_model
from pydflash.session import Session

CYCLE_PROMPT = 512
"""Tokens before the first DFlash cycle."""
WARM_CYCLES = 3


@dataclass
class Result:
    """One measured quantity. ``values``: one a repeat, in ``unit``; ``settings``: what it was measured at."""

    what: str
    unit: str
    values: list[float]
    settings: dict[str, str | int] = field(default_factory=dict)
    median: float = 0.0
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        self.median, self.mean = statistics.median(self.values), statistics.fmean(self.values)
        self.low, self.high = min(self.values), max(self.values)

    def __str__(self) -> str:
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        spread = f"({self.low:.3f}..{self.high:.3f}, n={len(self.values)})"
        return f"{self.what:18} {self.median:10.3f} {self.unit:6} {spread}  {settings}"


class Report:
    """Prints results and appends each to a file of JSON lines at once; a run that is cut short loses nothing."""

    def __init__(self, path: Path | None, **common: str | int) -> None:
        """``common``: settings that every result carries."""
        self.path, self.common = path, common

    def add(self, result: Result) -> Result:
        result.settings = {**self.common, **result.settings}
        print(result, flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        return result


def random_ids(model: Model, count: int, seed: int = 0) -> list[int]:
    """``count`` uniformly drawn token ids."""
    ids: list[int] = np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()
    return ids


def feed(session: Session, ids: Sequence[int], draft: DraftSession | None = None) -> int:
    """Commit ``ids`` chunk by chunk, their features to ``draft`` as well; the next token, when the device is done."""
    for start in range(0, len(ids), session.chunk):
        piece = ids[start : start + session.chunk]
        last = start + len(piece) == len(ids)
        output = session.forward(piece, "last" if last else "none")
        session.commit(len(piece))
        if draft is not None:
            draft.keep(len(piece))
            if not last:
                draft.flush()
    return int(output.argmax[0])


def prefill_speed(session: Session, count: int, repeats: int) -> list[float]:
    """Prompt tokens per second of a fresh sequence of ``count`` tokens, one value a repeat."""
    speeds = []
    for repeat in range(1 + repeats):
        ids = random_ids(session.model, count, repeat)
        session.reset()
        begin = time.perf_counter()
        feed(session, ids)
        speeds.append(count / (time.perf_counter() - begin))
    return speeds[1:]


def decode_speed(session: Session, count: int, repeats: int) -> list[float]:
    """Tokens per second of ``count`` single-token steps from the session's length on, one value a repeat.

    Each repeat continues where the last one ended, so that a deep sequence is filled once.
    """
    ids = random_ids(session.model, count)
    for token in ids[:WARM_CYCLES]:
        _step(session, token)
    speeds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for token in ids:
            _step(session, token)
        speeds.append(count / (time.perf_counter() - begin))
    return speeds


def _step(session: Session, token: int) -> int:
    output = session.forward([token])
    session.commit(1)
    return int(output.argmax[0])


@dataclass
class Cycles:
    """Seconds of DFlash cycles: ``total`` unsynchronised, the parts each followed by a synchronisation."""

    total: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)


class CycleBench:
    """A target and a draft session that run DFlash cycles with a given number of accepted tokens."""

    def __init__(self, model: Model, draft: Draft, context: int, cache_k: str, cache_v: str) -> None:
        """``context``: positions; ``CYCLE_PROMPT`` of them are filled before each measurement."""
        self.session = Session(model, context, cache_k, cache_v, capture=draft.config.taps)
        self.draft = DraftSession(draft, self.session)

    def __enter__(self) -> CycleBench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.draft.close()
        self.session.close()

    def fill(self, count: int = CYCLE_PROMPT) -> None:
        """Start over with ``count`` random tokens."""
        self.session.reset()
        self.draft.reset()
        feed(self.session, random_ids(self.session.model, count), self.draft)

    def run(self, proposed: int, kept: int, cycles: int, *, split: bool = True) -> Cycles:
        """Time cycles of ``proposed`` tokens that keep ``kept`` rows, 1..proposed + 1; with ``split`` the parts too."""
        seconds = Cycles()
        for parts in (False, True) if split else (False,):
            self.fill()
            anchor = 0
            for cycle in range(WARM_CYCLES + cycles):
                times, anchor = self.cycle(anchor, proposed, kept, parts)
                if cycle < WARM_CYCLES:
                    continue
                if parts:
                    for series, value in zip((seconds.draft, seconds.verify, seconds.rest), times):
                        series.append(value)
                else:
                    seconds.total.append(sum(times))
        return seconds

    def cycle(self, anchor: int, proposed: int, kept: int, synchronise: bool) -> tuple[tuple[float, float, float], int]:
        """Seconds of draft, verify and rest, and the next anchor: the target's token after the last kept row."""
        backend = self.session.model.backend
        begin = time.perf_counter()
        proposal = self.draft.propose(anchor, proposed)
        if synchronise:
            backend.synchronize()
        drafted = time.perf_counter()
        output = self.session.forward(proposal, "all")
        chosen, ids = output.argmax, proposal.ids
        verified = time.perf_counter()
        (chosen[:-1] == ids[1:]).cumprod().sum()  # what acceptance costs; the count kept is given
        self.session.commit(kept)
        self.draft.keep(kept)
        if synchronise:
            backend.synchronize()
        end = time.perf_counter()
        return (drafted - begin, verified - drafted, end - verified), int(chosen[kept - 1])


def cycle_context(cycles: int, kept: int) -> int:
    """Positions that a measurement of ``cycles`` cycles keeping ``kept`` rows needs."""
    return CYCLE_PROMPT + (WARM_CYCLES + cycles) * kept + 32


def _cycle_results(model: Model, draft: Draft, options: argparse.Namespace) -> Iterator[Result]:
    longest = cycle_context(options.cycles, draft.config.block_size)
    for proposed in (n for n in options.draft_max if n < draft.config.block_size):
        with CycleBench(model, draft, longest, options.cache_k[0], options.cache_v[0]) as bench:
            for accepted in sorted({0, proposed}):
                seconds = bench.run(proposed, accepted + 1, options.cycles)
                settings: dict[str, str | int] = {
                    "draft_max": proposed,
                    "accepted": accepted,
                    "cache": _pair(options, 0),
                }
                for part in ("total", "draft", "verify", "rest"):
                    values = [1e3 * value for value in getattr(seconds, part)]
                    yield Result(f"cycle {proposed}/{accepted} {part}", "ms", values, settings)


def _prefill_results(model: Model, options: argparse.Namespace) -> Iterator[Result]:
    for chunk in options.chunk:
        with Session(model, max(options.prefill), options.cache_k[0], options.cache_v[0], chunk=chunk) as session:
            for count in options.prefill:
                settings: dict[str, str | int] = {"chunk": chunk, "cache": _pair(options, 0)}
                yield Result(f"pp{count}", "tok/s", prefill_speed(session, count, options.repeats), settings)


def _decode_results(model: Model, options: argparse.Namespace) -> Iterator[Result]:
    for depth in options.depth:
        for pair, (cache_k, cache_v) in enumerate(zip(options.cache_k, options.cache_v)):
            context = depth + WARM_CYCLES + options.repeats * options.decode
            with Session(model, context, cache_k, cache_v, chunk=options.chunk[-1]) as session:
                settings: dict[str, str | int] = {"depth": depth, "cache": _pair(options, pair)}
                if depth:
                    begin = time.perf_counter()
                    feed(session, random_ids(model, depth))
                    yield Result(f"fill{depth}", "tok/s", [depth / (time.perf_counter() - begin)], settings)
                values = decode_speed(session, options.decode, options.repeats)
                yield Result(f"tg{options.decode}@{depth}", "tok/s", values, settings)


def _pair(options: argparse.Namespace, index: int) -> str:
    return f"{options.cache_k[index]}-{options.cache_v[index]}"


def numbers(text: str) -> list[int]:
    """'512,2048' as a list; an empty text is an empty list."""
    return [int(part) for part in text.split(",") if part]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="measure DFlash cycles with this draft")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--prefill", type=numbers, default=[512, 2048], metavar="N,...", help="prompt lengths; '' for none"
    )
    parser.add_argument(
        "--decode", type=int, default=64, metavar="N", help="single-token steps of a repeat; 0 for none"
    )
    parser.add_argument("--depth", type=numbers, default=[0], metavar="N,...", help="positions before the decode steps")
    parser.add_argument("--cache-k", type=lambda t: t.split(","), default=["f16"], metavar="TYPE,...")
    parser.add_argument(
        "--cache-v", type=lambda t: t.split(","), default=["f16"], metavar="TYPE,...", help="one for each K type"
    )
    parser.add_argument(
        "--chunk", type=numbers, default=[512], metavar="N,...", help="rows of a prefill step; depth uses the last"
    )
    parser.add_argument("--draft-max", type=numbers, default=[15, 7, 3], metavar="N,...", help="tokens to propose")
    parser.add_argument("--cycles", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    options = parser.parse_args(arguments)
    if len(options.cache_k) != len(options.cache_v):
        parser.error(
            f"{len(options.cache_k)} K types and {len(options.cache_v)} V types; give one V type for each K type"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    begin = time.perf_counter()
    with load_model(options.model, options.device, threads=options.threads) as model:
        report = Report(
            options.json, model=options.model.name, device=model.backend.description, threads=model.backend.threads
        )
        print(
            f"{options.model.name} on {model.backend.description}, loaded in {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
        if options.draft is not None:
            with load_draft(options.draft, model) as draft:
                for result in _cycle_results(model, draft, options):
                    report.add(result)
        if options.decode:
            for result in _decode_results(model, options):
                report.add(result)
        if options.prefill:
            for result in _prefill_results(model, options):
                report.add(result)


if __name__ == "__main__":
    main()
