"""``pydflash ab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydflash.cli.options import Draft, Model, engine_options
from pydflash.cli.show import LINES, note, progress_bar
from pydflash.config import Settings
from pydflash.control_chars import escape_controls

__all__ = ["ab"]


@engine_options()
def ab(
    model: Model,
    a: Annotated[
        list[str] | None,
        typer.Option(help="Settings of arm A: NAME=VALUE,..., of those that explain lists, or speculate=false."),
    ] = None,
    b: Annotated[
        list[str] | None,
        typer.Option(help="Settings of arm B: NAME=VALUE,..., of those that explain lists, or speculate=false."),
    ] = None,
    draft: Draft = None,
    *,
    settings: Settings,
    repeats: Annotated[int, typer.Option(help="Pairs of runs; at least 6.")] = 7,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each random prompt.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate in each run.")] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help='File of JSON lines with a "prompt" each, instead of random prompts.')
    ] = None,
    within: Annotated[float | None, typer.Option(help="Margin of equivalence in percent.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios of all repeats to this file.")] = None,
) -> None:
    """Compare two configurations: speed with intervals and a noise floor, outputs, acceptance. The settings that are
    options hold for both arms.
    """
    from pydflash.files import check_output
    from pydflash.measure import ab as harness
    from pydflash.measure import ab_plot, ab_report

    arms = [harness.parse_arm(n, t or (), settings, draft=draft is not None) for n, t in (("A", a), ("B", b))]
    protocol = ab_report.Protocol(repeats, prompt_tokens, max_tokens, prompts, within)
    for path in (json, plot):  # a file that cannot be written is reported before anything is measured
        if path is not None:
            check_output(path, [source for source in (model, draft, prompts) if source is not None])
    if plot is not None:
        ab_plot.pyplot()
    with progress_bar("loading") as progress:
        report = harness.compare(model, draft, arms[0], arms[1], protocol, progress=progress, note=note)
    print(escape_controls(str(report), keep=LINES))
    if json is not None:
        report.write_json(json)
    if plot is not None:
        ab_plot.plot(report, plot)
