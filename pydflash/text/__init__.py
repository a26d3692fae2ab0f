"""Text: what a model's tokenizer and chat template make of it, and what comes out again.

``chat`` is imported where messages are rendered, since jinja2 is slow to import.
"""

from pydflash.text.control import SPECIAL, Special, encode_messages, encode_text
from pydflash.text.reasoning import AnswerPart, ReasoningSplitter, has_mark, mark_ids, starts_inside
from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = [
    "SPECIAL",
    "AnswerPart",
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
