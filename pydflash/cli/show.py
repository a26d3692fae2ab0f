"""What commands print: text to stdout, everything about it to stderr."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich.console import Console
from rich.text import Text

from pydflash.control_chars import escape_controls
from pydflash.sampling_params import SamplingParams, recommendations

if TYPE_CHECKING:
    from pydflash.decode import Stats
    from pydflash.engine import Chunk, Completion, Engine, Prompt
    from pydflash.models import Progress
    from pydflash.text import Special

__all__ = ["LINES", "columns", "fail", "note", "note_sampling", "print_stats", "print_stream", "progress_bar"]

ACCEPTED_STYLE = "green"
REASONING_STYLE = "dim"
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


def print_stream(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    variables: Mapping[str, Any] | None = None,
    special: Special = "template",
) -> Completion:
    """Print text as it comes; Ctrl-C ends it early, or raises KeyboardInterrupt while the prompt is read.

    On a terminal proposed and accepted tokens are in colour, and reasoning is dimmed; elsewhere it is left out.
    """
    from pydflash.engine import Completion

    show = _Shown()
    chunks: list[Chunk] = []
    try:
        for chunk in engine.stream(prompt, params, variables=variables, special=special):
            chunks.append(chunk)
            show.chunk(chunk)
    except KeyboardInterrupt:
        if not chunks:
            raise
    print()
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    text, reasoning = "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)
    return Completion(text, tokens, chunks[-1].finish_reason or "cancelled", chunks[-1].stats, reasoning)


class _Shown:
    """An answer on stdout."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._reasoning = False  # was shown last

    def chunk(self, chunk: Chunk) -> None:
        if self._console.is_terminal:
            self._console.print(self._styled(chunk), end="")
        else:  # a file or a pipe gets the text as it is, tabs included
            sys.stdout.write(chunk.text)
        sys.stdout.flush()

    def _styled(self, chunk: Chunk) -> Text:
        text = Text()
        for piece in chunk.pieces:
            colour = ACCEPTED_STYLE if piece.accepted else ""
            if piece.reasoning:
                text.append(escape_controls(piece.reasoning, LINES), f"{REASONING_STYLE} {colour}")
                self._reasoning = True
            if piece.text and self._reasoning:
                text.append("\n\n")
                self._reasoning = False
            text.append(escape_controls(piece.text, LINES), colour)
        return text


def note_sampling(engine: Engine, given: Collection[str]) -> None:
    """Say which sampling parameters the model file decides, but for those ``given``, and which it cannot."""
    used = [f"{name} {value}" for name, value in engine.recommended.items() if name not in given]
    if used:
        note(f"sampling as the model file recommends: {', '.join(used)}")
    for found in recommendations(engine.model.file.metadata):
        if found.problem:
            note(f"the model file has {found.key} = {found.shown}")


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
