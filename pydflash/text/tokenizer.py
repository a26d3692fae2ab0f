"""Text to token ids and back, built from the metadata of a GGUF file alone.

The pipeline is the one the models were trained with: NFC, a regular-expression split, byte-level alphabet, BPE merges.
llama.cpp skips NFC, so the two differ on decomposed input such as ``e`` + U+0301; ``normalize=False`` gives its ids.
Decoding works on bytes, because one character may span several tokens and a token may end inside a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

from pydflash import machine
from pydflash.arguments import an_instance, an_iterable, shown
from pydflash.errors import BadMetadata, ConfigError, OutOfMemory, ShapeError
from pydflash.text.special_tokens import AddedTokens, TokenType, classify

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Decoder", "Tokenizer", "named_token_id"]


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
)

# GGUF key tokenizer.ggml.pre: the splits, applied one after the other, each to the pieces that the previous one left.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "qwen35": (QWEN35,),
}
NFC_PRES = frozenset({"qwen2", "qwen35"})
WHOLE_WORD_PRES = frozenset({"llama-bpe"})  # a word that is itself a token is taken as it is, whatever the merges say

# Roles of tokens that a file can name: tokenizer.ggml.ROLE_token_id.
ROLES = (
    "bos",
    "eos",
    "eot",
    "eom",
    "padding",
    "mask",
    "fim_pre",
    "fim_suf",
    "fim_mid",
    "fim_pad",
    "fim_rep",
    "fim_sep",
)
ABSENT_IDS = frozenset({-1, 0xFFFF_FFFF})  # how some converters write "this model has no such token"


def _byte_alphabet() -> dict[str, int]:
    """Map each character of the byte-level alphabet to its byte: printable Latin-1 is itself, the rest at U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE vocabulary; ids are those of the GGUF file.

    Attributes: ``vocab_size`` (tokens), ``pre`` (name of the split), ``normalize`` (NFC first), ``add_bos`` (the model
    expects ``bos_id`` before a raw prompt; ``encode`` does not add it), ``bos_id``, ``eos_id``, ``eot_id``, ``pad_id``
    (None where the file has none), ``mask_id`` (may lie outside the vocabulary: drafts use padding rows),
    ``control_ids`` (never part of the text of an answer) and ``eos_ids`` (every id that ends one); both by the rules of
    ``special_tokens``.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        token_types: Sequence[int],
        *,
        pre: str,
        normalize: bool | None = None,
        add_bos: bool = False,
        named: Mapping[str, int] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        """See ``from_metadata``; ``named`` holds the ids of ``ROLES`` that exist, ``ends`` others that end a turn."""
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise BadMetadata(f"tokenizer.ggml.pre is {pre!r}, which is not supported; supported are {known}")
        self._ids = _ids_of(tokens)
        _check_types(token_types, len(tokens))
        _check_merges(merges, self._ids)
        self._tokens, self._merges, self._types = tokens, merges, token_types
        self.pre = pre
        self.normalize = pre in NFC_PRES if normalize is None else normalize
        self.add_bos = add_bos
        self.vocab_size = len(tokens)
        ids = dict(named or {})
        self.mask_id = ids.pop("mask", None)
        for key, token in [*((f"{name}_token_id", ids[name]) for name in ids), *(("eos_token_ids", i) for i in ends)]:
            if not 0 <= token < self.vocab_size:
                raise BadMetadata(f"tokenizer.ggml.{key} is {token}, outside the {self.vocab_size:,} tokens")
        self.bos_id, self.eos_id, self.eot_id = ids.get("bos"), ids.get("eos"), ids.get("eot")
        self.pad_id = ids.get("padding")
        # Added tokens are few (tens), so they are kept as a table; the 248,320 others are looked up by id when needed.
        self._added, known_ends = classify(tokens, token_types, ids)
        self.control_ids = frozenset(i for i, kind in self._added.items() if kind is TokenType.CONTROL)
        self.eos_ids = known_ends | frozenset(ends)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, normalize: bool | None = None) -> Tokenizer:
        """Read the ``tokenizer.ggml.*`` keys of a GGUF file; the BPE itself is built by the first ``encode``.

        ``normalize`` None follows the pre-tokenizer (NFC for the Qwen ones), False gives llama.cpp's ids.
        Everything is checked here. Raises BadMetadata, naming the key, where one is missing, has the wrong type or a
        value that does not fit.
        """
        model = _require(metadata, "tokenizer.ggml.model", str)
        if model != "gpt2":
            raise BadMetadata(f"tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is supported")
        types = metadata.get("tokenizer.ggml.token_type")
        if types is None:
            raise BadMetadata("tokenizer.ggml.token_type is missing: nothing marks control tokens; convert again")
        ids = {name: named_token_id(metadata, name) for name in ROLES}
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", False)
        if not isinstance(add_bos, bool):
            raise BadMetadata(f"tokenizer.ggml.add_bos_token is {add_bos!r:.40}, not true or false")
        ends = _integers(metadata.get("tokenizer.ggml.eos_token_ids", ()), "eos_token_ids")  # of Ollama
        return cls(
            _texts(metadata, "tokens"),
            _texts(metadata, "merges"),
            _integers(types, "token_type"),
            pre=_require(metadata, "tokenizer.ggml.pre", str),
            normalize=normalize,
            add_bos=add_bos,
            named={name: token for name, token in ids.items() if token is not None},
            ends=[token for token in ends if token not in ABSENT_IDS],
        )

    def encode(self, text: str, special: bool = True, added: bool = True) -> list[int]:
        """Return the token ids of ``text``, without a leading BOS.

        ``special`` False reads control tokens such as ``<|im_end|>`` as plain text; tokens that the model's authors
        added without marking them as control (``<think>``) are recognised either way, as llama.cpp does. ``added``
        False reads these as plain text too, for text that a user typed; only runs of white space stay tokens.
        Raises ConfigError where ``text`` holds a lone surrogate, BadMetadata where merges and tokens disagree.
        """
        an_instance(text, str, "text")
        an_instance(special, bool, "special")
        an_instance(added, bool, "added")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which has"
                " no UTF-8 form; decode the source with errors='replace'"
            ) from None
        bpe = self._plain if not added else self._with_control if special else self._without_control
        ids: list[int] = bpe.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of ``tokens``; bytes that are not UTF-8 become U+FFFD.

        ``skip_special`` leaves control tokens out. Raises ShapeError where an id is outside the vocabulary.
        """
        decoder = self.decoder(an_instance(skip_special, bool, "skip_special"))
        return "".join([decoder.push(token) for token in an_iterable(tokens, "tokens")]) + decoder.flush()

    def decoder(self, skip_special: bool = False) -> Decoder:
        """Return an incremental decoder: its pieces, joined, equal ``decode`` of all the tokens."""
        return Decoder(self, skip_special)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that ``token`` stands for. Raises ShapeError where the id is outside the vocabulary."""
        token = self.checked(token)
        text = self._tokens[token]
        if token not in self._added:
            with suppress(KeyError):  # a filler that was never written in the byte-level alphabet
                return bytes([BYTE_OF[character] for character in text])
        return text.encode("utf-8", "surrogateescape")

    def checked(self, token: int) -> int:
        """Return ``token`` as an int. Raises ShapeError where it is no integer, or outside the vocabulary."""
        try:
            place = index(token)
        except TypeError:
            raise ShapeError(f"token id {shown(token)} is not an integer") from None
        if not 0 <= place < self.vocab_size:
            raise ShapeError(f"token id {shown(token)} is outside the vocabulary of {self.vocab_size:,} tokens")
        return place

    def token_id(self, text: str) -> int | None:
        """Return the id of the token stored as ``text`` (``<think>``), or None; plain tokens are stored byte-level."""
        return self._ids.get(an_instance(text, str, "text"))

    @cached_property
    def added(self) -> AddedTokens:
        """The control and the other added tokens, by their texts."""
        return AddedTokens({self._tokens[i]: i for i in self._added})

    def difference(self, tokens: Sequence[str]) -> int | None:
        """The first id at which ``tokens`` of the same length name another text; None where there is none.

        Control tokens and fillers may differ: releases of one model family rename them.
        """
        if tokens == self._tokens:
            return None
        triples = enumerate(zip(self._tokens, tokens, self._types))
        return next((i for i, (ours, theirs, kind) in triples if ours != theirs and kind == TokenType.NORMAL), None)

    @cached_property
    def _bpe(self) -> tokenizers.models.BPE:
        from tokenizers.models import BPE

        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in self._merges)]
        try:
            return BPE(vocab=self._ids, merges=pairs, ignore_merges=self.pre in WHOLE_WORD_PRES)
        except Exception as error:  # the library raises the base class
            raise BadMetadata(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error

    @cached_property
    def _with_control(self) -> tokenizers.Tokenizer:
        return self._pipeline(self._added)

    @cached_property
    def _without_control(self) -> tokenizers.Tokenizer:
        return self._pipeline(self._added.keys() - self.control_ids)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return self._pipeline(i for i in self._added if self._tokens[i] not in self.added.marks)

    def _pipeline(self, recognised: Iterable[int]) -> tokenizers.Tokenizer:
        """Wrap the shared BPE. Three pipelines, not one with a switch: flipping it would disturb other threads."""
        _check_memory(self.vocab_size)
        from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline

        pipeline = Pipeline(self._bpe)
        if self.normalize:
            pipeline.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[self.pre]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        texts = [self._tokens[i] for i in sorted(recognised)]
        pipeline.add_tokens([AddedToken(text, normalized=False) for text in texts if text])
        return pipeline


class Decoder:
    """Turns tokens into text as they come, holding back the bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the characters that ``token`` completes, often none. Raises ShapeError for an id out of range."""
        if self._tokenizer.checked(token) in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """End the text: return U+FFFD for a character left incomplete, else nothing. The decoder can be used again."""
        return self._utf8.decode(b"", final=True)


# What the tokenizers library takes at most, measured with 1,000 and 248,320 tokens: for itself, and for each of them.
_LIBRARY_BYTES, _TOKEN_BYTES = 16 << 20, 512


def _check_memory(tokens: int) -> None:
    """OutOfMemory unless the tokenizers library has enough: it ends the process where an allocation fails."""
    needed, left = _LIBRARY_BYTES + _TOKEN_BYTES * tokens, machine.memory()
    if left is not None and left.free < needed:
        raise OutOfMemory(
            f"a tokenizer of {tokens:,} tokens needs {needed:,} bytes of host memory, where {left.free:,} are free; "
            "free some, or raise the limits of this process (ulimit -v and -d, those of its cgroup)"
        )


# --- checks of a file's lists -----------------------------------------------------------------------------------------


def _ids_of(tokens: Sequence[str]) -> dict[str, int]:
    """Token to id. Raises BadMetadata for a token that stands twice."""
    ids = dict(zip(tokens, range(len(tokens))))
    if len(ids) != len(tokens):
        twice = next(i for i, text in enumerate(tokens) if ids[text] != i)
        text = tokens[twice]
        raise BadMetadata(f"tokenizer.ggml.tokens holds {text!r} twice, as ids {twice} and {ids[text]}")
    return ids


def _check_types(types: Sequence[int], tokens: int) -> None:
    if len(types) != tokens:
        raise BadMetadata(f"tokenizer.ggml.token_type has {len(types):,} entries for {tokens:,} tokens")
    unknown = set(types) - {0, *TokenType}  # 0: undefined
    if unknown:
        raise BadMetadata(f"tokenizer.ggml.token_type holds {min(unknown)}; known are 0 to {max(TokenType):d}")


def _check_merges(merges: Sequence[str], ids: Mapping[str, int]) -> None:
    """BadMetadata unless each merge is two tokens that make a third; a space inside a token is written U+0120."""
    if {merge.count(" ") for merge in merges} <= {1}:
        parts = set(" ".join(merges).split(" "))  # of all at once: there are a quarter of a million
        wholes = set("\n".join(merges).replace(" ", "").split("\n"))
        if parts.issubset(ids) and wholes.issubset(ids) and "" not in parts:
            return
    for i, merge in enumerate(merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(pair):
            raise BadMetadata(f"tokenizer.ggml.merges[{i}] is {merge!r}, not two tokens with a space between")
        unknown = next((text for text in (*pair, "".join(pair)) if text not in ids), None)
        if unknown is not None:
            raise BadMetadata(f"tokenizer.ggml.merges[{i}] is {merge!r}, and tokenizer.ggml.tokens has no {unknown!r}")


def _texts(metadata: Mapping[str, Any], name: str) -> Sequence[str]:
    """The list ``tokenizer.ggml.NAME`` of texts."""
    key = f"tokenizer.ggml.{name}"
    texts: Sequence[str] = _require(metadata, key, Sequence)
    if set(map(type, texts)) - {str}:
        raise BadMetadata(f"{key} does not hold texts alone")
    return texts


def _integers(values: Any, name: str) -> list[int]:
    """``values`` of ``tokenizer.ggml.NAME``, an array or a list, as plain integers."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not all(isinstance(v, int) for v in listed):
        raise BadMetadata(f"tokenizer.ggml.{name} is no list of integers")
    return list(listed)


def named_token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Return ``tokenizer.ggml.NAME_token_id``, or None where the file has none or says so with an all-ones id."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    try:
        token = index(value)
    except TypeError:
        raise BadMetadata(f"tokenizer.ggml.{name}_token_id is {value!r}, not an integer") from None
    return None if token in ABSENT_IDS else token


def _require(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return ``metadata[key]``, of type ``kind``."""
    value = metadata.get(key)
    if value is None:
        raise BadMetadata(f"{key} is missing: the file has no tokenizer that this package can build; convert it again")
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        raise BadMetadata(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value
