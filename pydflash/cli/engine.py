"""An engine for a command, with a progress bar while it loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydflash.cli.show import progress_bar
from pydflash.config import Settings

if TYPE_CHECKING:
    from pydflash.engine import Engine

__all__ = ["open_engine"]


@contextmanager
def open_engine(model: Path, draft: Path | None, settings: Settings) -> Iterator[Engine]:
    """The engine of ``model`` and ``draft``, closed at the end."""
    from pydflash.engine import Engine

    with progress_bar("loading") as progress:
        engine = Engine.load(model, draft, progress=progress, **settings)
    with engine:
        yield engine
