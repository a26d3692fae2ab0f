"""The native library: ``ffi``, ``lib``, status checks and ggml's log.

Only device_lock, headroom, tensor, graph, backend, ops and doctor import this package. Importing it loads ggml's CPU
libraries, and raises NativeError if this processor lacks instructions that they need. CUDA is loaded when a CUDA device
is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# ggml forks a debugger for a backtrace when it aborts, and reads this once when the library is loaded.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import pydflash._ffi._processor as _processor
from pydflash.errors import NativeError

__all__ = [
    "build_info",
    "check",
    "check_instructions",
    "cuda_library",
    "ffi",
    "last_log_line",
    "lib",
    "missing_instructions",
]


def missing_instructions() -> list[str]:
    """Instruction sets that the libraries were compiled for and this processor, or its system, lacks."""
    asked = _processor.lib
    missing = [
        _processor.ffi.string(asked.pydflash_instructions_name(i)).decode()
        for i in range(asked.pydflash_instructions_count())
        if asked.pydflash_instructions_compiled(i) and not asked.pydflash_instructions_present(i)
    ]
    return [macro.removeprefix("__ARM_FEATURE_").strip("_").lower() for macro in missing]


def check_instructions(missing: Sequence[str]) -> None:
    """NativeError that names what is ``missing``, and how to build without it."""
    if missing:
        raise NativeError(
            f"pydflash was compiled for another processor: this one has no {', '.join(missing)}; build it on this "
            "machine (in the checkout: rm -rf build && pip install --force-reinstall --no-deps .), or for every "
            "processor with AVX2 by adding --config-settings=cmake.define.GGML_NATIVE=OFF"
        )


check_instructions(missing_instructions())

import pydflash._ffi._ggml as _ggml  # noqa: E402  an illegal instruction could end the process here
from pydflash._ffi._ggml import ffi, lib  # noqa: E402

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


def build_info() -> dict[str, str]:
    """What the build chose: cuda, why, nvcc, architectures, kernels, fa_quants, native, ggml."""
    text = ffi.string(lib.pydflash_build_info()).decode()
    return dict(item.split("=", 1) for item in text.split("|"))


def cuda_library() -> Path:
    """Where libggml-cuda lies when the package was built with CUDA: beside the extension."""
    return Path(_ggml.__file__).with_name("libggml-cuda.so")
