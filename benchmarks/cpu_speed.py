"""Prefill and decode on the CPU against llama-bench: same file, same threads, alternating order.

    python -m benchmarks.cpu_speed MODEL --llama-bench PATH --threads 2 --rounds 4 --json OUT

Each round runs both programs, A B then B A, so that a drift of the machine falls on both. A ratio is the median over
rounds of ours / theirs within a round; its spread over rounds is the noise floor of the comparison.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer import tools
from pydflash.measure.bench import Report, Result, decode_speed, feed, prefill_speed, random_ids
from pydflash.models import Model, load_model
from pydflash.runtime import Session

DECODE_TARGET, PREFILL_TARGET = 0.95, 0.8


def ours(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one round, the model loaded again so that both programs start from the file."""
    with load_model(path, "cpu", threads=options.threads) as model:
        return {"prefill": _prefill(model, options), "decode": _decode(model, options)}


def _prefill(model: Model, options: argparse.Namespace) -> float:
    with Session(model, options.prompt) as session:
        return statistics.fmean(prefill_speed(session, options.prompt, options.repeats))


def _decode(model: Model, options: argparse.Namespace) -> float:
    speeds = []
    with Session(model, options.tokens + 8) as session:
        for _ in range(options.repeats):
            session.reset()
            feed(session, random_ids(model.config.vocab, 1))
            speeds += decode_speed(session, options.tokens, 1)
    return statistics.fmean(speeds)


def theirs(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one round of llama-bench with its own defaults."""
    arguments = [
        "-p",
        str(options.prompt),
        "-n",
        str(options.tokens),
        "-t",
        str(options.threads),
        *options.peer_arguments.split(),
    ]
    tests = tools.bench(options.llama_bench, path, arguments, repeats=options.repeats, timeout=600.0)
    return {"prefill" if test.prompt else "decode": statistics.fmean(test.values) for test in tests}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of a prefill")
    parser.add_argument("--tokens", type=int, default=64, help="steps of a decode")
    parser.add_argument("--repeats", type=int, default=2, help="measurements a program makes in one round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peer-arguments", default="", help="more options for llama-bench, as one text")
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    options = parser.parse_args(arguments)
    report = Report(options.json, model=options.model.name, threads=options.threads)
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for index in range(options.rounds):
        if index % 2:
            peer, own = theirs(options.model, options), ours(options.model, options)
        else:
            own, peer = ours(options.model, options), theirs(options.model, options)
        rounds.append((own, peer))
        print(
            f"round {index + 1}: "
            + ", ".join(f"{k} {own[k]:.1f} / {peer[k]:.1f} = {own[k] / peer[k]:.3f}" for k in own)
        )
    for what, target in (("decode", DECODE_TARGET), ("prefill", PREFILL_TARGET)):
        report.add(Result(f"{what} ours", "tok/s", [own[what] for own, _ in rounds]))
        report.add(Result(f"{what} llama-bench", "tok/s", [peer[what] for _, peer in rounds]))
        ratio = report.add(Result(f"{what} ratio", "", [own[what] / peer[what] for own, peer in rounds])).median
        print(f"{what}: {ratio:.3f} of llama-bench, target {target}: {'met' if ratio >= target else 'MISSED'}")


if __name__ == "__main__":
    main()
