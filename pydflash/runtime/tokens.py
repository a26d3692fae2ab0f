"""Token ids as callers give them, checked before they come near a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.arguments import shown
from pydflash.errors import ShapeError

__all__ = ["last_token", "token_ids"]


def token_ids(tokens: object, vocab: int, what: str = "the list of tokens") -> npt.NDArray[np.int32]:
    """``tokens``, integers in a sequence or an array, as (n,) int32.

    ShapeError, which calls them ``what``, unless there is at least one and all are inside a vocabulary of ``vocab``.
    """
    ids = _as_array(tokens)
    if ids.ndim == 1 and not ids.size:
        raise ShapeError(f"{what} is empty; give at least one token")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        found = f"{shown(tokens)} (shape {ids.shape}, dtype {ids.dtype})"
        raise ShapeError(f"{what} is {found}; expected token ids: integers in a list or in an array (n,)")
    if ids.min() < 0 or ids.max() >= vocab:
        bad = int(ids[(ids < 0) | (ids >= vocab)][0])
        raise ShapeError(f"token id {bad} is outside the vocabulary of {vocab} tokens")
    return ids.astype(np.int32)


def last_token(history: object, vocab: int) -> int:
    """The last of ``history``, a sequence or an array of tokens; ShapeError unless it is inside ``vocab``."""
    ending = history[-1:] if isinstance(history, list | tuple) else history  # a history may be long
    return int(token_ids(ending, vocab, "the history")[-1])


def _as_array(tokens: object) -> npt.NDArray[Any]:
    """What is no array of anything, text and bytes included, gives one without dimensions."""
    try:
        text = isinstance(tokens, str | bytes | bytearray | memoryview)
        return np.zeros(()) if text else np.asarray(tokens)
    except (TypeError, ValueError, OverflowError):  # lists of different lengths
        return np.zeros(())
