"""``pydflash info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pydflash.cli.show import columns

__all__ = ["info"]


def info(file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)]) -> None:
    """Say what a GGUF file holds. Reads its header only."""
    from pydflash.gguf import GGUFFile

    with GGUFFile.open(file) as opened:
        described = opened.describe()
        template = opened.metadata.get("tokenizer.chat_template")
    types = described.pop("types")
    described |= {f"tokenizer {key}": value for key, value in described.pop("tokenizer").items()}
    rows = [(name.replace("_", " "), _plain(value)) for name, value in described.items()]
    columns(rows)
    print()
    counts = ("tensors", "parameters", "bytes")
    columns([("type", *counts), *((name, *(f"{entry[c]:,}" for c in counts)) for name, entry in types.items())])
    if template:
        print(f"\nchat template\n{template}")


def _plain(value: Any) -> str:
    if value is None:
        return "not said"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
