"""The published table: cells as lines of JSON, and as Markdown between two markers of a document.

python -m benchmarks.kv_quality.table out.jsonl docs/kv-cache.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kv_quality.measure import Caches, Quality
from pydflash.errors import ConfigError
from pydflash.files import replacing
from pydflash.kv_format import CACHE_TYPES, K_BASES

__all__ = ["Cell", "Source", "render", "write_between_markers"]

BEGIN, END = "<!-- kv_quality: begin -->", "<!-- kv_quality: end -->"


@dataclass(frozen=True)
class Source:
    """What was measured: a model file, its weights ('file' or 'f32'), outliers ('none' or such as '8x32'), where."""

    model: str
    weights: str
    outliers: str
    device: str

    def __str__(self) -> str:
        weights = "weights as stored" if self.weights == "file" else f"weights as {self.weights}"
        outliers = "no outliers" if self.outliers == "none" else f"outliers {self.outliers}"
        return f"`{self.model}`, {weights}, {outliers} ({self.device})"


@dataclass(frozen=True)
class Cell:
    """One cache on one copy of a model. ``acceptance``: tokens per verify, None without a draft. ``command``: what
    gives this cell alone."""

    source: Source
    caches: Caches
    quality: Quality
    acceptance: float | None
    command: str

    def record(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        """From a line of JSON."""
        quality = dict(record["quality"], recall=tuple(map(tuple, record["quality"]["recall"])))
        return cls(
            Source(**record["source"]), Caches(**record["caches"]), Quality(**quality), record["acceptance"],
            record["command"],
        )  # fmt: skip

    def __str__(self) -> str:
        q = self.quality
        accepted = "" if self.acceptance is None else f"  acceptance {self.acceptance:.2f}"
        return (
            f"{self.source.outliers:6} {self.caches!s:32} KLD {q.kld_mean:.2e}, 99.9 % {q.kld_999:.2e}"
            f"  top-1 {100 * q.top1:.2f} %  perplexity {q.perplexity:.3f}  attention {q.attention_error:.2e}"
            f"  recall {q.recalled}/{len(q.recall)}{accepted}\n    {self.command}"
        )


# --- Markdown ---------------------------------------------------------------------------------------------------------


def render(cells: Sequence[Cell]) -> str:
    """All tables: for each source the mean divergences, every quantity, and the needles that were missed.

    Sources come as they do in ``cells``, their caches from wide types to narrow ones.
    """
    sources = dict.fromkeys(cell.source for cell in cells)
    ordered = sorted(cells, key=_place)
    return "\n\n".join(_section(source, [cell for cell in ordered if cell.source == source]) for source in sources)


def _place(cell: Cell) -> tuple[int, ...]:
    types, bases, caches = list(CACHE_TYPES), list(K_BASES), cell.caches
    rotations = (bases.index(caches.k_rotation), bases.index(caches.v_rotation))
    return types.index(caches.k), *rotations, types.index(caches.v)


def _section(source: Source, cells: Sequence[Cell]) -> str:
    rows = cells[0].quality.rows
    parts = [f"### {source}", f"Mean KLD in nats a token over {rows:,} tokens:", _divergences(cells)]
    return "\n\n".join([*parts, "Every quantity:", _everything(cells), _missed(cells)])


def _divergences(cells: Sequence[Cell]) -> str:
    """Mean KLD only: K type and bases down, V type across."""
    columns = [name for name in CACHE_TYPES if any(cell.caches.v == name for cell in cells)]
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        row = found.setdefault((cell.caches.k, cell.caches.k_rotation, cell.caches.v_rotation), {})
        row[cell.caches.v] = _short(cell.quality.kld_mean)
    rows = [[*key, *(row.get(v, "") for v in columns)] for key, row in found.items()]
    return _markdown(["K", "K basis", "V basis", *(f"V {v}" for v in columns)], rows)


_NAMES = ("K", "V", "K basis", "V basis")


def _names(caches: Caches) -> list[str]:
    return [caches.k, caches.v, caches.k_rotation, caches.v_rotation]


def _everything(cells: Sequence[Cell]) -> str:
    header = [*_NAMES, "KLD mean", "KLD 99.9 %", "top-1", "perplexity", "attention error", "recall"]
    rows = [_row(cell) for cell in cells]
    if all(cell.acceptance is None for cell in cells):
        return _markdown(header, [row[:-1] for row in rows])
    return _markdown([*header, "acceptance"], rows)


def _row(cell: Cell) -> list[str]:
    q = cell.quality
    return [
        *_names(cell.caches), _short(q.kld_mean), _short(q.kld_999),
        f"{100 * q.top1:.2f} %", f"{q.perplexity:.3f}", _short(q.attention_error), f"{q.recalled}/{len(q.recall)}",
        "" if cell.acceptance is None else f"{cell.acceptance:.2f}",
    ]  # fmt: skip


def _missed(cells: Sequence[Cell]) -> str:
    """Needles recalled at each depth, of the caches that missed any; a sentence when none did."""
    missed = [cell for cell in cells if cell.quality.recalled < len(cell.quality.recall)]
    if not missed:
        return "Every cache recalled every needle."
    places = sorted({depth for cell in missed for _, depth, _ in cell.quality.recall})
    rows = []
    for cell in missed:
        found = [[hit for _, at, hit in cell.quality.recall if at == depth] for depth in places]
        rows.append([*_names(cell.caches), *(f"{sum(f)}/{len(f)}" for f in found)])
    sentence = "Needles recalled by depth, 0 the first line of the text and 1 the last; all other caches recalled all:"
    return f"{sentence}\n\n{_markdown([*_NAMES, *(f'{depth:.1f}' for depth in places)], rows)}"


def _short(value: float) -> str:
    """Two significant digits, with an exponent below 0.001."""
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between_markers(document: Path, text: str) -> None:
    """Replace what stands between the two markers. Raises ConfigError when the document lacks them."""
    before, begun, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ConfigError(f"{document}: the lines {BEGIN!r} and {END!r} are missing; add them where the table belongs")
    with replacing(document) as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_quality.table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines that benchmarks.kv_quality wrote")
    parser.add_argument("document", type=Path, help="Markdown with the two markers")
    options = parser.parse_args(arguments)
    lines = [line for path in options.results for line in path.read_text().splitlines()]
    write_between_markers(options.document, render([Cell.of(json.loads(line)) for line in lines]))


if __name__ == "__main__":
    main()
