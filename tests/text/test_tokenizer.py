"""The tokenizer gives back what it was given, splits like the models it serves, and says what is wrong with a file."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Pipeline

from pydflash.errors import BadMetadata, ConfigError, ShapeError
from pydflash.text import Tokenizer
from pydflash.text import tokenizer as tokenizer_module
from pydflash.text.special_tokens import TokenType
from pydflash.text.tokenizer import BYTE_OF, PRE_TOKENIZERS

TEXT = (Path(__file__).parents[1] / "data" / "multilingual.txt").read_bytes().decode("utf-8")
LINES = TEXT.removesuffix("\n").split("\n")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜größe｜>"]
USER_DEFINED = ["<think>", "</think>", "a b"]
UNUSED = ["[PAD0]", "[PAD 1]", "[PADé2]"]


def train(pre: str) -> dict[str, Any]:
    """Train a small BPE on the test lines and write it down the way a GGUF file does."""
    pipeline = Pipeline(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=sorted(BYTE_OF), show_progress=False)
    pipeline.train_from_iterator(LINES, trainer)
    vocab = pipeline.get_vocab()
    plain = sorted(vocab, key=lambda token: vocab[token])
    merges = _merges_of(pipeline)
    kinds = [(CONTROL, TokenType.CONTROL), (USER_DEFINED, TokenType.USER_DEFINED), (UNUSED, TokenType.UNUSED)]
    tokens, types = list(plain), [TokenType.NORMAL] * len(plain)
    for texts, kind in kinds:
        tokens += texts
        types += [kind] * len(texts)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("[PAD0]"),
        "tokenizer.ggml.mask_token_id": len(tokens) + 5,
    }


def _merges_of(pipeline: Pipeline) -> list[str]:
    merges = json.loads(pipeline.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return train("qwen35")


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


@pytest.fixture(scope="module")
def plain(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata, normalize=False)


def test_the_text_file_is_what_these_tests_need() -> None:
    assert len(LINES) == 200
    assert len(set(LINES)) == 200
    assert sum(unicodedata.normalize("NFC", line) != line for line in LINES) >= 10
    assert {"Arabic", "Cyrillic", "Thai", "Tibetan", "Hangul"} <= _scripts(TEXT)


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(character, "UNNAMED").split()[0].title() for character in set(text)}


@pytest.mark.parametrize("line", LINES, ids=range(1, 201))
def test_lines_survive_the_round_trip(line: str, tokenizer: Tokenizer, plain: Tokenizer) -> None:
    """NFC changes decomposed input, as in training; without it every character comes back."""
    assert tokenizer.decode(tokenizer.encode(line, special=False)) == unicodedata.normalize("NFC", line)
    assert plain.decode(plain.encode(line, special=False)) == line
    assert plain.decode(plain.encode(line)) == line


def test_the_whole_text_with_its_line_ends_survives(plain: Tokenizer) -> None:
    for text in (TEXT, TEXT.replace("\n", "\r\n"), TEXT.replace("\n", "\n\n \n\t")):
        assert plain.decode(plain.encode(text)) == text


def test_every_supported_split_survives_the_round_trip(metadata: dict[str, Any]) -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.pre": pre}, normalize=False)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_ids_equal_those_of_a_pipeline_that_was_trained_whole() -> None:
    """The GGUF keeps only tokens and merges; the ids must still be those of the library's own pipeline."""
    pre = "qwen2"
    data = train(pre)
    direct = Pipeline(
        models.BPE(vocab={t: i for i, t in enumerate(data["tokenizer.ggml.tokens"])}, merges=_pairs(data))
    )
    direct.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre][0]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    direct.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer = Tokenizer.from_metadata(data)
    for line in LINES:
        if not any(text in line for text in [*CONTROL, *USER_DEFINED]):
            assert tokenizer.encode(line) == direct.encode(line).ids


def _pairs(data: dict[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (merge.split(" ") for merge in data["tokenizer.ggml.merges"])]


def pieces(pre: str, text: str) -> list[str]:
    """Return where the split cuts ``text``: with no merge at all, by asking the library's pre-tokenizer."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("qwen35", "I'M it's", ["I", "'M", " it", "'s"]),
        ("qwen35", "x 123", ["x", " ", "1", "2", "3"]),
        ("qwen35", "a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
        ("qwen35", "-a ..\n$", ["-a", " ..\n", "$"]),
        ("qwen35", "क\u093cख e\u0301e", ["क\u093cख", " e\u0301e"]),
        ("qwen2", "e\u0301e", ["e", "\u0301e"]),
        ("llama-bpe", "12345 I'M", ["123", "45", " I", "'M"]),
        ("gpt-2", "12345 I'M it's", ["12345", " I", "'", "M", " it", "'s"]),
        ("default", "a.b 12345", ["a", ".", "b", " ", "123", "45"]),
    ],
)
def test_splits_fall_where_the_models_expect_them(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


def test_nfc_joins_what_llama_cpp_leaves_apart(tokenizer: Tokenizer, plain: Tokenizer) -> None:
    composed, decomposed = "é", "e\u0301"
    assert tokenizer.encode(decomposed) == tokenizer.encode(composed)
    assert plain.encode(decomposed) != plain.encode(composed)
    assert (tokenizer.normalize, plain.normalize) == (True, False)


def test_special_tokens_are_read_only_when_asked(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (start, end)
    typed = tokenizer.encode(text, special=False)
    assert not {start, end} & set(typed)
    assert tokenizer.decode(ids) == tokenizer.decode(typed) == text
    assert tokenizer.decode(ids, skip_special=True) == "user\nhi"


def test_special_tokens_are_matched_as_written_not_after_nfc(tokenizer: Tokenizer) -> None:
    written = "<｜größe｜>"
    assert tokenizer.encode(written) == [tokenizer.token_id(written)]
    assert tokenizer.token_id(written) not in tokenizer.encode(unicodedata.normalize("NFD", written))


def test_user_defined_tokens_are_read_and_shown_either_way(tokenizer: Tokenizer) -> None:
    think = tokenizer.token_id("<think>")
    for special in (True, False):
        assert think in tokenizer.encode("x<think>y", special=special)
    assert tokenizer.decode(tokenizer.encode("x<think>a b"), skip_special=True) == "x<think>a b"


def test_unused_tokens_are_never_read(tokenizer: Tokenizer) -> None:
    assert not {tokenizer.token_id(text) for text in UNUSED} & set(tokenizer.encode(" ".join(UNUSED)))


def test_token_bytes_of_every_kind(tokenizer: Tokenizer) -> None:
    for text in [*CONTROL, *USER_DEFINED, "[PAD 1]"]:
        token = tokenizer.token_id(text)
        assert token is not None
        assert tokenizer.token_bytes(token) == text.encode("utf-8")
    singles = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles


def test_named_ids(metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.eos_id == tokens.index("<|im_end|>")
    assert tokenizer.eos_ids == {tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")}
    assert tokenizer.pad_id == tokens.index("[PAD0]")
    assert tokenizer.mask_id == len(tokens) + 5  # a padding row that is no token
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.add_bos) == (None, None, False)
    assert tokenizer.token_id("no such token") is None
    absent = {"tokenizer.ggml.eot_token_id": -1, "tokenizer.ggml.bos_token_id": 0xFFFF_FFFF}
    assert Tokenizer.from_metadata({**metadata, **absent}).eot_id is None
    more = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.bos_token_id": 4, "tokenizer.ggml.add_bos_token": True}
    extended = Tokenizer.from_metadata({**metadata, **more})
    assert 3 in extended.eos_ids
    assert (extended.bos_id, extended.add_bos) == (4, True)


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED])
def test_tokens_known_by_their_text_are_control_whatever_the_file_says(metadata: dict[str, Any], kind: int) -> None:
    types = metadata["tokenizer.ggml.token_type"].copy()
    token = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    types[token] = kind
    tokenizer = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.token_type": types.tolist()})
    assert token in tokenizer.eos_ids & tokenizer.control_ids
    assert tokenizer.encode("a<|endoftext|>")[-1] == token
    assert tokenizer.decode([token], skip_special=True) == ""


def test_text_encoded_without_added_tokens_holds_none_of_them(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>x<think>a b</think>"
    ids = tokenizer.encode(text, added=False)
    assert not {tokenizer.token_id(each) for each in [*CONTROL, *USER_DEFINED]} & set(ids)
    assert tokenizer.decode(ids) == text


def stream(tokenizer: Tokenizer, tokens: Sequence[int], skip_special: bool = False) -> str:
    decoder = tokenizer.decoder(skip_special)
    return "".join([decoder.push(token) for token in tokens]) + decoder.flush()


def test_streamed_text_equals_the_decoded_text_for_any_tokens(tokenizer: Tokenizer) -> None:
    """Random ids are mostly broken UTF-8. The reference joins the bytes and decodes them once."""
    chance = random.Random(0)
    for _ in range(300):
        tokens = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randrange(40))]
        whole = b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", errors="replace")
        assert stream(tokenizer, tokens) == tokenizer.decode(tokens) == whole
        assert stream(tokenizer, tokens, skip_special=True) == tokenizer.decode(tokens, skip_special=True)


def test_streamed_lines_hold_back_incomplete_characters(plain: Tokenizer) -> None:
    byte_ids = {plain.token_bytes(token): token for token in range(plain.vocab_size)}
    decoder = plain.decoder()
    for line in LINES:
        for character in line:
            *first, last = (byte_ids[bytes([byte])] for byte in character.encode("utf-8"))
            assert [decoder.push(token) for token in first] == [""] * len(first)
            assert decoder.push(last) == character
    assert decoder.flush() == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff", "\ufffd"),
        (b"a\x80b", "a\ufffdb"),
        (b"\xe2\x82", "\ufffd"),
        (b"\xe2\x82A", "\ufffdA"),
        (b"\xf0\x9f\x98\xf0\x9f\x98\x80", "\ufffd\U0001f600"),
        (b"\xc0\xaf", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd"),
    ],
)
def test_invalid_bytes_become_replacement_characters(data: bytes, text: str, plain: Tokenizer) -> None:
    byte_ids = {plain.token_bytes(token): token for token in range(plain.vocab_size)}
    tokens = [byte_ids[bytes([byte])] for byte in data]
    assert plain.decode(tokens) == stream(plain, tokens) == text


def test_a_decoder_starts_afresh_after_flush(plain: Tokenizer) -> None:
    byte_ids = {plain.token_bytes(token): token for token in range(plain.vocab_size)}
    decoder = plain.decoder()
    assert decoder.push(byte_ids[b"\xe2"]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(byte_ids[b"A"]) == "A"


def test_ids_outside_the_vocabulary_are_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        message = f"token id {token} is outside the vocabulary of {tokenizer.vocab_size:,}"
        for act in (tokenizer.token_bytes, tokenizer.decoder().push, lambda token: tokenizer.decode([token])):
            with pytest.raises(ShapeError, match=message):
                act(token)


def test_lone_surrogates_are_refused_with_their_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"character 2 of the text is the lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800c")


def test_empty_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges", "token_type"])
def test_a_missing_key_is_named(key: str, metadata: dict[str, Any]) -> None:
    name = f"tokenizer.ggml.{key}"
    with pytest.raises(BadMetadata, match=f"{name} is missing"):
        Tokenizer.from_metadata({k: v for k, v in metadata.items() if k != name})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", "model is 'llama'; only byte-level BPE"),
        (
            "pre",
            "qwen9",
            "pre is 'qwen9', which is not supported; supported are default, gpt-2, llama-bpe, qwen2, qwen35",
        ),
        ("pre", 5, "pre is a int, not a str"),
        ("tokens", "abc", "tokens is a str, not a Sequence"),
        ("token_type", [1, 2], "token_type has 2 entries for"),
        ("eos_token_id", 10**6, "eos_token_id is 1000000, outside the"),
        ("eos_token_id", "x", "eos_token_id is 'x', not an integer"),
    ],
)
def test_a_value_that_does_not_fit_is_named(key: str, value: object, message: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(BadMetadata, match=f"tokenizer.ggml.{message}"):
        Tokenizer.from_metadata({**metadata, f"tokenizer.ggml.{key}": value})


def test_damaged_lists_are_found_when_the_tokenizer_is_read(metadata: dict[str, Any]) -> None:
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    damaged: list[tuple[dict[str, Any], str]] = [
        ({"merges": [*merges, "ab"]}, rf"merges\[{len(merges)}\] is 'ab', not two tokens"),
        ({"merges": [*merges, "a  b"]}, rf"merges\[{len(merges)}\] is 'a  b', not two tokens"),
        ({"merges": [*merges, " b"]}, rf"merges\[{len(merges)}\] is ' b', not two tokens"),
        ({"merges": [*merges, "a b c"]}, rf"merges\[{len(merges)}\] is 'a b c', not two tokens"),
        ({"merges": [*merges, "\u0416 a"]}, "tokens has no '\u0416'"),
        ({"merges": [*merges, f"{tokens[0]} {tokens[-1]}"]}, f"tokens has no '{re.escape(tokens[0] + tokens[-1])}'"),
        ({"merges": [*merges, 5]}, "merges does not hold texts alone"),
        ({"tokens": [*tokens[:-1], b"a"]}, "tokens does not hold texts alone"),
        ({"token_type": 3}, "token_type is no list of integers"),
        ({"token_type": "normal"}, "token_type is no list of integers"),
        ({"token_type": np.ones(len(tokens), np.float32)}, "token_type is no list of integers"),
        ({"token_type": [1] * (len(tokens) - 1) + [7]}, "token_type holds 7; known are 0 to 6"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ({"eos_token_ids": [len(tokens)]}, f"eos_token_ids is {len(tokens)}, outside"),
        ({"eos_token_ids": 3}, "eos_token_ids is no list of integers"),
        ({"tokens": [*tokens[:-1], tokens[0]]}, rf"holds '.*' twice, as ids 0 and {len(tokens) - 1}"),
    ]
    for change, message in damaged:
        changed = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
        with pytest.raises(BadMetadata, match=f"tokenizer.ggml.*{message}"):
            Tokenizer.from_metadata(changed)


def test_other_ids_that_end_a_turn_count(metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    for listed in (np.array([5, 7], np.int32), [5, -1, 7]):  # -1: there is none
        more = {"tokenizer.ggml.eos_token_ids": listed}
        assert Tokenizer.from_metadata({**metadata, **more}).eos_ids == tokenizer.eos_ids | {5, 7}


def test_two_vocabularies_differ_at_the_first_plain_token(metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokenizer.difference(list(tokens)) is None
    control = tokens.index("<|im_end|>")
    assert tokenizer.difference([*tokens[:control], "<|renamed|>", *tokens[control + 1 :]]) is None
    assert tokenizer.difference([*tokens[:9], "\u0416", *tokens[10:]]) == 9


def test_loading_does_not_import_the_library() -> None:
    """The library is imported by the first encode, so that programs that only count or decode start quickly."""
    code = "import sys, pydflash.text; sys.exit('tokenizers' in sys.modules)"
    root = Path(tokenizer_module.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
