"""Text: what a model's tokenizer and chat template make of it, and what comes out again.

``chat`` is imported where messages are rendered, since jinja2 is slow to import.
"""

from pydflash.text.control import SPECIAL, Special, encode_messages, encode_text
from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = ["SPECIAL", "Special", "StopFilter", "TextStream", "Tokenizer", "encode_messages", "encode_text"]
