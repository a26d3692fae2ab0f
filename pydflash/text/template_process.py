"""A chat template in a process of its own, where it can take no more time and memory than it was given.

Jinja's sandbox decides what a template may reach. Nothing in Python bounds what it takes: one expression can ask for
any amount of time or memory, in C code that cannot be interrupted. A process can be limited, and ended. Each template
has its own, so that one that misbehaves costs the others nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pydflash.errors import ConfigError, SessionClosed, StateError, TemplateError
from pydflash.text.template_protocol import EXHAUSTED, JOB, MAX_OUTPUT, TEXT, Limits, receive, send

__all__ = ["Limits", "TemplateProcess"]

MAX_SOURCE = 1 << 20  # characters of a template; published ones have up to tens of thousands
MAX_ANSWER = 4 * MAX_OUTPUT + 4096  # bytes
START_SECONDS = 10.0  # until the child is ready, which takes 0.1 s on an idle processor
GRACE = 1.0  # seconds that a child has to say which limit it reached

# The child imports from where its parent does, whatever paths and variables that was started with.
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from pydflash.text.template_child import main; main()"
ROOT = str(Path(__file__).parents[2])
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ", "TZDIR")  # without the first some interpreters do not start


class TemplateProcess:
    """The template ``source``, compiled and rendered within ``limits`` by a child process.

    The child starts at once, and again when it was ended for reaching a limit. Threads take turns; after ``fork`` each
    process has a child of its own. ``close`` or ``with`` ends it, and so does the end of this object.
    """

    def __init__(self, source: str, limits: Limits | None = None) -> None:
        """Returns before the child is ready. ConfigError or TemplateError for what is no template, or is too long."""
        if not isinstance(source, str):
            raise ConfigError(f"the chat template is a {type(source).__name__}; expected a text")
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source):,} characters; the most allowed is {MAX_SOURCE:,}")
        self._limits = limits or Limits()
        self._order = json.dumps({"source": source, "seconds": self._limits.seconds, "memory": self._limits.memory})
        self._seats: dict[int, _Seat] = {}  # by process: a fork inherits neither children nor who holds a lock
        self._closed = False
        with suppress(TemplateError):  # the first to ask for something hears of it
            self._seat.child = _Child()

    def compile(self) -> None:
        """Raises TemplateError, with the line, where the template does not compile or reaches a limit."""
        self._ask(None)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for ``variables``, which are plain data, as ``plain_copy`` gives it.

        Raises TemplateError, with the template's line, where the template refuses, fails, or reaches a limit, and
        SessionClosed after ``close``.
        """
        return self._ask(json.dumps(variables, ensure_ascii=False, check_circular=False))

    def close(self) -> None:
        """End the child, in the middle of another thread's rendering too. Safe to call twice."""
        self._closed = True
        for pid, seat in tuple(self._seats.items()):
            child = seat.child
            if child is None:
                continue
            if pid != os.getpid():
                child.end()
                continue
            child.kill()
            if seat.lock.acquire(blocking=False):  # else the thread that waits for an answer does the rest
                child.end()
                seat.lock.release()

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _seat(self) -> _Seat:
        return self._seats.setdefault(os.getpid(), _Seat())

    def _ask(self, variables: str | None) -> str:
        """Have the template compiled, unless it is, and rendered if there are variables."""
        seat = self._seat
        with seat.lock:
            if not self._closed and (seat.child is None or not seat.child.alive):
                seat.child = _Child()
            child = seat.child
            if self._closed or child is None:
                self.close()
                raise SessionClosed("this chat template was closed, by itself or with its engine")
            try:
                return child.ask(self._order, variables, self._limits)
            except TemplateError:
                if self._closed:
                    raise SessionClosed("this chat template was closed while it was rendered") from None
                raise


class _Seat:
    """Where one process keeps its child."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held from request to answer
        self.child: _Child | None = None


class _Child:
    """The process, from its start to its end."""

    def __init__(self) -> None:
        """Start it, and do not wait until it is ready. TemplateError where it cannot be started."""
        self._process, self._channel = _start()
        self.end = weakref.finalize(self, _end, self._process, self._channel, os.getpid())
        self._compiled = self._busy = False
        self._spent = 0.0  # seconds of the first rendering's time that compiling took

    @property
    def alive(self) -> bool:
        return self.end.alive and self._process.poll() is None

    def kill(self) -> None:
        """End the process alone, from any thread; the one that waits for an answer goes on, without one."""
        self._process.kill()

    def ask(self, order: str, variables: str | None, limits: Limits) -> str:
        """The text for ``variables``; before the first the child compiles ``order``.

        After an error it may have been ended.
        """
        if self._busy:
            raise StateError("this chat template is in the middle of a rendering that a signal handler interrupted")
        self._busy = True
        try:
            if not self._compiled:
                self._answer(time.monotonic() + START_SECONDS)
                begin = time.monotonic()
                self._answer(begin + limits.seconds + GRACE, order)
                self._compiled, self._spent = True, time.monotonic() - begin
            if variables is None:
                return ""
            deadline = time.monotonic() + limits.seconds + GRACE - self._spent
            self._spent = 0.0
            return self._answer(deadline, variables)
        except TemplateError:
            raise
        except TimeoutError:
            self.end()
            raise TemplateError(f"{self._what_failed}: {limits.time_reached}") from None
        except (EOFError, OSError, ValueError):
            raise TemplateError(f"{self._what_failed}: {self._why_it_ended(limits)}") from None
        except BaseException:  # an interrupt: the answer that is still to come would be taken for the next one
            self.end()
            raise
        finally:
            self._busy = False

    def _answer(self, deadline: float, job: str | None = None) -> str:
        if job is not None:
            send(self._channel, JOB, job, deadline)
        kind, text = receive(self._channel, MAX_ANSWER, deadline)
        if kind == TEXT:
            return text
        if kind == EXHAUSTED or not self._compiled:
            self.end()
        raise TemplateError(text)

    @property
    def _what_failed(self) -> str:
        return "the chat template failed" if self._compiled else "the chat template does not compile"

    def _why_it_ended(self, limits: Limits) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.end()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return limits.time_reached
        if code == -signal.SIGKILL:
            return "its process was killed, as systems do when memory runs out"
        return f"its process ended ({f'exit code {code}' if code >= 0 else f'signal {-code}'})"


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the child: itself, and the socket to it."""
    program = sys.executable
    if getattr(sys, "frozen", False) or not re.search("python|pypy|graalpy", Path(program or "").name, re.IGNORECASE):
        raise TemplateError(
            "a chat template is rendered by a Python process of its own, and this program is no Python interpreter: "
            f"sys.executable is {program!r}; set it to one that has this package"
        )
    with ExitStack() as undo:
        try:
            paths = [os.path.abspath(path) for path in sys.path if path]
            ours, theirs = map(undo.enter_context, socket.socketpair())
            process = subprocess.Popen(
                [program, "-I", "-c", CHILD, *paths, *([] if ROOT in paths else [ROOT])],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the interpreter is being taken down
            raise TemplateError(f"cannot start {program} to render the chat template: {error}") from error
        undo.pop_all()
    theirs.close()
    return process, ours


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # it is the parent's to end
    channel.close()
