"""Which draft a name or a file is: one row a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydflash.arguments import a_function, an_instance
from pydflash.drafts.base import LoadedDraft
from pydflash.drafts.dflash import load_dflash
from pydflash.drafts.ngram import NGramDraft
from pydflash.errors import SessionClosed, UnsupportedArchitecture
from pydflash.files import GGUFFile
from pydflash.models import Model, Progress
from pydflash.models.dflash import ARCHITECTURES as DFLASH

__all__ = ["FILES", "NAMES", "load_draft"]

NAMES: Mapping[str, Callable[[], LoadedDraft]] = {"ngram": NGramDraft}
"""Drafts that need no file, by the name given instead of one."""

FILES: Mapping[str, Callable[[GGUFFile, Model, Progress | None, bool | None], LoadedDraft]] = {
    **dict.fromkeys(DFLASH, load_dflash),
}
"""Loaders of drafts, by a file's ``general.architecture``: (file, target, progress, causal) to a draft that owns it."""


def load_draft(
    path: str | Path, target: Model, progress: Progress | None = None, *, causal: bool | None = None
) -> LoadedDraft:
    """Load a draft for ``target``: a GGUF file of one of ``FILES``, or one of ``NAMES``.

    ``causal`` overrides whether rows of a DFlash block see only earlier rows. Raises LoadError; DraftMismatch when it
    does not fit the target, naming both values; ConfigError, and SessionClosed for a target that was closed.
    """
    if an_instance(target, Model, "target").weights.closed:
        raise SessionClosed(f"the target, {target.path}, was closed; load it again")
    a_function(progress, "progress")
    if causal is not None:
        an_instance(causal, bool, "causal")
    if isinstance(path, str) and path in NAMES:
        return NAMES[path]()
    file = GGUFFile.open(path)
    try:
        architecture = file.require("general.architecture", str)
        if architecture not in FILES:
            raise UnsupportedArchitecture(
                f"{file.path}: architecture {architecture!r} is not that of a draft; known are {', '.join(FILES)}"
            )
        return FILES[architecture](file, target, progress, causal)
    except BaseException:
        file.close()
        raise
