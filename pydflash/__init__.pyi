# ruff: noqa: F401
from .decode import (
    Sampler,
    SamplingParams,
    Stats,
    Step,
    autoregressive,
    speculative,
)
from .drafts import Draft, DraftSession, load_draft
from .engine import Chunk, Completion, Engine, Piece, Stream
from .errors import (
    BadMetadata,
    ConfigError,
    ContextFull,
    ContextWarning,
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
    UnsupportedModel,
    WriteError,
)
from .models import Model, load_model
from .runtime import Session, SessionPool
from .state import Snapshot

__version__: str
