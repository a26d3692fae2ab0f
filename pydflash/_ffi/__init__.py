"""The native library: ``ffi``, ``lib``, ownership, status checks and ggml's log.

Only tensor, graph, backend, gguf, ops and state import this package. Importing it loads ggml's CPU libraries; CUDA is
loaded when a CUDA device is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ggml forks a debugger for a backtrace when it aborts, and reads this once when the library is loaded.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

from pydflash._ffi import _ggml
from pydflash._ffi._ggml import ffi, lib
from pydflash.errors import NativeError

__all__ = ["build_info", "check", "cuda_library", "ffi", "last_log_line", "lib", "owned"]

lib.pydflash_log_start()


def last_log_line() -> str:
    """ggml's last warning or error, which is then forgotten; empty when there was none."""
    buffer = ffi.new("char[512]")
    lib.pydflash_log_last(buffer, 512)
    return str(ffi.string(buffer).decode(errors="replace"))


def check(result: Any, what: str) -> Any:
    """``result`` of a native call named ``what``; NativeError when it is NULL, False or a status other than 0."""
    if isinstance(result, ffi.CData):
        failed = result == ffi.NULL
    else:
        failed = result is False or (result is not True and result != 0)
    if failed:
        detail = last_log_line()
        raise NativeError(f"{what} failed{': ' + detail if detail else ''}")
    return result


def owned(pointer: Any, free: Callable[[Any], None], what: str) -> Any:
    """``pointer``, freed with ``free`` when it is released (``ffi.release``) or collected; NativeError when NULL."""
    return ffi.gc(check(pointer, what), free)


def build_info() -> dict[str, str]:
    """What was chosen when the extension was built: cuda, why, nvcc, architectures, fa_quants, native, ggml."""
    text = ffi.string(lib.pydflash_build_info()).decode()
    return dict(item.split("=", 1) for item in text.split("|"))


def cuda_library() -> Path:
    """Where libggml-cuda lies when the package was built with CUDA: beside the extension."""
    return Path(_ggml.__file__).with_name("libggml-cuda.so")
