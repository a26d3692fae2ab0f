"""Text from tokens as they come: what may still change is held back, what follows a stop string is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydflash.text.tokenizer import Tokenizer

__all__ = ["StopFilter", "TextStream"]


class TextStream:
    """The text of one generation, token by token, up to the first stop string.

    Control tokens are no part of the text, but stop strings may name them.
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

    However the text is cut, the first stop string to be complete wins; of two that end together, the longer. Some text
    may be hidden: a stop string is met in the whole text or in what is shown of it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._shown: list[bool] = []  # of each character held

    def push(self, text: str, *, shown: bool = True) -> tuple[str, bool]:
        """The shown text that is final now, and whether a stop string was met (the filter is then finished)."""
        if not self._stop:
            return text if shown else "", False
        self._held += text
        self._shown += [shown] * len(text)
        everything, visible = range(len(self._held)), [i for i, shown in enumerate(self._shown) if shown]
        places = [everything] if len(visible) == len(everything) else [everything, visible]
        found = [match for each in places for match in self._matches(each)]
        if found:
            return self._release(min(found)[1]), True
        return self._release(min(self._certain(each) for each in places)), False

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        return self._release(len(self._held))

    def _matches(self, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """End and start of the first match of each stop string in the characters held at ``places``."""
        text = "".join([self._held[i] for i in places])
        for stop in self._stop:
            if (at := text.find(stop)) >= 0:
                yield places[at + len(stop) - 1] + 1, places[at]

    def _certain(self, places: Sequence[int]) -> int:
        """How many characters held come before an end of the text at ``places`` that may start a stop string."""
        text = "".join([self._held[i] for i in places])
        keep = max(_overlap(text, stop) for stop in self._stop)
        return places[-keep] if keep else len(self._held)

    def _release(self, count: int) -> str:
        """Let go of the first ``count`` characters held, and return those that are shown."""
        out = "".join([self._held[i] for i in range(count) if self._shown[i]])
        self._held, self._shown = self._held[count:], self._shown[count:]
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that starts ``stop``."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
