"""Text: what a model's tokenizer and chat template make of it, and what comes out again."""

from pydflash.text.chat import ChatTemplate
from pydflash.text.stream import StopFilter, TextStream
from pydflash.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopFilter", "TextStream", "Tokenizer"]
