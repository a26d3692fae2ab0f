"""``pydflash convert-draft``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pydflash.cli.show import note, progress_bar

__all__ = ["convert_draft"]


def convert_draft(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and *.safetensors.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="GGUF file to write.", show_default=False)],
    target: Annotated[Path, typer.Option(help="GGUF file of the model the draft is for.", show_default=False)],
    type: Annotated[str, typer.Option(help="Type of the matrices: q8_0, q4_0, f16, bf16 or f32.")] = "q8_0",
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Tensors and keys of config.json that may stay unused. May be given several times."),
    ] = None,
) -> None:
    """Convert a DFlash draft from Hugging Face's files to GGUF."""
    from pydflash.files.convert import convert_draft as convert

    with progress_bar("converting") as progress:
        size = convert(source, output, target=target, type=type, progress=progress, ignore=ignore or ())
    note(f"{output}: {size:,} bytes")
