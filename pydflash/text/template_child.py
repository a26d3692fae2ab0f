"""The process of one chat template: compiles it, then renders it as often as it is asked.

``template_process`` starts it and ends it. It imports Jinja and nothing of what runs models, and its standard input is
the socket through which jobs come and answers go.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydflash.errors import TemplateError
from pydflash.text.template_protocol import EXHAUSTED, FAILED, TEXT, Limits, receive, send

try:
    import resource
except ImportError:  # not on Windows; the parent's clock is a limit even so
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from pydflash.text.sandbox import Template

__all__ = ["main"]

MAX_JOB = 1 << 30  # bytes; the parent counts characters
OPEN_FILES = 16  # enough to import an encoding


def main() -> None:
    """Serve the socket that is file descriptor 0 until its other end closes."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what the starting thread blocks would be blocked here too
    channel = socket.socket(fileno=0)
    with suppress(EOFError, OSError):
        try:
            _serve(channel)
            return
        except MemoryError:  # by variables or by an answer; what held the memory is free after this clause
            pass
        send(channel, EXHAUSTED, "the chat template failed: its process ran out of memory")


def _serve(channel: socket.socket) -> None:
    try:
        from pydflash.text.sandbox import Template  # here, so that the parent hears why it cannot be imported
    except Exception as error:
        send(channel, FAILED, f"cannot import Jinja: {type(error).__name__}: {error}")
        return
    send(channel, TEXT, "")
    order = json.loads(receive(channel, MAX_JOB)[1])
    limits = Limits(order["seconds"], order["memory"])
    _confine(limits)
    try:
        template = Template(order["source"], limits)
    except TemplateError as error:
        send(channel, FAILED, error.args[0])
        return
    kind, text = TEXT, ""
    while kind != EXHAUSTED:
        send(channel, kind, text)
        kind, text = _rendered(template, receive(channel, MAX_JOB)[1], limits)
    send(channel, kind, text)


def _rendered(template: Template, variables: str, limits: Limits) -> tuple[bytes, str]:
    _limit("RLIMIT_CPU", int(time.process_time() + limits.seconds) + 2)
    try:
        return TEXT, template.render(json.loads(variables))
    except TemplateError as error:
        return EXHAUSTED if isinstance(error.__cause__, MemoryError) else FAILED, error.args[0]


def _confine(limits: Limits) -> None:
    """Bound what this process may take, and make it the first to go when the machine runs out of memory."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _limit("RLIMIT_CPU", int(time.process_time() + limits.seconds) + 2)
    _limit("RLIMIT_AS", limits.memory)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_NOFILE", OPEN_FILES)


def _limit(name: str, value: int) -> None:
    """Set the soft limit, which the system enforces, and not the hard one, which could not be raised again."""
    if resource is not None:
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # a system may know a limit and not enforce it
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
