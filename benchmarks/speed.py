"""Sweeps of prefill, decode and cycle speed over cache types, chunks, depths and widths; ``pydflash.bench`` measures.

    python -m benchmarks.speed MODEL --draft DRAFT --device cuda --prefill 512,2048 --depth 0,32768 --json OUT

``pydflash bench`` is the same for one configuration. Every result is a line of JSON, appended to OUT when it is known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydflash.config import EngineConfig
from pydflash.drafts import load_draft
from pydflash.measure.bench import Report, Result, cycle_results, decode_results, prefill_results
from pydflash.models import Model, load_model


def _config(options: argparse.Namespace, pair: int = 0, chunk: int | None = None) -> EngineConfig:
    """The configuration for a pair of cache types; ``chunk`` is the last one unless given."""
    return EngineConfig.resolve(
        device=options.device, threads=options.threads, cache_k=options.cache_k[pair], cache_v=options.cache_v[pair],
        chunk=chunk or options.chunk[-1],
    )  # fmt: skip


def _results(model: Model, options: argparse.Namespace) -> Iterator[Result]:
    if options.draft is not None:
        with load_draft(options.draft, model) as draft:
            yield from cycle_results(model, draft, _config(options), options.draft_max, options.cycles)
    if options.decode:
        for depth in options.depth:
            for pair in range(len(options.cache_k)):
                yield from decode_results(model, _config(options, pair), options.decode, [depth], options.repeats)
    if options.prefill:
        for chunk in options.chunk:
            yield from prefill_results(model, _config(options, chunk=chunk), options.prefill, options.repeats)


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
        for result in _results(model, options):
            report.add(result)


if __name__ == "__main__":
    main()
