"""Which draft a name or a file is: one row a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydflash.arguments import a_function, an_instance
from pydflash.drafts.base import LoadedDraft
from pydflash.drafts.dflash import load_dflash
from pydflash.drafts.ngram import NGramDraft
from pydflash.errors import SessionClosed, UnsupportedArchitecture
from pydflash.files import GGUFFile, check_patterns
from pydflash.models import Model, Progress
from pydflash.models.dflash import ARCHITECTURES as DFLASH

__all__ = ["FILES", "NAMES", "is_name", "load_draft"]

NAMES: Mapping[str, Callable[[], LoadedDraft]] = {"ngram": NGramDraft}
"""Drafts that need no file, by the name given instead of one."""

FILES: Mapping[str, Callable[[GGUFFile, Model, Progress | None, bool | None, str | Sequence[str]], LoadedDraft]] = {
    **dict.fromkeys(DFLASH, load_dflash),
}
"""Loaders of drafts, by a file's ``general.architecture``: (file, target, progress, causal, ignore) to a draft that
owns it."""


def is_name(draft: str | Path) -> bool:
    """Whether ``draft`` is the name of a draft without a file."""
    return isinstance(draft, str | Path) and str(draft) in NAMES


def load_draft(
    path: str | Path,
    target: Model,
    progress: Progress | None = None,
    *,
    causal: bool | None = None,
    ignore: str | Sequence[str] = (),
) -> LoadedDraft:
    """Load a draft for ``target``: a GGUF file of one of ``FILES``, or one of ``NAMES``.

    ``causal`` overrides whether rows of a DFlash block see only earlier rows. ``ignore``: patterns, such as
    "blk.*.attn_sinks.weight", of tensors and metadata keys that may stay unused; UnsupportedModel for others. Raises
    ConfigError, also for a pattern that matches nothing, LoadError; DraftMismatch when it does not fit the target,
    naming both values; SessionClosed for a target that was closed.
    """
    if an_instance(target, Model, "target").weights.closed:
        raise SessionClosed(f"the target, {target.path}, was closed; load it again")
    a_function(progress, "progress")
    if causal is not None:
        an_instance(causal, bool, "causal")
    if is_name(path):
        check_patterns(ignore, path, ())
        return NAMES[str(path)]()
    file = GGUFFile.open(path)
    try:
        architecture = file.require("general.architecture", str)
        if architecture not in FILES:
            raise UnsupportedArchitecture(
                f"{file.path}: architecture {architecture!r} is not that of a draft; known are {', '.join(FILES)}"
            )
        return FILES[architecture](file, target, progress, causal, ignore)
    except BaseException:
        file.close()
        raise
