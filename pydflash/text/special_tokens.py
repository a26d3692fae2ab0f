"""Added tokens: which of a vocabulary are control, which end a generation, and where their texts stand in a text.

The types in a file are not the whole truth: conversions of fine-tuned models mark ``<|im_end|>`` as a normal or a
user-defined token. llama.cpp corrects the types by the tokens' texts (``src/llama-vocab.cpp``); so does this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

__all__ = ["AddedTokens", "TokenType", "classify"]


class TokenType(IntEnum):
    """GGUF key ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Added tokens are matched in a text before it is split. Unknown tokens are treated like control tokens.
ADDED = {
    int(TokenType.CONTROL): TokenType.CONTROL,
    int(TokenType.UNKNOWN): TokenType.CONTROL,
    int(TokenType.USER_DEFINED): TokenType.USER_DEFINED,
}

# Control tokens that end a generation, whatever their type in the file.
END_TEXTS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|return|>",
        "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip

# Control tokens of fill-in-the-middle, unless the file names another token in the role: tokenizer.ggml.ROLE_token_id.
FILL_TEXTS = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
ENDING_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

# Parts of a message in the Harmony format, which belong to the text that a caller reads.
SHOWN_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})

KNOWN_TEXTS = END_TEXTS | SHOWN_TEXTS | {text for texts in FILL_TEXTS.values() for text in texts} | {"<|plamo:eos|>"}


def classify(
    tokens: Sequence[str], types: Sequence[int], roles: Mapping[str, int]
) -> tuple[dict[int, TokenType], frozenset[int]]:
    """Return the type, CONTROL or USER_DEFINED, of each added token by id, and the ids that end a generation.

    ``roles``: the ids that the file names, such as ``{"eos": 248046}``.
    """
    ids = {text: i for i, text in enumerate(tokens) if isinstance(text, str) and text in KNOWN_TEXTS}
    added = {i: ADDED[kind] for i, kind in enumerate(types) if kind in ADDED}
    ends = {roles[role] for role in ENDING_ROLES if role in roles}
    for role, texts in FILL_TEXTS.items():
        found = [] if role in roles else [ids[text] for text in texts if text in ids]
        added |= dict.fromkeys(found, TokenType.CONTROL)
        ends |= set(found) if role in ENDING_ROLES else set()
    found = [ids[text] for text in END_TEXTS if text in ids]
    added |= dict.fromkeys(found, TokenType.CONTROL)
    ends |= set(found)
    added |= {ids[text]: TokenType.USER_DEFINED for text in SHOWN_TEXTS if text in ids}
    _spare_texts_of_other_meaning(ids, added, ends)
    return added, frozenset(ends)


def _spare_texts_of_other_meaning(ids: Mapping[str, int], added: dict[int, TokenType], ends: set[int]) -> None:
    """Harmony's ``<|end|>`` ends a message, not the answer, and ``</s>`` is HTML where another token ends the turn."""
    present = {text for text, i in ids.items() if i in ends}
    harmony = {"<|return|>", "<|flush|>"} & present and {"<|call|>", "<|calls|>"} & present
    if harmony and "<|end|>" in present:
        ends.discard(ids["<|end|>"])
        added[ids["<|end|>"]] = TokenType.USER_DEFINED
    if {"<|tool_response>", "<|plamo:eos|>"} & present and "</s>" in present:
        ends.discard(ids["</s>"])
        added.pop(ids["</s>"])


class AddedTokens:
    """The texts of added tokens in a text.

    Attributes: ``ids`` (by text); ``marks``, the texts that are more than white space (runs of spaces are text, even
    where a vocabulary adds them); ``starts``, the first character of each of ``marks``; ``brackets``, its first and its
    last punctuation.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: i for text, i in ids.items() if text}
        self.marks = frozenset(text for text in self.ids if not text.isspace())
        self.starts = frozenset(text[0] for text in self.marks)
        punctuation = [[c for c in text if not (c.isalnum() or c.isspace() or c == "_")] for text in self.marks]
        self.brackets = frozenset(c for found in punctuation for c in (*found[:1], *found[-1:]))
        self._any = _pattern(self.ids)
        self._start = _start(self.marks)

    def split(self, text: str) -> list[str | int]:
        """``text`` in order as ids of added tokens and the non-empty texts between them.

        The leftmost token counts, and of several that start there the longest, as in the tokenizers library.
        """
        parts: list[str | int] = []
        done = 0
        for found in self._any.finditer(text):
            if found.start() > done:
                parts.append(text[done : found.start()])
            parts.append(self.ids[found[0]])
            done = found.end()
        return [*parts, text[done:]] if done < len(text) else parts

    def replace_starts(self, text: str, table: Mapping[str, str]) -> str:
        """``text`` with ``table`` applied to each character at which one of ``marks`` starts."""
        return self._start.sub(lambda found: table[found[0]], text)


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of ``texts``."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _start(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of each of ``texts``, overlapping ones too."""
    rests: dict[str, list[str]] = {}
    for text in sorted(texts):
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()) or "(?!)")
