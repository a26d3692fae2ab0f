"""Text that may turn into a stop string is held back, however it comes; control tokens are searched, never shown."""

from __future__ import annotations

import random

import pytest

from pydflash.text import StopFilter, TextStream, Tokenizer
from tools.synth.vocabulary import build_vocabulary


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


def test_hidden_text_changes_nothing_about_that() -> None:
    """The reference looks at the whole text before each next character."""
    chance = random.Random(0)
    for _ in range(2000):
        stops = tuple("".join(chance.choices("ab", k=chance.randrange(1, 5))) for _ in range(chance.randrange(1, 3)))
        spans = [("".join(chance.choices("ab", k=chance.randrange(4))), chance.random() < 0.6) for _ in range(6)]
        out, stop_filter, met = "", StopFilter(stops), False
        for text, shown in spans:
            piece, met = stop_filter.push(text, shown=shown)
            out += piece
            if met:
                break
        expected = reference([(character, shown) for text, shown in spans for character in text], stops)
        assert (out + ("" if met else stop_filter.flush()), met) == expected


def reference(characters: list[tuple[str, bool]], stops: tuple[str, ...]) -> tuple[str, bool]:
    for end in range(1, len(characters) + 1):
        starts = []
        for places in (range(end), [i for i in range(end) if characters[i][1]]):
            text = "".join(characters[i][0] for i in places)
            starts += [places[len(text) - len(stop)] for stop in stops if places and text.endswith(stop)]
        if starts:
            return "".join(text for text, shown in characters[: min(starts)] if shown), True
    return "".join(text for text, shown in characters if shown), False


TOKENIZER = Tokenizer.from_metadata(build_vocabulary(320).metadata())


def streamed(text: str, *stop: str) -> tuple[str, bool]:
    """What a reader gets of the tokens of ``text``, and whether a stop string was met."""
    out, stream = "", TextStream(TOKENIZER, stop)
    for token in TOKENIZER.encode(text):
        piece, met = stream.push(token)
        out += piece
        if met:
            return out, True
    return out + stream.flush(), False


@pytest.mark.parametrize(
    ("text", "stop", "expected", "met"),
    [
        ("ab<|im_start|>cd", "<|im_start|>", "ab", True),
        ("ab<|im_start|>cd", "b<|im_start|>c", "a", True),
        ("ab<|im_start|>cd", "start|>cd", "ab", True),
        ("ab<|im_start|>cd", "<|im_end|>", "abcd", False),
        ("ab<|im_start|>cd", "b<|im_start|>d", "abcd", False),  # held back, then given
        ("ab<|im_start|>", "b<|im_start|>c", "ab", False),
        ("<|im_start|><|im_end|>a", "<|im_start|><|im_end|>", "", True),
        ("a<think>b", "<think>", "a", True),
        ("abc", "b", "a", True),
        ("ab<|im_start|>cd", "bc", "a", True),  # what is shown never holds a stop string either
        ("ab<|im_start|>c<|im_end|>d", "bcd", "a", True),
        ("ab<|im_start|>cd", "bd", "abcd", False),
    ],
)
def test_stop_strings_may_name_control_tokens(text: str, stop: str, expected: str, met: bool) -> None:
    assert streamed(text, stop) == (expected, met)
    assert streamed(text, stop, "never met") == (expected, met)


def test_control_tokens_are_not_shown_and_do_not_cut_a_character() -> None:
    byte = {TOKENIZER.token_bytes(token): token for token in range(256)}
    control = TOKENIZER.token_id("<|im_start|>")
    assert control is not None
    for stop in ((), ("never met",)):
        stream = TextStream(TOKENIZER, stop)
        tokens = [byte[b"\xc3"], control, byte[b"\xa9"], control]
        assert "".join(stream.push(token)[0] for token in tokens) + stream.flush() == "é"


def test_the_token_that_ends_a_generation_is_searched_and_not_shown() -> None:
    a, b = TOKENIZER.encode("a") + TOKENIZER.encode("b")
    for stop, expected in (((), ("a", False)), (("ab",), ("", True)), (("b",), ("a", True)), (("c",), ("a", False))):
        stream = TextStream(TOKENIZER, stop)
        first, _ = stream.push(a)
        last, met = stream.push(b, last=True)
        assert (first + last + ("" if met else stream.flush()), met) == expected
