"""Text: what a model's tokenizer and chat template make of it, and what comes out again.

``chat`` is imported where messages are rendered, since jinja2 is slow to import.
"""

from pydflash.text.reasoning import AnswerPart, ReasoningSplitter, has_mark, mark_ids, starts_inside
from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = [
    "AnswerPart",
    "ReasoningSplitter",
    "StopFilter",
    "TextStream",
    "Tokenizer",
    "has_mark",
    "mark_ids",
    "starts_inside",
]
