"""What became of a trial."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydflash.errors import PydflashError

__all__ = ["FAULTS", "KINDS", "LateError", "Outcome", "outcome_of"]

KINDS = ("ok", "clean", "foreign", "crash", "hang")
FAULTS = KINDS[2:]


class LateError(Exception):
    """An argument was refused when the result was read, not by the call."""


class Outcome(NamedTuple):
    """``kind``: one of KINDS. ``place``: what was raised, and where, as far as that is known."""

    kind: str
    place: str = ""


def outcome_of(trial: Callable[[], object]) -> Outcome:
    """Run ``trial``: it succeeds, is refused with a PydflashError, or raises something else."""
    try:
        trial()
    except PydflashError as error:
        return Outcome("clean", type(error).__name__)
    except Exception as error:
        return Outcome("foreign", f"{_place(error)} {type(error).__name__}: {str(error)[:100]}")
    return Outcome("ok")


def _place(error: BaseException) -> str:
    """The innermost line of the package, else of the tests, that ``error`` passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "pydflash" in Path(frame.filename).parts] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
