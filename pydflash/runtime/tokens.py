"""Token ids that callers give: in any sequence or array of integers, checked at the call."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from pydflash.arguments import shown
from pydflash.errors import ConfigError, ShapeError

__all__ = ["last_token", "token_ids"]


def token_ids(tokens: object, vocab: int, what: str = "input") -> npt.NDArray[np.int32]:
    """``tokens``, integers in a sequence or in an array (n,), numpy's or one that gives numpy's, as (n,) int32.

    ShapeError, which calls them ``what`` and names the place, unless there is at least one and all are ids of a
    vocabulary of ``vocab`` tokens; ConfigError for an object that fails to give its array.
    """
    listed = isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes | bytearray | memoryview)
    ids = _of_sequence(tokens, what) if listed else _of_array(tokens, what)  # type: ignore[arg-type]
    if not len(ids):
        raise ShapeError(f"the {what} is empty; give at least one token")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab))
    if wrong.size:
        i = int(wrong[0])
        raise ShapeError(f"{what}[{i}]: token id {shown(int(ids[i]))} is outside the vocabulary of {vocab} tokens")
    return ids.astype(np.int32)


def last_token(history: object, vocab: int) -> int:
    """The last of ``history``, a sequence or an array of tokens; ShapeError unless it is inside ``vocab``."""
    ending = history[-1:] if isinstance(history, list | tuple) else history  # a history may be long
    return int(token_ids(ending, vocab, "history")[-1])


def _of_sequence(tokens: Sequence[Any], what: str) -> npt.NDArray[Any]:
    ids = []
    for i, item in enumerate(tokens):
        try:
            token = index(item)
        except (TypeError, ValueError):  # the latter from arrays of several numbers
            token = None
        if token is None or isinstance(item, bool | np.bool_):
            raise ShapeError(f"{what}[{i}] is a {type(item).__name__}; token ids are integers")
        ids.append(token)
    return np.array(ids, object if any(token.bit_length() > 63 for token in ids) else np.int64)


def _of_array(tokens: object, what: str) -> npt.NDArray[Any]:
    name = type(tokens).__name__
    if not hasattr(tokens, "__array__") or isinstance(tokens, type | str | bytes):
        raise ShapeError(f"{what} is {shown(tokens)}; expected token ids: integers in a list or an array (n,)")
    try:
        ids = np.asarray(tokens)
    except Exception as error:  # whatever another library raises, such as for memory on a GPU
        raise ConfigError(f"{what} is a {name} that gives no numpy array: {error}") from error
    if ids.ndim != 1:
        raise ShapeError(f"{what} is a {name} of shape {ids.shape}; token ids have shape (n,)")
    if ids.size and ids.dtype.kind not in "iu":
        raise ShapeError(f"{what} is a {name} of {ids.dtype}; token ids are integers")
    return ids
