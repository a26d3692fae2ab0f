"""Text from tokens as they come: what may still change is held back, what follows a stop string is dropped."""

from __future__ import annotations

from collections.abc import Sequence

from pydflash.text.tokenizer import Tokenizer

__all__ = ["StopFilter", "TextStream"]


class TextStream:
    """The text of one generation, token by token, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.decoder(skip_special=True)
        self._filter = StopFilter(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain with ``token``, and whether a stop string was met (which ends the stream's use)."""
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

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is final now, and whether a stop string was met (the filter is then finished)."""
        if not self._stop:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        certain = len(self._held) - keep
        out, self._held = self._held[:certain], self._held[certain:]
        return out, False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that starts ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
