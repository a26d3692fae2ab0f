"""Text from tokens as they come: what may still change is held back, what follows a stop string is dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pydflash.text.tokenizer import Tokenizer

__all__ = ["StopFilter", "TextStream"]


class TextStream:
    """The text of one generation, token by token, up to the first stop string.

    Control tokens are no part of the text, but stop strings may name them: they are looked for in all that was
    generated.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(skip_special=True)
        self._filter = StopFilter(stop)

    def push(self, token: int, *, last: bool = False) -> tuple[str, bool]:
        """The text that is certain with ``token``, and whether a stop string was met (which ends the stream's use).

        ``last``: the token ended the generation by its id, and is no part of the text whatever it spells.
        """
        if last or token in self._tokenizer.control_ids:
            return self._filter.push(self._tokenizer.token_bytes(token).decode("utf-8", "replace"), shown=False)
        return self._filter.push(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, now that nothing follows; an unfinished character can complete no stop string."""
        text, stopped = self._filter.push(self._decoder.flush())
        return text if stopped else text + self._filter.flush()


class StopFilter:
    """Passes text on up to the first stop string, holding back an end that may be the start of one.

    However the text is cut, the first stop string to be complete wins; of two that end together, the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._parts: deque[tuple[str, bool]] = deque()  # the held text in order, and whether it is shown

    def push(self, text: str, *, shown: bool = True) -> tuple[str, bool]:
        """The text that is final now, and whether a stop string was met (the filter is then finished).

        Text that is not ``shown`` counts for stop strings only.
        """
        if not self._stop:
            return text if shown else "", False
        self._held += text
        self._parts.append((text, shown))
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            return self._release(min(found)[1]), True
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        return self._release(len(self._held) - keep), False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        """Let go of the first ``count`` characters held, and return those that are shown."""
        self._held = self._held[count:]
        out = ""
        while self._parts and count >= len(self._parts[0][0]):
            text, shown = self._parts.popleft()
            out += text if shown else ""
            count -= len(text)
        if count:
            text, shown = self._parts.popleft()
            out += text[:count] if shown else ""
            self._parts.appendleft((text[count:], shown))
        return out

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that starts ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
