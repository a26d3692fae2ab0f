"""What a file says and nobody reads: refused by name, unless it is known to be harmless or the caller lets it pass."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from pydflash.errors import ConfigError, UnsupportedModel
from pydflash.files.gguf import GGUFFile
from pydflash.settings import Declaration, Texts

__all__ = ["check_patterns", "matcher", "patterns_by_file", "refuse_unread"]


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name matches one of ``patterns``, in which ``*``, ``?`` and ``[...]`` stand for characters."""
    found = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")
    return lambda name: found.match(name) is not None


def check_patterns(ignore: str | Sequence[str], path: object, names: Iterable[str]) -> tuple[str, ...]:
    """``ignore`` as patterns. Raises ConfigError for one that matches none of ``names``, which the file at ``path``
    holds, and for what is no text."""
    patterns: tuple[str, ...] = Declaration((), Texts(), "").check(ignore, "ignore")
    held = list(names) if patterns else []
    for pattern in patterns:
        if not any(map(matcher([pattern]), held)):
            raise ConfigError(f"ignore has {pattern!r}, which matches nothing in {path}; leave it out or correct it")
    return patterns


def patterns_by_file(ignore: Sequence[str], paths: Sequence[str | Path]) -> list[tuple[str, ...]]:
    """For each GGUF file, those of the patterns that match one of its tensors or metadata keys.

    Raises ConfigError for a pattern that matches nothing in any of the files, LoadError.
    """
    if not ignore:
        return [()] * len(paths)
    with ExitStack() as undo:
        files = [undo.enter_context(GGUFFile.open(path)) for path in paths]
        held = [[*file.tensors, *file.metadata] for file in files]
    check_patterns(ignore, " and ".join(map(str, paths)), chain(*held))
    return [tuple(p for p in ignore if any(map(matcher([p]), names))) for names in held]


def refuse_unread(
    path: object, reader: str, unread: Iterable[str], ignore: Sequence[str], describe: Callable[[str], str]
) -> tuple[str, ...]:
    """The names in ``unread`` that ``ignore`` lets pass; UnsupportedModel when there are others.

    ``reader``: who does not read them. ``describe`` says what a name is, such as "tensor 'a.bias'", for the message.
    """
    passes, names = matcher(ignore), tuple(unread)
    rest = [name for name in names if not passes(name)]
    if not rest:
        return names
    more = f", nor are {len(rest) - 1} others" if len(rest) > 2 else ", nor is 1 other" * (len(rest) - 1)
    pattern = re.sub(r"\.\d+\.", ".*.", rest[0])
    raise UnsupportedModel(
        f"{path}: {describe(rest[0])} is not used by {reader}{more}; without it the results are not those that the "
        f"file was made for. Take another file, or accept that with ignore=({pattern!r},), on the command line "
        f"--ignore '{pattern}'"
    )
