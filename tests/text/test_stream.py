"""Text that may turn into a stop string is held back, however it comes."""

from __future__ import annotations

import pytest

from pydflash.text import StopFilter


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("xabc", ("xabc", "bc"), ""),  # both end together: the longer one wins
        ("xabcd", ("xabcd", "bc"), "xa"),  # the first to be complete wins
        ("nothing", ("zzz",), "nothing"),
        ("almos", ("almost",), "almos"),
        ("anything", (), "anything"),
    ],
)
def test_the_stop_filter_does_not_depend_on_how_text_is_cut(
    size: int, text: str, stop: tuple[str, ...], expected: str
) -> None:
    out, stop_filter, met = "", StopFilter(stop), False
    for start in range(0, len(text), size):
        piece, met = stop_filter.push(text[start : start + size])
        out += piece
        if met:
            break
    assert out + ("" if met else stop_filter.flush()) == expected
