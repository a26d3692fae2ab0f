"""Which kernels take the time of a decode step and of a DFlash cycle on a CUDA device?

    python -m benchmarks.kernel_times MODEL --draft DRAFT --draft-max 15 --top 14

Traces every kernel of a few warmed-up steps with CUPTI, through PyTorch's profiler: PyTorch must be installed, and does
nothing else here. Kernels inside replayed CUDA graphs are seen as well. Per step: launches, microseconds, and their
share of the wall time of the same steps; what is left of it is gaps between kernels. Tracing itself slows steps down a
little: compare shares, and take absolute times from pydflash bench.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    from torch.profiler import ProfilerActivity, profile
except ImportError:
    raise SystemExit("benchmarks.kernel_times needs PyTorch: pip install torch") from None

from pydflash.config import EngineConfig
from pydflash.drafts import load_draft
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


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces and arguments; template arguments that are numbers stay."""
    name = re.sub(r"\((?!anonymous).*$", "", kernel.replace("(anonymous namespace)::", "").removeprefix("void "))
    return re.sub(r"\w+::", "", name)[:60]


def trace(run: Callable[[], object]) -> tuple[dict[str, tuple[int, float]], float]:
    """Launches and microseconds of each kernel that ``run`` starts, and its wall time in microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        run()
        wall = 1e6 * (time.perf_counter() - begin)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            kernels[short_name(event.name)].append(event.device_time)
    return {name: (len(times), sum(times)) for name, times in kernels.items()}, wall


def show(what: str, kernels: dict[str, tuple[int, float]], wall: float, steps: int, top: int, report: Report) -> None:
    """The table of one kind of step, the costliest kernels first."""
    busy = sum(time for _, time in kernels.values())
    print(f"\n{what}: {wall / steps:.0f} us a step, kernels {busy / steps:.0f} us ({100 * busy / wall:.1f} %)")
    for name, (count, microseconds) in sorted(kernels.items(), key=lambda item: -item[1][1])[:top]:
        share = 100 * microseconds / wall
        settings: dict[str, str | int] = {"launches": f"{count / steps:.1f}", "share": f"{share:.1f} %"}
        report.add(Result(f"{what}: {name}", "us", [microseconds / steps], settings))


def trace_decode(model: Model, steps: int) -> tuple[dict[str, tuple[int, float]], float]:
    with Session(model, CYCLE_PROMPT + 3 * steps + 16) as session:
        feed(session, random_ids(model.config.vocab, CYCLE_PROMPT))
        decode_speed(session, steps, 1)
        return trace(lambda: decode_speed(session, steps, 1))


def trace_cycles(bench: CycleBench, proposed: int, steps: int) -> tuple[dict[str, tuple[int, float]], float]:
    bench.run(proposed, 1, steps, split=False)
    bench.fill()

    def cycles() -> None:
        anchor = 0
        for _ in range(steps):
            _, anchor = bench.cycle(anchor, proposed, 1, False)

    cycles()
    return trace(cycles)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_times", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--draft-max", type=int, default=15)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--top", type=int, default=14, help="kernels to list")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    options = parser.parse_args(arguments)
    with load_model(options.model, options.device) as model:
        report = Report(options.json, model=options.model.name, device=model.backend.description)
        steps = options.steps
        # decode_speed warms up with three steps more than it counts.
        show("decode", *trace_decode(model, steps), steps + 3, options.top, report)
        if options.draft is not None:
            with (
                load_draft(options.draft, model) as draft,
                CycleBench(model, draft, EngineConfig(max_context=cycle_context(4 * steps, 1))) as bench,
            ):
                what = f"cycle of {options.draft_max + 1} rows"
                show(what, *trace_cycles(bench, options.draft_max, steps), steps, options.top, report)


if __name__ == "__main__":
    main()
