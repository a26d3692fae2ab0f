"""Every error pydflash raises. Each message says what was asked, what was found and what to do."""

from __future__ import annotations

from pydflash.control_chars import escape_controls

__all__ = [
    "BadMetadata",
    "ConfigError",
    "ContextFull",
    "ContextWarning",
    "DeviceError",
    "DraftMismatch",
    "LoadError",
    "MissingTensor",
    "NativeError",
    "NoDevice",
    "NothingPending",
    "OutOfMemory",
    "PydflashError",
    "SessionClosed",
    "ShapeError",
    "SnapshotMismatch",
    "StateError",
    "TemplateError",
    "UnsupportedArchitecture",
    "UnsupportedModel",
    "WriteError",
]


class _Quoting(Exception):
    """Messages quote names and texts of files; what a terminal would obey in them is spelled out."""

    def __str__(self) -> str:
        return escape_controls(super().__str__(), keep="\n\t")


class PydflashError(_Quoting):
    """Base class: catching it catches everything this package raises on purpose."""


class ConfigError(PydflashError, ValueError):
    """An option has an unknown name or a value outside its range."""


class TemplateError(PydflashError):
    """A chat template is missing, does not compile, or failed while rendering."""


class LoadError(PydflashError):
    """A model file cannot be used."""


class UnsupportedModel(LoadError):
    """A file asks for something that this package does not compute; the message names the tensor or the key."""


class UnsupportedArchitecture(UnsupportedModel):
    """The file's ``general.architecture`` is not one that this package runs."""


class MissingTensor(LoadError):
    """A tensor that the architecture needs is not in the file."""


class BadMetadata(LoadError):
    """A metadata value is missing, of the wrong type, or outside what the architecture allows."""


class DraftMismatch(LoadError):
    """A draft does not fit the target it was loaded for."""


class ShapeError(PydflashError, ValueError):
    """Shapes, dtypes or token ids do not fit; raised before ggml sees the call."""


class StateError(PydflashError):
    """A session was asked for something that its state does not allow."""


class ContextFull(StateError):
    """The session's ``max_context`` has no room for the tokens asked for."""


class NothingPending(StateError):
    """``commit`` was called without a preceding ``forward``."""


class SessionClosed(StateError):
    """The session, model or engine was used after ``close()``."""


class SnapshotMismatch(StateError):
    """A snapshot belongs to another configuration; the message names the field that differs."""


class DeviceError(PydflashError):
    """A device cannot do what was asked."""


class OutOfMemory(DeviceError):
    """An allocation does not fit; the message gives the bytes asked for and free, and the device."""


class NoDevice(DeviceError):
    """The device asked for does not exist on this machine or in this build."""


class NativeError(PydflashError):
    """ggml returned a failure; the message ends with its last log line."""


class WriteError(PydflashError, OSError):
    """A file cannot be written, or must not be because it is an input; what was there is unharmed."""


class ContextWarning(_Quoting, UserWarning):
    """A session has room for more positions than its model was trained on."""
