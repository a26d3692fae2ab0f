"""``pydflash explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydflash.cli.engine import open_engine
from pydflash.cli.options import Draft, engine_options
from pydflash.config import EngineConfig, Settings, table

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
        print(table(EngineConfig.resolve(**settings).settings()))
        return
    with open_engine(model, draft, settings) as engine:
        print(engine.explain())
