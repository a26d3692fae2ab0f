"""``pydflash generate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, Model, ShowStats, engine_options, sampling_options
from pydflash.cli.show import print_stats, print_stream
from pydflash.config import Settings
from pydflash.sampling_params import SamplingParams

__all__ = ["generate"]


@engine_options()
@sampling_options()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Raw prompt; - reads it from stdin.")] = "-",
    draft: Draft = None,
    *,
    settings: Settings,
    params: SamplingParams,
    stats: ShowStats = False,
) -> None:
    """Continue a raw prompt."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_engine(model, draft, settings) as engine:
        done = print_stream(engine, text, params)
        if stats:
            print_stats(done.stats)
