"""Which tokens are control and which end a generation is what llama.cpp makes of the same vocabulary."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Pipeline

from pydflash.text.special_tokens import AddedTokens, TokenType, classify

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED
QWEN = ["<|im_end|>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<think>", "a"]


def classified(tokens: list[str], kind: int = NORMAL, **roles: int) -> tuple[dict[str, TokenType], set[str]]:
    """Kinds by text, and the texts of the ends, of a vocabulary whose tokens are all of one type."""
    added, ends = classify(tokens, [kind] * len(tokens), roles)
    return {tokens[i]: added[i] for i in added}, {tokens[i] for i in ends}


def test_texts_make_control_tokens_and_ends_of_normal_ones() -> None:
    added, ends = classified(QWEN)
    assert added == dict.fromkeys(QWEN[:5], CONTROL)
    assert ends == {"<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}


def test_types_of_the_file_hold_for_other_texts() -> None:
    added, _ = classified(["<think>", "x"], USER_DEFINED)
    assert added == dict.fromkeys(["<think>", "x"], USER_DEFINED)
    added, ends = classified(["<|im_start|>", "<unk>"], UNKNOWN)
    assert (added, ends) == (dict.fromkeys(["<|im_start|>", "<unk>"], CONTROL), set())


def test_named_ids_end_a_generation_and_replace_a_role_s_texts() -> None:
    added, ends = classified(["<|fim_pad|>", "other", "stop", "turn", "<|file_sep|>"], fim_pad=1, eos=2, eom=3)
    assert added == {"<|file_sep|>": CONTROL}
    assert ends == {"other", "stop", "turn", "<|file_sep|>"}


@pytest.mark.parametrize(
    ("tokens", "ends", "changed"),
    [
        (["<|end|>", "<|return|>"], {"<|end|>", "<|return|>"}, {}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}, {"<|end|>": USER_DEFINED}),
        (["<|end|>", "<|calls|>", "<|flush|>"], {"<|calls|>", "<|flush|>"}, {"<|end|>": USER_DEFINED}),
        (["<|channel|>", "<|message|>"], set(), {"<|channel|>": USER_DEFINED, "<|message|>": USER_DEFINED}),
        (["</s>", "a"], {"</s>"}, {"</s>": CONTROL, "a": None}),
        (["</s>", "<|tool_response>"], {"<|tool_response>"}, {"</s>": None}),
    ],
)
def test_families_in_which_a_text_means_something_else(tokens: list[str], ends: set[str], changed: Any) -> None:
    added, found = classified(tokens)
    assert found == ends
    assert {text: added.get(text) for text in changed} == changed


TEXTS = ["<a>", "<a>b", "b<", "<", "  ", " <a>", "aa", "a<a"]


def test_texts_are_split_at_added_tokens_as_the_library_does_it() -> None:
    ids = {text: 100 + i for i, text in enumerate(TEXTS)}
    letters = {letter: i for i, letter in enumerate("<>ab c")}
    library = Pipeline(models.BPE(vocab={**letters, **ids}, merges=[]))
    library.add_tokens([AddedToken(text, normalized=False) for text in TEXTS])
    added, chance = AddedTokens(ids), random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices("<>ab c", k=chance.randrange(12)))
        parts = [[part] if isinstance(part, int) else [letters[c] for c in part] for part in added.split(text)]
        assert [token for part in parts for token in part] == library.encode(text).ids, text


def test_nothing_is_found_without_added_tokens() -> None:
    none = AddedTokens({})
    assert none.split("a<|im_end|>") == ["a<|im_end|>"]
    assert none.split("") == []
    assert none.replace_starts("<", {}) == "<"


def test_brackets_are_the_outermost_punctuation() -> None:
    added = AddedTokens({"<|im_end|>": 0, "_[EOT]": 1, "a b": 2, "  ": 3})
    assert added.marks == {"<|im_end|>", "_[EOT]", "a b"}
    assert added.starts == {"<", "_", "a"}
    assert added.brackets == {"<", ">", "[", "]"}
