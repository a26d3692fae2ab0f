"""The engine: a model, its draft and its sessions behind ``stream`` and ``generate``."""

from pydflash.decode import FinishReason
from pydflash.engine.completion import Chunk, Completion, Piece
from pydflash.engine.engine import Engine
from pydflash.engine.prompt import Prompt
from pydflash.engine.stream import Stream

__all__ = ["Chunk", "Completion", "Engine", "FinishReason", "Piece", "Prompt", "Stream"]
