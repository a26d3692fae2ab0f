"""Who may use a device, and when what nobody uses any more is freed.

A device is used in *steps*: inputs written, graphs run, outputs read. One thread takes a step at a time, others wait.
Objects are collected by any thread at any moment, in the middle of another thread's step too, so a finaliser neither
waits nor frees: it leaves the object to whoever takes the next step.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

from pydflash._ffi import check, ffi
from pydflash.errors import SessionClosed, StateError

__all__ = ["DeviceLock", "closing", "exclusive"]


class DeviceLock:
    """The right to use one device, and the native objects that live there.

    It belongs to the process that made it: after ``fork`` a child can take no step and frees nothing, since threads and
    CUDA contexts stay behind in the parent.
    """

    def __init__(self, device: str) -> None:
        """``device``: its name, for messages."""
        self._device = device
        self._process = os.getpid()
        self.mutex = threading.RLock()
        self._holder = 0  # the thread in a step
        self._abandoned: deque[Callable[[], None]] = deque()
        self._closed = False
        self._exiting = 0  # the thread that takes the interpreter down

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened the device."""
        return os.getpid() != self._process

    @property
    def held(self) -> bool:
        """Whether this thread is in a step."""
        return self._holder == threading.get_ident()

    @contextmanager
    def step(self, *, to_free: bool = False) -> Iterator[None]:
        """The device for this thread alone; waits for the thread that has it. Steps nest.

        Raises StateError in a child of ``fork``, SessionClosed after ``close``. A step ``to_free`` something raises
        neither; in a child it has no effect.
        """
        if not self.admit(to_free):
            yield
            return
        with self.mutex:
            outer = self.take(to_free)
            try:
                yield
            finally:
                self.give_back(outer)

    def admit(self, to_free: bool = False) -> bool:
        """Before a step: False in a child of ``fork``, where finalisers free nothing; else see ``step``."""
        if os.getpid() != self._process:
            if not to_free:
                self._refuse_child()
            return False
        if self._exiting and threading.get_ident() not in (self._exiting, self._holder):
            threading.Event().wait()  # a daemon thread, which ends here together with the process
        return True

    def take(self, to_free: bool = False) -> int:
        """With ``mutex`` acquired: begin a step. Returns what ``give_back`` needs."""
        if self._closed and not to_free:
            raise SessionClosed(f"{self._device} was closed together with its model; load the model again")
        outer, self._holder = self._holder, threading.get_ident()
        while self._abandoned:
            self._abandoned.popleft()()
        return outer

    def give_back(self, outer: int) -> None:
        self._holder = outer

    def close(self) -> None:
        """Let no further step begin, and wait for the one that runs. Safe to call twice."""
        with self.step(to_free=True):
            self._closed = True

    def leave(self) -> None:
        """Wait for the step that runs and keep the device from all other threads for good.

        For ``weakref.finalize`` of the device's owner, which calls it when that was collected, so that no thread can
        have a step, or before the interpreter is taken down, beside daemon threads that still run.
        """
        if not self.forked:
            self._exiting = threading.get_ident()
            self.mutex.acquire()
            while self._abandoned:
                self._abandoned.popleft()()

    def own(self, pointer: Any, free: Callable[[Any], None], what: str) -> Any:
        """``pointer``, a native object freed with ``free`` when it is released (``ffi.release``) or collected.

        Freed at once in a step of this thread, or when no further step can begin; else with the next step.
        NativeError naming ``what`` when it is NULL.
        """

        def finalise(native: Any) -> None:
            if self.forked:
                return
            if self.held or self._closed or self._exiting:
                free(native)
            else:
                self._abandoned.append(partial(free, native))

        return ffi.gc(check(pointer, what), finalise)

    def _refuse_child(self) -> NoReturn:
        raise StateError(
            f"{self._device} was opened by process {self._process}, and this is its child {os.getpid()}, where the "
            "device's threads and memory are missing; load the model after the fork, or start the child with "
            "multiprocessing's 'spawn'"
        )


class OnDevice(Protocol):
    """What lives on a device."""

    @property
    def lock(self) -> DeviceLock: ...


P = ParamSpec("P")
T = TypeVar("T")
Owner = TypeVar("Owner", bound=OnDevice)


def exclusive(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """A method that is one step on the device of ``self.lock``."""

    @wraps(method)
    def step(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        lock = self.lock
        if lock._holder == threading.get_ident():
            return method(self, *args, **kwargs)
        lock.admit()
        with lock.mutex:  # as ``step`` does, without the microseconds of its generator: there are many steps a token
            outer = lock.take()
            try:
                return method(self, *args, **kwargs)
            finally:
                lock.give_back(outer)

    return step


def closing(method: Callable[[Owner], None]) -> Callable[[Owner], None]:
    """A method ``close`` that waits for the step under way on the device of ``self.lock``."""

    @wraps(method)
    def close(self: Owner) -> None:
        with self.lock.step(to_free=True):
            method(self)

    return close
