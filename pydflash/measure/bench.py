"""Speed of prefill, decode and DFlash cycles, by llama-bench's definitions.

pp N: N random tokens into an empty sequence, the head for the last row only, until its argmax is on the host. tg N @
d: N single-token steps of random tokens after d random ones, argmax on the host after each. cycle n/a: one DFlash cycle
that proposes n tokens, verifies n + 1 rows and keeps a + 1 of them, whatever was proposed; its parts are timed with a
synchronisation after each, the total without. Warm-up runs (they build graphs) are not counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from pydflash import __version__
from pydflash.config import EngineConfig
from pydflash.drafts import LoadedDraft, Proposer, load_draft
from pydflash.engine import Engine
from pydflash.errors import ConfigError
from pydflash.models import Model, Progress, load_model
from pydflash.runtime import Session

__all__ = [
    "CYCLE_PROMPT",
    "CycleBench",
    "Cycles",
    "Plan",
    "Report",
    "Result",
    "bench",
    "cycle_context",
    "cycle_results",
    "decode_results",
    "decode_speed",
    "feed",
    "prefill_results",
    "prefill_speed",
    "random_ids",
]

CYCLE_PROMPT = 512
"""Tokens before the first DFlash cycle."""
WARM_UPS = 2
"""Runs before the measured ones: the first builds graphs, at the second ggml captures them as CUDA graphs."""
WARM_CYCLES = 3
CYCLES = 32
"""Measured cycles of each kind."""


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
        print(result, flush=True)
        result.settings = {**self.common, **result.settings}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        return result


def random_ids(vocab: int, count: int, seed: int | Sequence[int] = 0) -> list[int]:
    """``count`` uniformly drawn ids of a vocabulary of ``vocab`` tokens."""
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab, count).tolist()
    return ids


def feed(session: Session, ids: Sequence[int], draft: Proposer | None = None) -> int:
    """Commit ``ids`` chunk by chunk, their features to ``draft`` as well; the next token, when the device is done."""
    for output in session.prefill(ids):
        if draft is not None:
            draft.commit(output.count)
    return int(output.argmax[0])


def prefill_speed(session: Session, count: int, repeats: int) -> list[float]:
    """Prompt tokens per second of a fresh sequence of ``count`` tokens, one value a repeat."""
    speeds = []
    for repeat in range(WARM_UPS + repeats):
        ids = random_ids(session.model.config.vocab, count, repeat)
        session.reset()
        begin = time.perf_counter()
        feed(session, ids)
        speeds.append(count / (time.perf_counter() - begin))
    return speeds[WARM_UPS:]


def decode_speed(session: Session, count: int, repeats: int) -> list[float]:
    """Tokens per second of ``count`` single-token steps from the session's length on, one value a repeat.

    Each repeat continues where the last one ended, so that a deep sequence is filled once.
    """
    ids = random_ids(session.model.config.vocab, count)
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

    def __init__(self, model: Model, draft: LoadedDraft, config: EngineConfig) -> None:
        """Before each measurement, ``CYCLE_PROMPT`` of ``config.max_context`` positions are filled."""
        self._engine = Engine.share(model, draft, config)
        assert self._engine.draft_session is not None, "an engine with a draft has a session for it"
        self.session, self.draft = self._engine.session, self._engine.draft_session

    def __enter__(self) -> CycleBench:
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine.close()

    def fill(self, count: int = CYCLE_PROMPT) -> None:
        """Start over with ``count`` random tokens."""
        self.session.reset()
        self.draft.reset()
        feed(self.session, random_ids(self.session.model.config.vocab, count), self.draft)

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
        proposal = self.draft.propose([anchor], proposed)
        assert proposal is not None, "cycles are those of a draft that always proposes"
        if synchronise:
            backend.synchronize()
        drafted = time.perf_counter()
        output = self.session.forward(proposal, "all")
        chosen, ids = output.argmax, proposal.ids
        verified = time.perf_counter()
        (chosen[:-1] == ids[1:]).cumprod().sum()  # what acceptance costs; the count kept is given
        self.session.commit(kept)
        self.draft.commit(kept)
        if synchronise:
            backend.synchronize()
        end = time.perf_counter()
        return (drafted - begin, verified - drafted, end - verified), int(chosen[kept - 1])


def cycle_context(cycles: int, kept: int) -> int:
    """Positions that a measurement of ``cycles`` cycles keeping ``kept`` rows needs."""
    return CYCLE_PROMPT + (WARM_CYCLES + cycles) * kept + 32


def prefill_results(model: Model, config: EngineConfig, counts: Sequence[int], repeats: int) -> Iterator[Result]:
    """pp of each count in ``counts``."""
    with Engine.share(model, None, replace(config, max_context=max(counts, default=1))) as engine:
        for count in counts:
            values = prefill_speed(engine.session, count, repeats)
            yield Result(f"pp{count}", "tok/s", values, {"chunk": config.chunk, "cache": _cache(config)})


def decode_results(
    model: Model, config: EngineConfig, steps: int, depths: Sequence[int], repeats: int
) -> Iterator[Result]:
    """tg of ``steps`` after each depth of ``depths``, and the speed at which a depth was filled."""
    for depth in depths:
        context = depth + WARM_CYCLES + repeats * steps
        with Engine.share(model, None, replace(config, max_context=context)) as engine:
            settings: dict[str, str | int] = {"depth": depth, "cache": _cache(config)}
            if depth:
                begin = time.perf_counter()
                feed(engine.session, random_ids(model.config.vocab, depth))
                yield Result(f"fill{depth}", "tok/s", [depth / (time.perf_counter() - begin)], settings)
            values = decode_speed(engine.session, steps, repeats)
            yield Result(f"tg{steps}@{depth}", "tok/s", values, settings)


def cycle_results(
    model: Model, draft: LoadedDraft, config: EngineConfig, proposed: Sequence[int], cycles: int
) -> Iterator[Result]:
    """Milliseconds of cycles of each width in ``proposed``, with nothing accepted and with everything."""
    longest = cycle_context(cycles, draft.limit + 1)
    for count in (n for n in proposed if n < draft.limit + 1):
        with CycleBench(model, draft, replace(config, max_context=longest)) as bench:
            for accepted in sorted({0, count}):
                seconds = bench.run(count, accepted + 1, cycles)
                settings: dict[str, str | int] = {"draft_max": count, "accepted": accepted, "cache": _cache(config)}
                for part in ("total", "draft", "verify", "rest"):
                    values = [1e3 * value for value in getattr(seconds, part)]
                    yield Result(f"cycle {count}/{accepted} {part}", "ms", values, settings)


@dataclass(frozen=True)
class Plan:
    """What ``bench`` measures: prefill of each of ``prompts`` tokens, ``steps`` decoded tokens after each of
    ``depths``, ``repeats`` values each; 0 tokens are left out. Raises ConfigError for a value outside its range.
    """

    prompts: tuple[int, ...] = (512,)
    steps: int = 128
    depths: tuple[int, ...] = (0,)
    repeats: int = 5

    def __post_init__(self) -> None:
        named = (("prompt_tokens", self.prompts, 0), ("max_tokens", (self.steps,), 0), ("depth", self.depths, 0))
        for name, values, least in (*named, ("repeats", (self.repeats,), 1)):
            if min(values) < least:
                raise ConfigError(f"{name} is {min(values)}; allowed: {least} or more")


def bench(
    model: Path,
    draft: Path | None,
    config: EngineConfig,
    plan: Plan,
    json_path: Path | None = None,
    *,
    progress: Progress | None = None,
) -> list[Result]:
    """Load, measure what ``plan`` says and cycles of ``config.draft_max`` proposed tokens when there is a draft.

    Results are printed and appended to ``json_path`` as they come. ``config.max_context`` is not used: each
    measurement gets the context it needs. Raises ConfigError, LoadError, NoDevice or OutOfMemory.
    """
    with load_model(model, config.device, progress, threads=config.threads) as loaded:
        common = {
            "model": str(model), "draft": str(draft), "device": loaded.backend.description,
            "threads": loaded.backend.threads, "version": __version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        print(f"{model} on {loaded.backend.name} ({loaded.backend.description})", flush=True)
        report = Report(json_path, **common, **_plain(config))
        prompts = [count for count in plan.prompts if count]
        found = [report.add(result) for result in prefill_results(loaded, config, prompts, plan.repeats)]
        if plan.steps:
            results = decode_results(loaded, config, plan.steps, plan.depths, plan.repeats)
            found += [report.add(result) for result in results]
        if draft is not None:
            with closing(load_draft(draft, loaded, progress, causal=config.draft_causal)) as proposer:
                proposed = config.draft_max or proposer.limit
                results = cycle_results(loaded, proposer, config, [proposed], CYCLES)
                found += [report.add(result) for result in results]
    return found


def _plain(config: EngineConfig) -> dict[str, str | int]:
    """The settings that a result carries; those that are not set are left out."""
    unused = ("max_context", "device", "threads", "adaptive")
    return {s.name: s.value for s in config.settings() if s.value is not None and s.name not in unused}


def _cache(config: EngineConfig) -> str:
    return f"{config.cache_k}-{config.cache_v}"
