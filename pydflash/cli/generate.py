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
from pydflash.text import SPECIAL

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
    special: Annotated[str, typer.Option(help=SPECIAL.help, metavar="TEXT")] = SPECIAL.default,
    stats: ShowStats = False,
) -> None:
    """Continue a raw prompt."""
    read_as = SPECIAL.read(special, "--special")
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_engine(model, draft, settings) as engine:
        done = print_stream(engine, text, params, read_as)
        if stats:
            print_stats(done.stats)
