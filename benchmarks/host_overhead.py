"""Host time of a decode step, in microseconds per token, and what a busy Python thread beside it costs.

    python -m benchmarks.host_overhead MODEL [--tokens 256] [--json OUT]

Host time is wall clock minus the call that copies inputs in, runs the graph and copies results out. Measured on the
CPU, where that call ends when the graph is computed, with a model so small that the host's share shows. 'loop' is
``decode.autoregressive`` with a greedy sampler; 'engine' is ``Engine.stream``, text and statistics included; 'beside a
busy thread' is the same while another thread of the process runs Python code without a pause.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydflash.decode import Sampler, SamplingParams, autoregressive
from pydflash.engine import Engine
from pydflash.measure.bench import Report, Result, random_ids
from pydflash.models import load_model
from pydflash.native import Graph
from pydflash.native.graph import Copies
from pydflash.runtime import Session

TARGET_MICROSECONDS = 150.0
PROMPT = 64
"""Tokens before the measured ones."""


class GraphClock:
    """Seconds spent inside ``Graph.run`` since the last ``take``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@contextmanager
def timed_graphs() -> Iterator[GraphClock]:
    """Within the block every ``Graph.run`` is timed."""
    clock, run = GraphClock(), Graph.run

    def timed(graph: Graph, *copies: Copies) -> None:
        begin = time.perf_counter()
        run(graph, *copies)
        clock.seconds += time.perf_counter() - begin

    Graph.run = timed  # type: ignore[method-assign, assignment]
    try:
        yield clock
    finally:
        Graph.run = run  # type: ignore[method-assign]


def overheads(steps: Iterable[object], clock: GraphClock, skip: int = 8) -> tuple[list[float], list[float]]:
    """Microseconds outside and inside graphs of each step but the first ``skip``, which warm up."""
    outside, inside = [], []
    begin = time.perf_counter()
    clock.take()
    for _ in steps:
        end = time.perf_counter()
        computed = clock.take()
        outside.append(1e6 * (end - begin - computed))
        inside.append(1e6 * computed)
        begin = time.perf_counter()
    return outside[skip:], inside[skip:]


@contextmanager
def busy_thread() -> Iterator[None]:
    """Within the block another thread runs Python code without a pause."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def speeds(engine: Engine, prompt: Sequence[int], params: SamplingParams, repeats: int = 5) -> list[float]:
    """Tokens per second of some generations."""
    return [engine.generate(prompt, params).stats.tokens_per_second for _ in range(repeats)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    options = parser.parse_args(arguments)
    report = Report(options.json, model=options.model.name, threads=options.threads)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    results = []
    with timed_graphs() as clock:
        with (
            load_model(options.model, "cpu", threads=options.threads) as model,
            Session(model, PROMPT + options.tokens) as session,
        ):
            prompt = random_ids(model.config.vocab, PROMPT)
            sampler = Sampler(params, model.config.vocab)
            loop = autoregressive(session, prompt, sampler, max_tokens=options.tokens)
            results.append(("loop", *overheads(loop, clock)))
        with Engine.load(
            options.model, device="cpu", threads=options.threads, max_context=PROMPT + options.tokens
        ) as engine:
            results.append(("engine", *overheads(engine.stream(prompt, params), clock)))
            alone = speeds(engine, prompt, params)
            with busy_thread():
                beside = speeds(engine, prompt, params)
    for name, outside, inside in results:
        report.add(Result(f"{name} graphs", "us", inside))
        median = report.add(Result(f"{name} host", "us", outside)).median
        verdict = "within" if median <= TARGET_MICROSECONDS else "ABOVE"
        print(f"{name}: {median:.0f} us a token outside ggml, {verdict} the target of {TARGET_MICROSECONDS:.0f} us")
    report.add(Result("engine alone", "tok/s", alone))
    report.add(Result("engine beside a busy thread", "tok/s", beside))


if __name__ == "__main__":
    main()
