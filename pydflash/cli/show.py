"""What commands print: text to stdout, everything about it to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TextIO

from rich.console import Console
from rich.text import Text

from pydflash.control_chars import escape_controls

if TYPE_CHECKING:
    from pydflash.decode import Stats
    from pydflash.engine import Chunk, Completion, Engine, Prompt
    from pydflash.models import Progress
    from pydflash.sampling_params import SamplingParams
    from pydflash.text import Special

__all__ = ["LINES", "columns", "fail", "note", "print_stats", "print_stream", "progress_bar"]

ACCEPTED_STYLE = "green"
LINES = "\n\t"
"""The control characters that a text of several lines keeps."""


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar with the time left on stderr, which appears only when there is something to wait for."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(*parts, console=Console(stderr=True), transient=True)
    task, started = bar.add_task(what), False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if done < total and not started:
            started = True
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total and started:  # no bar while a command works or measures
            started = False
            bar.stop()

    try:
        yield progress
    finally:
        if started:
            bar.stop()


def print_stream(engine: Engine, prompt: Prompt, params: SamplingParams, special: Special = "template") -> Completion:
    """Print text as it comes, proposed and accepted tokens in colour; Ctrl-C ends it early."""
    from pydflash.engine import Completion

    console = Console(highlight=False, markup=False, soft_wrap=True)
    chunks: list[Chunk] = []
    stream = engine.stream(prompt, params, special=special)
    try:
        for chunk in stream:
            chunks.append(chunk)
            if console.is_terminal:
                text = Text()
                for piece in chunk.pieces:
                    text.append(escape_controls(piece.text, LINES), ACCEPTED_STYLE if piece.accepted else None)
                console.print(text, end="")
            else:  # a file or a pipe gets the text as it is, tabs included
                sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not chunks:
            raise
    print()
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    last = chunks[-1]
    return Completion("".join(c.text for c in chunks), tokens, last.finish_reason or "cancelled", last.stats)


def print_stats(stats: Stats) -> None:
    """Print what a generation cost, on stderr."""
    rows = {
        "prompt": f"{stats.prompt_tokens} tokens, {stats.prefill_tokens_per_second:.1f} tokens/s",
        "decode": f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s",
        "cycles": f"{stats.steps}",
        "drafted, accepted": f"{stats.drafted}, {stats.accepted} ({stats.acceptance_rate:.1%})",
        "acceptance length": f"{stats.acceptance_length:.2f}",
        "seconds in draft, verify, accept": (
            f"{stats.draft_seconds:.3f}, {stats.verify_seconds:.3f}, {stats.accept_seconds:.3f}"
        ),
    }
    counts = zip(stats.accepted_per_position, stats.drafted_per_position)
    rates = " ".join(f"{accepted / drafted:.0%}" for accepted, drafted in counts if drafted)
    if rates:
        rows["accepted per position"] = rates
    if stats.fallback:
        rows["without speculation because"] = stats.fallback
    columns(list(rows.items()), sys.stderr)


def columns(rows: Sequence[tuple[str, ...]], file: TextIO | None = None) -> None:
    """Rows in columns; the last one keeps its length, whatever the terminal's width."""
    rows = [tuple(map(escape_controls, row)) for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, wide)), row[-1]]), file=file or sys.stdout)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(escape_controls(text), file=sys.stderr)


def fail(message: str) -> NoReturn:
    """End the command with an error on stderr and exit code 2."""
    note(f"error: {message}")
    raise SystemExit(2)
