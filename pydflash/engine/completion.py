"""What a generation gives: chunks as they come, or a completion in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydflash.decode import FinishReason, Stats, Step
from pydflash.text import AnswerPart, ReasoningSplitter, TextStream, Tokenizer, has_mark, mark_ids

__all__ = ["AnswerText", "Chunk", "Completion", "Piece", "chunk_of"]


@dataclass(frozen=True)
class Piece:
    """Text and reasoning that became final with one token. ``accepted``: the draft had proposed that token."""

    text: str
    accepted: bool
    reasoning: str = ""


@dataclass(frozen=True)
class Chunk:
    """What one step added. ``accepted`` says of each token whether the draft had proposed it.

    ``text`` can lag behind ``tokens``: an incomplete character and text that may turn into a stop string are held back.
    ``reasoning``, after messages only, is what a thinking model writes before its answer, without the marks ``<think>``
    and ``</think>``; it is no part of ``text``. ``pieces`` are both, token by token. ``stats`` are those of the
    generation up to here. ``finish_reason`` is set on the last chunk only.
    """

    text: str
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    stats: Stats
    finish_reason: FinishReason | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Completion:
    """A finished generation. ``tokens`` include the token or the stop string that ended it, ``text`` does not.

    ``reasoning``: see Chunk. Reasoning that was not finished leaves ``text`` empty.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    reasoning: str = ""


class AnswerText:
    """The text of one generation, token by token, up to the first stop string; with a splitter, in two parts.

    A stop string ends content. Inside reasoning, which a caller may never see, only those count that name a token that
    is no text, such as ``</think>`` or ``<|im_end|>``.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], splitter: ReasoningSplitter | None = None) -> None:
        self._tokenizer, self._stop, self._splitter = tokenizer, tuple(stop), splitter
        # Text leaves control tokens out, and the splitter must see its marks.
        marks = mark_ids(tokenizer) if splitter else {}
        self._hidden_marks = {token: mark for token, mark in marks.items() if token in tokenizer.control_ids}
        self._stream = self._new_stream()

    def push(self, token: int, *, last: bool = False) -> tuple[AnswerPart, bool]:
        """The text that is certain with ``token``, and whether a stop string was met, which ends the object's use.

        ``last``: the token ended the generation by its id, and is no part of the text.
        """
        splitter = self._splitter
        if splitter is None:
            text, stopped = self._stream.push(token, last=last)
            return AnswerPart(content=text), stopped
        if splitter.before_content and not self._tokenizer.token_bytes(token).strip(b"\r\n"):
            return AnswerPart(), False  # a stop string of newlines would end the answer before its content
        text, stopped = self._stream.push(token, last=last)
        if stopped:
            return splitter.push(text).then(splitter.flush()), True
        if token in self._hidden_marks and not last:
            text += self._restart() + self._hidden_marks[token]
        inside = splitter.inside
        part = splitter.push(text)
        if splitter.inside != inside:  # from here on other stop strings count
            part = part.then(splitter.push(self._restart()))
        return part, False

    def flush(self) -> AnswerPart:
        """What was held back, now that nothing follows."""
        text = self._stream.flush()
        return self._splitter.push(text).then(self._splitter.flush()) if self._splitter else AnswerPart(content=text)

    def _restart(self) -> str:
        """What the stream held back; a new one follows."""
        held, self._stream = self._stream.flush(), self._new_stream()
        return held

    def _new_stream(self) -> TextStream:
        if self._splitter is None or not self._splitter.inside:
            return TextStream(self._tokenizer, self._stop)
        marks = self._tokenizer.added.marks
        named = [stop for stop in self._stop if has_mark(stop) or any(mark in stop for mark in marks)]
        return TextStream(self._tokenizer, named)


def chunk_of(step: Step, text: AnswerText) -> Chunk:
    """The chunk of a step, cut at the first stop string; a token that ends the generation is no part of the text."""
    parts: list[AnswerPart] = []
    tokens, stats, reason = step.tokens, step.stats, step.finish_reason
    for i, token in enumerate(step.tokens):
        part, stopped = text.push(token, last=reason == "stop" and i == len(step.tokens) - 1)
        parts.append(part)
        if stopped:
            tokens, reason = tokens[: i + 1], "stop"
            stats = replace(stats, tokens=stats.tokens - len(step.tokens) + len(tokens))
            break
    else:
        if reason is not None:
            last = parts.pop() if parts else AnswerPart()
            parts.append(last.then(text.flush()))
    pieces = tuple(Piece(part.content, i < step.accepted, part.reasoning) for i, part in enumerate(parts))
    return Chunk(
        "".join(piece.text for piece in pieces),
        tokens,
        tuple(i < step.accepted for i in range(len(tokens))),
        pieces,
        stats,
        reason,
        "".join(piece.reasoning for piece in pieces),
    )
