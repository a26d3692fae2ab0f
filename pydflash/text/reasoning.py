"""Reasoning and content of an answer, told apart by the marks ``<think>`` and ``</think>``.

Thinking models write their reasoning first. The mark that opens it is the end of the prompt, where the template writes
it, so that the answer starts inside; or it is the first thing in the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from pydflash.text.tokenizer import Tokenizer

__all__ = ["AnswerPart", "ReasoningSplitter", "has_mark", "mark_ids", "split_stored", "starts_inside"]

OPEN, CLOSE = "<think>", "</think>"
NEWLINES = "\r\n"
CLOSING_LINE = re.compile(rf"^{CLOSE}", re.MULTILINE)


class AnswerPart(NamedTuple):
    """A stretch of an answer."""

    reasoning: str = ""
    content: str = ""

    def then(self, other: AnswerPart) -> AnswerPart:
        """This stretch and the next one."""
        return AnswerPart(self.reasoning + other.reasoning, self.content + other.content)


class _State(Enum):
    START = 1
    REASONING = 2
    CONTENT = 3


class ReasoningSplitter:
    """Splits an answer into reasoning and content as it comes, however it is cut.

    ``inside``: the prompt has opened the reasoning. There is one stretch of it, at the start; after its end everything
    is content, marks included. Reasoning that is never closed lasts to the end of the answer. The newlines that models
    and templates put beside the marks belong to neither part.
    """

    def __init__(self, inside: bool) -> None:
        self._opened = inside
        self._state = _State.START
        self._held = ""  # what may yet become a mark, or the newlines before one
        self._after_mark = inside  # newlines are dropped

    @property
    def inside(self) -> bool:
        """Whether what follows is reasoning, as far as is known."""
        return self._opened and self._state is not _State.CONTENT

    @property
    def before_content(self) -> bool:
        """Whether the reasoning has ended and newlines that follow belong to its mark."""
        return self._after_mark and self._state is _State.CONTENT

    def push(self, text: str) -> AnswerPart:
        """What is certain with ``text``."""
        self._held += text
        if self._state is _State.START and not self._begin():
            return AnswerPart()
        if self._after_mark:
            self._held = self._held.lstrip(NEWLINES)
        reasoning = self._take_reasoning() if self._state is _State.REASONING else ""
        return AnswerPart(reasoning, self._take_content() if self._state is _State.CONTENT else "")

    def flush(self) -> AnswerPart:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return AnswerPart(reasoning=held.strip(NEWLINES)) if self.inside else AnswerPart(content=held)

    def _begin(self) -> bool:
        """Leave the start, if it is certain by now whether the answer itself opens the reasoning."""
        start = self._held.lstrip()
        if len(start) < len(OPEN) and OPEN.startswith(start):
            return False
        if start.startswith(OPEN):  # some models repeat the mark of the prompt
            self._held = start[len(OPEN) :]
            self._opened = self._after_mark = True
        self._state = _State.REASONING if self._opened else _State.CONTENT
        return True

    def _take_reasoning(self) -> str:
        reasoning, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._state, self._held, self._after_mark = _State.CONTENT, rest.lstrip(NEWLINES), True
            return reasoning.rstrip(NEWLINES)
        overlap = next((n for n in range(len(CLOSE) - 1, 0, -1) if reasoning.endswith(CLOSE[:n])), 0)
        certain = reasoning[: len(reasoning) - overlap].rstrip(NEWLINES)
        self._held = reasoning[len(certain) :]
        self._after_mark = self._after_mark and not certain
        return certain

    def _take_content(self) -> str:
        content, self._held = self._held, ""
        self._after_mark = self._after_mark and not content
        return content


def has_mark(text: str) -> bool:
    """Whether a mark occurs in ``text``, such as the source of a chat template that knows of reasoning."""
    return OPEN in text or CLOSE in text


def mark_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """The marks that are tokens of their own, by id. Some converters make them control tokens."""
    ids = {mark: tokenizer.token_id(mark) for mark in (OPEN, CLOSE)}
    return {token: mark for mark, token in ids.items() if token is not None}


def starts_inside(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a template's prompt has opened the reasoning of the answer: its last turn, after the last control token,
    has an OPEN that is not closed.

    Without control tokens, a user's text cannot be told from the template's, and the prompt must end with OPEN.
    """
    control = tokenizer.control_ids - mark_ids(tokenizer).keys()
    at = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in control), 0)
    _, mark, rest = tokenizer.decode(prompt[at:]).rpartition(OPEN)
    return bool(mark) and CLOSE not in rest and (at > 0 or not rest.strip())


def split_stored(text: str) -> AnswerPart:
    """Split an answer that was stored in one piece, its opening mark perhaps left in the prompt.

    Marks that the answer only talks about stay where they are: those after other text, unless a closing one without an
    opening one begins a line, as models write it.
    """
    opened = text.lstrip().startswith(OPEN)
    closing = CLOSING_LINE.search(text)
    if not opened and (closing is None or OPEN in text[: closing.start()]):
        return AnswerPart(content=text)
    splitter = ReasoningSplitter(inside=not opened)
    return splitter.push(text).then(splitter.flush())
