"""The prompts that an engine takes, told apart and checked: text, messages for the chat template, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np

from pydflash.errors import ConfigError, ShapeError

__all__ = ["Prompt", "is_conversation", "is_given", "template_variables", "token_ids"]


@runtime_checkable
class Array(Protocol):
    """An array of numpy, or one that gives numpy's, as torch's tensors do."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[SupportsIndex] | Array
"""Raw text, messages for the chat template, or token ids: any sequence of integers or an array (tokens,)."""

EXPECTED = "expected text, a list of messages (dicts with role and content) or token ids (integers)"
TAKEN = frozenset({"messages", "tools", "self"})
"""Names of the render call's own arguments."""


def token_ids(prompt: object, vocab: int) -> list[int] | None:
    """The token ids that ``prompt`` holds, or None where it is text or messages.

    Raises ShapeError for ids that are no integers (0 to ``vocab`` - 1) or of another shape than (tokens,), and
    ConfigError for what is no prompt at all.
    """
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise ConfigError(
            f"the prompt is a {type(prompt).__name__}, and bytes are neither text nor token ids: decode them first"
        )
    if isinstance(prompt, Array) and not isinstance(prompt, type):
        return _ids_of_array(prompt, vocab)
    if not isinstance(prompt, Sequence):
        raise ConfigError(f"the prompt is a {type(prompt).__name__}; {EXPECTED}")
    return None if len(prompt) and not _is_number(prompt[0]) else _ids_of_sequence(prompt, vocab)


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt that ``token_ids`` has let pass holds messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | Array) and not _is_number(prompt[0])


def is_given(argument: object) -> bool:
    """Whether an optional argument holds anything."""
    return argument is not None and not (isinstance(argument, Mapping | Sequence) and not len(argument))


def template_variables(variables: object) -> Mapping[str, Any]:
    """``variables`` as keyword arguments for a chat template. Raises ConfigError where they cannot be."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise ConfigError(f"variables is a {type(variables).__name__}; expected a dict of the template's variables")
    for name in variables:
        if not isinstance(name, str):
            raise ConfigError(f"variables has a key that is a {type(name).__name__}; expected names")
        if name in TAKEN:
            raise ConfigError(f"variables has {name!r}, which is taken: messages are the prompt, tools an argument")
    return variables


def _ids_of_array(prompt: Array, vocab: int) -> list[int]:
    name = type(prompt).__name__
    try:
        ids = np.asarray(prompt)
    except Exception as error:  # whatever the other library raises, such as for memory on a GPU
        raise ConfigError(f"the prompt is a {name} that gives no numpy array: {error}") from error
    if ids.ndim != 1:
        raise ShapeError(f"the prompt is a {name} of shape {ids.shape}; token ids have shape (tokens,)")
    if ids.size and ids.dtype.kind not in "iu":
        raise ShapeError(f"the prompt is a {name} of {ids.dtype}; token ids are integers")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab)) if ids.size else ids
    if wrong.size:
        raise _outside(int(wrong[0]), int(ids[wrong[0]]), vocab)
    found: list[int] = ids.tolist()
    return found


def _ids_of_sequence(prompt: Sequence[Any], vocab: int) -> list[int]:
    ids = []
    for i, item in enumerate(prompt):
        try:
            token = int(index(item))
        except (TypeError, ValueError):  # the latter from tensors of several numbers
            token = None
        if token is None or isinstance(item, bool | np.bool_):
            raise ShapeError(f"prompt[{i}] is a {type(item).__name__}; the prompt holds token ids, which are integers")
        if not 0 <= token < vocab:
            raise _outside(i, token, vocab)
        ids.append(token)
    return ids


def _is_number(item: object) -> bool:
    return isinstance(item, float | SupportsIndex | np.generic)


def _outside(i: int, token: int, vocab: int) -> ShapeError:
    shown = token if token.bit_length() <= 64 else f"an integer of {token.bit_length():,} bits"
    return ShapeError(f"prompt[{i}] is {shown}; token ids of this model are 0 to {vocab - 1:,}")
