"""The tiny byte-level BPE vocabulary, with the qwen35 pre-tokeniser and the layout that GGUF stores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, CONTROL, UNUSED = 1, 3, 5  # values of tokenizer.ggml.token_type

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Token strings in id order (byte-level spelling), merges in rank order, and the tokeniser built from both."""

    tokens: list[str]
    merges: list[str]
    tokenizer: Tokenizer

    @property
    def token_types(self) -> list[int]:
        return [CONTROL if t in SPECIALS else UNUSED if t.startswith("[PAD") else NORMAL for t in self.tokens]

    def id(self, token: str) -> int:
        return self.tokens.index(token)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 text per token id; 0 for control and unused tokens."""
        lengths = [len(t) if kind == NORMAL else 0 for t, kind in zip(self.tokens, self.token_types, strict=True)]
        return np.array(lengths, np.int64)


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build(tokens: list[str], merges: list[str]) -> Vocabulary:
    """A Vocabulary from the token and merge lists of a GGUF file."""
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = _pipeline(models.BPE(vocab=ids, merges=pairs))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    return Vocabulary(tokens, merges, tokenizer)


def train(texts: Iterable[str], size: int) -> Vocabulary:
    """Learn `size` tokens from `texts`: bytes and merges first, [PADn] fillers if merges run out, specials last."""
    tokenizer = _pipeline(models.BPE())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size - len(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in learned]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size - len(SPECIALS))]
    return build([*tokens, *SPECIALS], _merges(tokenizer))


def _merges(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
