"""Tokens per second of speculative decoding over acceptance lengths, on models that never agree.

    python -m benchmarks.synthetic_acceptance MODEL DRAFT --device cuda --json OUT [--plot OUT.png]

Random weights cost what real ones cost but accept nothing. Here every cycle really drafts and verifies, then a given
number of rows is committed. The acceptance length counts the bonus token: 1 to block_size. Autoregressive decoding in
the same run is the baseline; the speed-up at a length is what a draft with that mean acceptance length brings.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import numbers
from pydflash.config import EngineConfig
from pydflash.drafts import Draft, load_draft
from pydflash.files import replacing
from pydflash.measure.bench import (
    CYCLE_PROMPT,
    CycleBench,
    Report,
    Result,
    cycle_context,
    decode_speed,
    feed,
    random_ids,
)
from pydflash.models import Model, load_model
from pydflash.runtime import Session


def base_line(model: Model, options: argparse.Namespace) -> Result:
    """Autoregressive tokens per second after the prompt that the cycles start from."""
    steps = 2 * options.cycles
    with Session(model, CYCLE_PROMPT + 4 * steps, options.cache_k, options.cache_v) as session:
        feed(session, random_ids(model.config.vocab, CYCLE_PROMPT))
        return Result(
            "autoregressive",
            "tok/s",
            decode_speed(session, steps, 3),
            {"cache": f"{options.cache_k}-{options.cache_v}"},
        )


def curve(
    model: Model, draft: Draft, options: argparse.Namespace, report: Report, base: float
) -> list[tuple[int, float]]:
    """(acceptance length, tokens per second) for each requested length."""
    points = []
    proposed = min(options.draft_max or draft.config.block_size - 1, draft.config.block_size - 1)
    lengths = [n for n in options.lengths if 1 <= n <= proposed + 1]
    config = EngineConfig.resolve(
        max_context=cycle_context(options.cycles, max(lengths)), cache_k=options.cache_k, cache_v=options.cache_v
    )
    with CycleBench(model, draft, config) as bench:
        for length in lengths:
            seconds = bench.run(proposed, length, options.cycles, split=False).total
            values = [length / value for value in seconds]
            settings: dict[str, str | int] = {"draft_max": proposed, "length": length}
            report.add(Result(f"length {length}", "tok/s", values, settings))
            speed = length / statistics.median(seconds)
            print(f"{'':18} {speed / base:10.3f} times autoregressive", flush=True)
            points.append((length, speed))
    return points


def plot(path: Path, points: Sequence[tuple[int, float]], base: float, title: str) -> None:
    """The curve as a picture; says so and does nothing where matplotlib is missing."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("matplotlib is not installed; no plot")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([length for length, _ in points], [speed for _, speed in points], marker="o", label="DFlash cycle")
    axes.axhline(base, linestyle="--", color="gray", label="autoregressive")
    axes.set(
        xlabel="acceptance length (tokens per verify, bonus token counted)", ylabel="tokens per second", title=title
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, bbox_inches="tight", format=path.suffix[1:] or None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic_acceptance", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--lengths", type=numbers, default=list(range(1, 17)), metavar="N,...")
    parser.add_argument("--draft-max", type=int, help="tokens to propose (default: block_size - 1)")
    parser.add_argument("--cycles", type=int, default=16, help="measured cycles of each length")
    parser.add_argument("--cache-k", default="f16")
    parser.add_argument("--cache-v", default="f16")
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="OUT.png")
    options = parser.parse_args(arguments)
    with (
        load_model(options.model, options.device, threads=options.threads) as model,
        load_draft(options.draft, model) as draft,
    ):
        device = model.backend.description
        report = Report(options.json, model=options.model.name, device=device)
        base = report.add(base_line(model, options)).median
        points = curve(model, draft, options, report, base)
        if options.plot is not None:
            plot(options.plot, points, base, f"{options.model.name}, {device}")


if __name__ == "__main__":
    main()
