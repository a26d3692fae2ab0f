"""Text: what a model's tokenizer and chat template make of it, and what comes out again.

``chat`` is imported where messages are rendered, since jinja2 is slow to import.
"""

from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = ["StopFilter", "TextStream", "Tokenizer"]
