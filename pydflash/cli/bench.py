"""``pydflash bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydflash.cli.options import Draft, Model, engine_options
from pydflash.cli.show import progress_bar
from pydflash.config import EngineConfig, Settings

__all__ = ["bench"]


@engine_options(without=("max_context", "adaptive"))  # each measurement chooses its own
def bench(
    model: Model,
    draft: Draft = None,
    *,
    settings: Settings,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option("-p", "--prompt-tokens", help="Tokens to prefill. May be given several times.  [default: 512]"),
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Tokens to decode; 0 for none.")] = 128,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            "-d",
            "--depth",
            help="Tokens in the context before decoding starts. May be given several times.  [default: 0]",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("-r", "--repeats", help="Repeats of each measurement.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Append results to this file, one JSON object per line.")] = None,
) -> None:
    """Measure prefill, decode and, with a draft, its cycles, by llama-bench's definitions."""
    from pydflash.measure import bench as harness

    plan = harness.Plan(tuple(prompt_tokens or (512,)), max_tokens, tuple(depth or (0,)), repeats)
    with progress_bar("loading") as progress:
        harness.bench(model, draft, EngineConfig.resolve(**settings), plan, json, progress=progress)
