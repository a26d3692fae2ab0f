"""Text: what a model's tokenizer and chat template make of it, and what comes out again."""

from pydflash.text.chat import ChatTemplate
from pydflash.text.control import SPECIAL, Special, encode_messages, encode_text
from pydflash.text.reasoning import AnswerPart, ReasoningSplitter, has_mark, mark_ids, starts_inside
from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = [
    "SPECIAL",
    "AnswerPart",
    "ChatTemplate",
    "ReasoningSplitter",
    "Special",
    "StopFilter",
    "TextStream",
    "Tokenizer",
    "encode_messages",
    "encode_text",
    "has_mark",
    "mark_ids",
    "starts_inside",
]
