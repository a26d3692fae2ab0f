"""Speculative decoding of Qwen3.5/3.6-class hybrid models from Python: the public names.

Names are resolved when they are first used, so that importing the package loads no native code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydflash.decode import Stats, Step, autoregressive, speculative
    from pydflash.draft import Draft, DraftSession, load_draft
    from pydflash.engine import Chunk, Completion, Engine, Piece
    from pydflash.errors import (
        BadMetadata,
        ConfigError,
        ContextFull,
        DeviceError,
        DraftMismatch,
        LoadError,
        MissingTensor,
        NativeError,
        NoDevice,
        NothingPending,
        OutOfMemory,
        PydflashError,
        SessionClosed,
        ShapeError,
        SnapshotMismatch,
        StateError,
        TemplateError,
        UnsupportedArchitecture,
        WriteError,
    )
    from pydflash.models import Model, load_model
    from pydflash.sampling import Sampler, SamplingParams
    from pydflash.session import Session
    from pydflash.snapshot import Snapshot

__version__ = "0.1.0"

__all__ = [
    "BadMetadata",
    "Chunk",
    "Completion",
    "ConfigError",
    "ContextFull",
    "DeviceError",
    "Draft",
    "DraftMismatch",
    "DraftSession",
    "Engine",
    "LoadError",
    "MissingTensor",
    "Model",
    "NativeError",
    "NoDevice",
    "NothingPending",
    "OutOfMemory",
    "Piece",
    "PydflashError",
    "Sampler",
    "SamplingParams",
    "Session",
    "SessionClosed",
    "ShapeError",
    "Snapshot",
    "SnapshotMismatch",
    "StateError",
    "Stats",
    "Step",
    "TemplateError",
    "UnsupportedArchitecture",
    "WriteError",
    "__version__",
    "autoregressive",
    "load_draft",
    "load_model",
    "speculative",
]

_HOMES = {
    "decode": ("Stats", "Step", "autoregressive", "speculative"),
    "draft": ("Draft", "DraftSession", "load_draft"),
    "engine": ("Chunk", "Completion", "Engine", "Piece"),
    "models": ("Model", "load_model"),
    "sampling": ("Sampler", "SamplingParams"),
    "session": ("Session",),
    "snapshot": ("Snapshot",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pydflash' has no attribute {name!r}")
    value = getattr(import_module(f"pydflash.{_HOME_OF.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
