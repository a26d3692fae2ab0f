"""Synthetic byte-level BPE vocabularies that are well formed: every merge joins two earlier tokens into a new one."""

from __future__ import annotations

from dataclasses import dataclass

from .writer import Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# The 33 added tokens of Qwen3.5, in the order of their ids (248044 and up in the full vocabulary).
ADDED: list[str] = (  # noqa: SIM905
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> "
    "<tts_text_eod> <tts_text_bos_single> <|audio_pad|>"
).split()
ADDED_SMALL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|audio_start|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Token strings (bytes as their byte-level characters), their GGUF types and the merges, "left right" each."""

    tokens: list[str]
    types: list[int]
    merges: list[str]

    def metadata(self) -> dict[str, Value]:
        """The `tokenizer.*` keys of a GGUF file."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen35",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.eos_token_id": self.tokens.index("<|im_end|>"),
            "tokenizer.ggml.padding_token_id": self.tokens.index("<|endoftext|>"),
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": CHAT_TEMPLATE,
        }

    @property
    def mask_token_id(self) -> int:
        """The id that DFlash drafts of this family use as mask: `<|audio_start|>` (248070 in the full vocabulary)."""
        return self.tokens.index("<|audio_start|>")


def build_vocabulary(size: int) -> Vocabulary:
    """`size` tokens: 256 bytes, merges, added tokens, then `[PADn]` fillers; ValueError if too few or too many."""
    added, fillers = (ADDED, 243) if size >= 8192 else (ADDED_SMALL, 10)
    merged = size - 256 - len(added) - fillers
    if not 0 <= merged <= 64**2 + 64**3:
        raise ValueError(f"a vocabulary has 272 to {64**2 + 64**3 + 532} tokens, {size} were asked for")
    letters = byte_characters()
    pairs = _merges(merged)
    tokens = letters + [left + right for left, right in pairs] + list(added)
    types = [NORMAL] * (256 + merged) + [CONTROL if "|" in token else USER_DEFINED for token in added]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types += [UNUSED] * fillers
    return Vocabulary(tokens, types, [f"{left} {right}" for left, right in pairs])


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in a byte-level vocabulary (GPT-2's mapping)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _merges(count: int) -> list[tuple[str, str]]:
    """The first `count` merges: pairs of 64 letters, frequent ones first, then every pair followed by a letter."""
    space = byte_characters()[ord(" ")]
    letters = space + "etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ0123456789_"
    order = sorted((i + j, i, j) for i in range(64) for j in range(64))
    pairs = [(letters[i], letters[j]) for _, i, j in order]
    triples = ((left + right, letter) for left, right in pairs for letter in letters)
    return (pairs + [next(triples) for _ in range(count - len(pairs))])[:count]
