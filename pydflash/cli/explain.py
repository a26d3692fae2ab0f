"""``pydflash explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, engine_options
from pydflash.cli.show import LINES
from pydflash.config import EngineConfig, Settings, table
from pydflash.control_chars import escape_controls

__all__ = ["explain"]


@engine_options()
def explain(
    model: Annotated[Path | None, typer.Argument(help="GGUF file; without one, only the settings.")] = None,
    draft: Draft = None,
    *,
    settings: Settings,
) -> None:
    """Print every effective setting and where it came from."""
    if model is None:
        print(escape_controls(table(EngineConfig.resolve(**settings).settings()), keep=LINES))
        return
    with open_engine(model, draft, settings) as engine:
        print(escape_controls(engine.explain(), keep=LINES))
