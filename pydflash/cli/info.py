"""``pydflash info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydflash.cli.show import LINES, columns, progress_bar
from pydflash.control_chars import escape_controls
from pydflash.sampling_params import recommendations

if TYPE_CHECKING:
    from pydflash.files import GGUFFile

__all__ = ["info"]


def info(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    check: Annotated[
        bool, typer.Option("--check", help="Read all tensors and look for NaN and infinities; exit code 1 if any.")
    ] = False,
) -> None:
    """Say what a GGUF file holds. Reads its header only, unless --check is given."""
    from pydflash.files import GGUFFile

    with GGUFFile.open(file) as opened:
        _print_contents(opened)
        if check and not _print_damage(opened):
            raise typer.Exit(1)


def _print_contents(opened: GGUFFile) -> None:
    described = opened.describe()
    template = opened.metadata.get("tokenizer.chat_template")
    types = described.pop("types")
    described |= {f"tokenizer {key}": value for key, value in described.pop("tokenizer").items()}
    rows = [(name.replace("_", " "), _plain(value)) for name, value in described.items()]
    rows += [(r.label, r.shown) for r in recommendations(opened.metadata)]
    columns(rows)
    print()
    counts = ("tensors", "parameters", "bytes")
    columns([("type", *counts), *((name, *(f"{entry[c]:,}" for c in counts)) for name, entry in types.items())])
    if template:
        print(f"\nchat template\n{escape_controls(str(template), keep=LINES)}")


def _print_damage(opened: GGUFFile) -> bool:
    """Print which tensors are damaged; True if none is."""
    from pydflash.files.gguf_check import damaged_tensors

    with progress_bar("checking") as progress:
        damaged = list(damaged_tensors(opened, progress))
    if not damaged:
        print(f"\nchecked: no NaN or infinity in {len(opened.tensors):,} tensors")
        return True
    print(f"\ndamaged: {len(damaged):,} of {len(opened.tensors):,} tensors hold NaN or infinities; get the file again")
    rows = [(d.name, d.type.name, f"{d.values:,}", str(list(d.first))) for d in damaged]
    columns([("tensor", "type", "values", "first index"), *rows])
    return False


def _plain(value: Any) -> str:
    if value is None:
        return "not said"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
