"""The text that caches are compared on: held-out documents with codes planted in them, and the questions for the codes.

A text is documents of a prompt file (``tests/data/held_out.jsonl``: prompt and continuation, which training never saw)
one after the other, cut into lines. Codes are planted between lines at even depths and worded as in the recall
exercises that the shipped target was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.tiny.corpus import KEYS, recall, remember

__all__ = ["Needle", "Text", "held_out_lines", "held_out_prompts", "plant", "texts"]

Encode = Callable[[str], list[int]]
QUESTION_ROWS = 16  # what a session can look at and forget again


@dataclass(frozen=True)
class Needle:
    """A code planted at ``depth``, 0 (first line) to 1 (last), and the tokens that ask for it and answer.

    ``question`` ends with all but the last token of the answer: the ``len(answer)`` last rows predict ``answer``.
    """

    depth: float
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """Token ids of a text, and what was planted in it. ``ids`` ends at a line's end, where a question can follow."""

    ids: tuple[int, ...]
    needles: tuple[Needle, ...]


def held_out_lines(path: Path) -> list[str]:
    """All lines of the file's documents, one document after the other."""
    documents = [row["prompt"] + row["continuation"] for row in _rows(path) if "continuation" in row]
    return [line for document in documents for line in (document.rstrip("\n") + "\n").splitlines(keepends=True)]


def held_out_prompts(path: Path, count: int) -> list[str]:
    """The first ``count`` prompts that have a continuation."""
    return [row["prompt"] for row in _rows(path) if "continuation" in row][:count]


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def plant(lines: Sequence[str], planted: Sequence[tuple[float, str]]) -> str:
    """``lines`` with each (depth, line) of ``planted`` inserted at that share of them."""
    body = list(lines)
    for depth, line in sorted(planted, reverse=True):  # backwards, so that earlier places stay valid
        body.insert(round(depth * len(lines)), line)
    return "".join(body)


def texts(lines: Sequence[str], encode: Encode, contexts: Sequence[int], needles: int, seed: int = 0) -> Iterator[Text]:
    """One text of at most ``context`` tokens for each of ``contexts``, of lines that no other text holds.

    ``needles`` codes lie at depths from 0 to 1. Raises ValueError when the lines run out.
    """
    rng = np.random.default_rng(seed)
    keys = [key for key in KEYS if len(_question(encode, key, 1000)[0]) <= QUESTION_ROWS]
    start = 0
    for context in contexts:
        depths = np.linspace(0, 1, needles) if needles > 1 else [0.0] * needles
        chosen = [str(key) for key in rng.choice(keys, needles, replace=False)]
        codes = [int(code) for code in rng.integers(1000, 10_000, needles)]
        planted = [(float(d), remember(key, code)) for d, key, code in zip(depths, chosen, codes)]
        room = context - sum(len(encode(line)) for _, line in planted)
        stop = _fitting(lines, encode, start, room)
        ids = encode(plant(lines[start:stop], planted))
        yield Text(
            tuple(ids),
            tuple(Needle(d, *_question(encode, key, code)) for (d, _), key, code in zip(planted, chosen, codes)),
        )
        start = stop


def _fitting(lines: Sequence[str], encode: Encode, start: int, room: int) -> int:
    """The end of the longest run of lines from ``start`` that holds at most ``room`` tokens."""
    stop = start
    while stop < len(lines) and (size := len(encode(lines[stop]))) <= room:
        room -= size
        stop += 1
    if stop == len(lines):
        raise ValueError("the prompt file has too few lines for these contexts; ask for fewer or shorter ones")
    return stop


def _question(encode: Encode, key: str, code: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that ask for the code of ``key``, all but the answer's last token, and the answer's tokens."""
    asked = encode(recall(key, "").rstrip("\n"))
    whole = encode(recall(key, code).rstrip("\n"))
    return tuple(whole[:-1]), tuple(whole[len(asked) :])
