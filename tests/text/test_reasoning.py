"""Reasoning and content are told apart however an answer comes, and marks that are only talked about stay in it."""

from __future__ import annotations

import pytest

from pydflash.text import Tokenizer
from pydflash.text.reasoning import AnswerPart, ReasoningSplitter, has_mark, split_stored, starts_inside
from tools.synth.vocabulary import CONTROL, build_vocabulary

QUESTION = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
@pytest.mark.parametrize(
    ("inside", "answer", "expected"),
    [
        (True, "two and two\n</think>\n\nfour", ("two and two", "four")),
        (True, "\n\na\n\nb \n</think>four", ("a\n\nb ", "four")),
        (True, "</think>four", ("", "four")),
        (True, "\n</think>\n\n", ("", "")),
        (True, "never closed </thin\n", ("never closed </thin", "")),
        (True, "a < b </ think> </thinking></think>\n\n  x", ("a < b </ think> </thinking>", "  x")),
        (True, "<think>\nthe mark again</think>\nfour", ("the mark again", "four")),
        (
            True,
            "why\n</think>\n\nit ends at </think>, after <think>\n",
            ("why", "it ends at </think>, after <think>\n"),
        ),
        (True, "<thi", ("<thi", "")),
        (True, "", ("", "")),
        (False, "<think>\nwhy\n</think>\n\nfour\n", ("why", "four\n")),
        (False, "\n <think>why</think>four", ("why", "four")),
        (False, "<think>\n\n</think>\n\nfour", ("", "four")),
        (False, "<think>never closed", ("never closed", "")),
        (False, "  four\n", ("", "  four\n")),
        (False, "see <think>x</think>", ("", "see <think>x</think>")),
        (False, "\n<thin air", ("", "\n<thin air")),
        (False, "\n<thin", ("", "\n<thin")),
    ],
)
def test_an_answer_is_split_however_it_is_cut(inside: bool, answer: str, expected: tuple[str, str], size: int) -> None:
    splitter, part = ReasoningSplitter(inside), AnswerPart()
    for start in range(0, len(answer), size):
        part = part.then(splitter.push(answer[start : start + size]))
    assert part.then(splitter.flush()) == expected


def test_what_is_certain_is_not_held_back() -> None:
    splitter = ReasoningSplitter(inside=True)
    parts = [splitter.push(text) for text in ("why", " not\n", "go", "\n</think>", "\n", "\n4", "2")]
    assert parts == [("why", ""), (" not", ""), ("\ngo", ""), ("", ""), ("", ""), ("", "4"), ("", "2")]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nfour", ("why", "four")),
        ("two and two\n</think>\n\nfour", ("two and two", "four")),
        ("<think>\nnever closed", ("never closed", "")),
        ("four", ("", "four")),
        ("it ends at </think>, you see", ("", "it ends at </think>, you see")),
        ("like this:\n<think>\nwhy\n</think>\n", ("", "like this:\n<think>\nwhy\n</think>\n")),
    ],
)
def test_a_stored_answer_is_split_where_it_holds_reasoning(stored: str, expected: tuple[str, str]) -> None:
    assert split_stored(stored) == expected


@pytest.mark.parametrize("hidden", [False, True], ids=["added", "control"])
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (QUESTION + "<think>\n", True),
        (QUESTION + "<think>", True),
        (QUESTION + "<think>\nLet me see: ", True),
        (QUESTION + "<think>\n\n</think>\n\n", False),
        (QUESTION, False),
        (QUESTION.replace("hi", "what is <think>"), False),
        (QUESTION.replace("hi", "what is <think>") + "<think>\n", True),
        ("User: what is <think>\nAssistant:", False),
        ("User: hi\nAssistant: <think>\n", True),
    ],
)
def test_a_prompt_opens_reasoning_where_its_last_turn_does(prompt: str, expected: bool, hidden: bool) -> None:
    vocabulary = build_vocabulary(512)
    types = list(vocabulary.types)
    if hidden:
        for mark in ("<think>", "</think>"):
            types[vocabulary.tokens.index(mark)] = CONTROL
    tokenizer = Tokenizer(vocabulary.tokens, vocabulary.merges, types, pre="qwen35")
    assert starts_inside(tokenizer.encode(prompt), tokenizer) is expected


def test_a_template_knows_of_reasoning_when_it_writes_a_mark() -> None:
    assert has_mark("{{ '<think>\n' }}")
    assert has_mark("{{ m.content.split('</think>')[-1] }}")
    assert not has_mark("{{ m.content }}")
