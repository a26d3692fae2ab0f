"""The engine: a model, its draft and its sessions behind ``stream`` and ``generate``."""

from pydflash.engine.engine import Chunk, Completion, Engine, FinishReason, Piece, Prompt, StopFilter, Stream

__all__ = ["Chunk", "Completion", "Engine", "FinishReason", "Piece", "Prompt", "StopFilter", "Stream"]
