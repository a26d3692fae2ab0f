"""What is checked before ggml is called, since it ends the process where memory, a thread or stack cannot be had."""

from __future__ import annotations

import os
from typing import NoReturn

from pydflash._ffi import lib
from pydflash.errors import DeviceError, OutOfMemory

__all__ = ["STACK", "check_allocation", "check_stack", "check_threads", "refuse_stack"]

STACK = 128 << 10
"""Bytes of stack that a thread must have left to build or run a graph."""

_MARGIN = 1 << 20  # for what ggml allocates besides: structures of a few bytes each


def check_allocation(size: int, what: str) -> None:
    """OutOfMemory unless this process can allocate ``size`` bytes of host memory for ``what``."""
    if not lib.pydflash_can_allocate(size + _MARGIN):
        raise OutOfMemory(
            f"{what} needs {size:,} bytes of host memory, which this process cannot have; "
            "free some, or raise its limits (ulimit -v and -d, those of its cgroup)"
        )


def check_stack() -> None:
    """DeviceError when the calling thread has less than ``STACK`` bytes of its stack left."""
    if lib.pydflash_stack_left() < STACK:
        refuse_stack()


def refuse_stack() -> NoReturn:
    """What ``check_stack`` raises."""
    left = max(lib.pydflash_stack_left(), 0)
    raise DeviceError(
        f"a graph needs {STACK >> 10} KiB of stack, and this thread has {left >> 10} KiB left; "
        "call threading.stack_size(1 << 20) before the thread is made, or raise ulimit -s"
    )


def check_threads(count: int) -> None:
    """DeviceError unless ``count`` more threads can run at once, each with enough stack for a graph."""
    failure = lib.pydflash_threads_try(count, STACK, _MARGIN)
    if failure < 0:
        raise DeviceError(
            f"new threads get less than the {STACK >> 10} KiB of stack that a graph needs; raise ulimit -s"
        )
    if failure:
        raise DeviceError(
            f"{count} more threads were asked for, and cannot be started: {os.strerror(failure)}; "
            "ask for fewer threads, or raise the limits on memory and threads (ulimit -v and -u, those of the cgroup)"
        )
