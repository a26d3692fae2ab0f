"""``pydflash generate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, Model, SamplingChoice, ShowStats, engine_options, sampling_options
from pydflash.cli.show import note_sampling, print_stats, print_stream
from pydflash.config import Settings
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
    sampling: SamplingChoice,
    special: Annotated[str, typer.Option(help=SPECIAL.help, metavar="TEXT")] = SPECIAL.default,
    stats: ShowStats = False,
) -> None:
    """Continue a raw prompt. Options that are not given follow the model file where it recommends values."""
    read_as = SPECIAL.read(special, "--special")
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_engine(model, draft, settings) as engine:
        note_sampling(engine, sampling.given)
        done = print_stream(engine, text, sampling.params(engine.recommended), special=read_as)
        if stats:
            print_stats(done.stats)
