"""What a terminal would obey is spelled out; all other text stays as it is."""

from __future__ import annotations

import unicodedata

import pytest

from pydflash import errors
from pydflash.control_chars import escape_controls

TEXT = "Grüße, 世界\u3000한국어 \U0001f469\u200d\U0001f52c naïve\u00a0\\n"  # with a joined emoji and wide spaces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("abc\u202etxt.exe\u2069", r"abc\u202etxt.exe\u2069"),
        ("one\u2028two", r"one\u2028two"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
        ("\ud83d alone", r"\ud83d alone"),
        (TEXT, TEXT),
    ],
)
def test_controls_are_spelled_and_text_is_not(text: str, expected: str) -> None:
    assert escape_controls(text) == expected


def test_what_is_to_be_kept_is_kept() -> None:
    assert escape_controls("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\x1b\\r"


def test_no_control_character_and_nothing_without_utf8_comes_through() -> None:
    every = "".join(map(chr, range(0x110000)))
    escaped = escape_controls(every)
    assert not any(unicodedata.category(char) == "Cc" for char in escaped)
    escaped.encode("utf-8")
    assert escape_controls(escaped) == escaped


@pytest.mark.parametrize("name", errors.__all__)
def test_no_error_carries_controls_to_the_terminal(name: str) -> None:
    error = getattr(errors, name)("tensor '\x1b]52;c;AAAA\x07' in\nline 2")
    assert str(error) == "tensor '\\x1b]52;c;AAAA\\x07' in\nline 2"
