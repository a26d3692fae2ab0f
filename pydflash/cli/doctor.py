"""``pydflash doctor``."""

from __future__ import annotations

import typer

from pydflash.cli.show import columns
from pydflash.control_chars import escape_controls

__all__ = ["doctor"]


def doctor() -> None:
    """Say what was built, what this machine has, and what to do about a difference. Exit code 1 when something is
    wrong.
    """
    from pydflash.doctor import examine

    report = examine()
    columns(report.facts)
    for problem in report.problems:
        print(f"\nproblem: {escape_controls(problem)}")
    if report.problems:
        raise typer.Exit(1)
