"""Texts with needles hold what they say they hold, where they say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kv_quality.texts import QUESTION_ROWS, Text, held_out_lines, held_out_prompts, plant, texts

LINES = [f"line {i}\n" for i in range(100)]


def encode(text: str) -> list[int]:
    """A token a word or line end, each its own id; digits stand alone, as in the shipped vocabulary."""
    words = text.replace("\n", " \n ").split(" ")
    pieces = [p for word in words if word for p in ([*word] if word.isdigit() else [word])]
    return [sum(ord(c) << 8 * i for i, c in enumerate(piece)) for piece in pieces]


def decoded(ids: tuple[int, ...]) -> list[str]:
    return [i.to_bytes((i.bit_length() + 7) // 8, "little").decode() for i in ids]


def test_lines_are_planted_at_shares_of_the_text() -> None:
    lines = ["a\n", "b\n", "c\n", "d\n"]
    assert plant(lines, [(0.0, "x\n"), (0.5, "y\n"), (1.0, "z\n")]) == "x\na\nb\ny\nc\nd\nz\n"
    assert plant(lines, [(1.0, "z\n"), (0.25, "x\n")]) == "a\nx\nb\nc\nd\nz\n"
    assert lines == ["a\n", "b\n", "c\n", "d\n"]


def rememberers(text: Text) -> list[tuple[str, str, int]]:
    """(key, code, line) of every planted line."""
    lines = " ".join(decoded(text.ids)).split("\n")
    found = []
    for number, line in enumerate(lines):
        if "remember:" in line:
            words = line.split()
            found.append((words[words.index("of") + 1], "".join(words[words.index("is") + 1 :]), number))
    return found


def test_every_needle_stands_in_the_text_once_at_its_depth_and_is_asked_for_by_its_key() -> None:
    (text,) = texts(LINES, encode, [250], 5)
    assert [needle.depth for needle in text.needles] == [0, 0.25, 0.5, 0.75, 1]
    found = rememberers(text)
    assert len({key for key, _, _ in found}) == 5
    lines = " ".join(decoded(text.ids)).count("\n")
    for needle, (key, code, line) in zip(text.needles, found, strict=True):
        question = decoded(needle.question)
        assert question[question.index("of") + 1] == key
        assert "".join(decoded(needle.answer)) == code
        assert len(code) == 4
        assert question[-3:] == [*code[:3]]  # teacher forced: all but the last token of the answer
        assert len(needle.question) <= QUESTION_ROWS
        plain = lines - 5
        before = line - sum(other < line for _, _, other in found)
        assert before == round(needle.depth * plain)


def test_texts_are_as_long_as_fits_and_share_no_line() -> None:
    first, second = texts(LINES, encode, [120, 200], 3)
    assert 117 <= len(first.ids) <= 120  # a line is 3 to 4 tokens
    assert 196 <= len(second.ids) <= 200
    ours = [{line for line in " ".join(decoded(t.ids)).split("\n") if "line" in line} for t in (first, second)]
    assert ours[0]
    assert not ours[0] & ours[1]


def test_texts_depend_on_nothing_but_their_arguments() -> None:
    assert list(texts(LINES, encode, [150], 4)) == list(texts(LINES, encode, [150], 4))
    assert list(texts(LINES, encode, [150], 4)) != list(texts(LINES, encode, [150], 4, seed=1))


def test_too_few_lines_are_an_error() -> None:
    with pytest.raises(ValueError, match="too few lines"):
        list(texts(LINES[:10], encode, [250], 2))


def test_documents_are_prompts_with_their_continuations(tmp_path: Path) -> None:
    rows = [
        {"kind": "source", "prompt": "a\nb\n", "continuation": "c\n  d"},
        {"kind": "recall", "prompt": "left out", "answer": "1"},
        {"kind": "source", "prompt": "e\n", "continuation": "f\n\n"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_out_lines(path) == ["a\n", "b\n", "c\n", "  d\n", "e\n", "f\n"]
    assert held_out_prompts(path, 5) == ["a\nb\n", "e\n"]
