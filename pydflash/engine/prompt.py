"""The prompts that an engine takes, told apart and checked: text, messages for the chat template, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np

from pydflash.errors import ConfigError
from pydflash.runtime import token_ids

__all__ = ["Prompt", "ids_of", "is_conversation", "is_given", "template_variables"]


@runtime_checkable
class Array(Protocol):
    """An array of numpy, or one that gives numpy's, as torch's tensors do."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[SupportsIndex] | Array
"""Raw text, messages for the chat template, or token ids: any sequence of integers or an array (tokens,)."""

EXPECTED = "expected text, a list of messages (dicts with role and content) or token ids (integers)"
TAKEN = frozenset({"messages", "tools", "self"})
"""Names of the render call's own arguments."""


def ids_of(prompt: object, vocab: int) -> list[int] | None:
    """The token ids that ``prompt`` holds, or None where it is text or messages.

    Raises ShapeError for an empty prompt and for ids that ``token_ids`` refuses, ConfigError for what is no prompt.
    """
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise ConfigError(
            f"the prompt is a {type(prompt).__name__}, and bytes are neither text nor token ids: decode them first"
        )
    if not isinstance(prompt, Array) or isinstance(prompt, type):
        if not isinstance(prompt, Sequence):
            raise ConfigError(f"the prompt is a {type(prompt).__name__}; {EXPECTED}")
        if len(prompt) and not _is_number(prompt[0]):
            return None
    ids: list[int] = token_ids(prompt, vocab, "prompt").tolist()
    return ids


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt that ``ids_of`` has let pass holds messages."""
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


def _is_number(item: object) -> bool:
    return isinstance(item, float | SupportsIndex | np.generic)
