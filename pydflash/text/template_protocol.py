"""What a chat template's process and its parent agree on: limits, and frames through a socket."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

from pydflash.errors import ConfigError

__all__ = ["EXHAUSTED", "FAILED", "JOB", "MAX_OUTPUT", "TEXT", "Limits", "receive", "send"]

JOB = b"j"  # to the child: JSON, an order for a template first, then variables
TEXT = b"t"  # to the parent: what was asked for
FAILED = b"f"  # why there is none
EXHAUSTED = b"x"  # the same, from a child that is out of memory and ends

# Far above a conversation that fills a context of a million tokens.
MAX_OUTPUT = 16 << 20  # characters
LEAST_MEMORY = 64 << 20  # bytes; an idle child takes about half
MOST_SECONDS = 86_400

HEADER = struct.Struct("<cQ")  # kind, bytes that follow
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program that lets SIGPIPE end it must not meet it here
CODEC = ("utf-8", "surrogatepass")  # a lone surrogate is a character like any other


@dataclass(frozen=True)
class Limits:
    """What one rendering may take: ``seconds`` by the clock, and ``memory``, bytes of address space of its process.

    The first rendering shares its time with compiling.
    """

    seconds: float = 10.0
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MOST_SECONDS:
            raise ConfigError(f"seconds is {self.seconds}; expected a number above 0, at most {MOST_SECONDS:,}")
        if self.memory < LEAST_MEMORY:
            raise ConfigError(f"memory is {self.memory:,} bytes; the least is {LEAST_MEMORY:,}")

    @property
    def time_reached(self) -> str:
        return f"it reached the time limit of {self.seconds:g} seconds"

    @property
    def memory_reached(self) -> str:
        return f"it reached the memory limit of {self.memory >> 20:,} MiB"


def send(channel: socket.socket, kind: bytes, text: str, deadline: float | None = None) -> None:
    """Send a frame. Raises TimeoutError at ``deadline`` (``time.monotonic``), OSError when the other end is gone."""
    body = text.encode(*CODEC)
    _set_timeout(channel, deadline)
    channel.sendall(HEADER.pack(kind, len(body)) + body, NO_SIGNAL)


def receive(channel: socket.socket, most: int, deadline: float | None = None) -> tuple[bytes, str]:
    """Receive a frame of at most ``most`` bytes: its kind and text.

    Raises EOFError when the other end is gone, ValueError for what is no frame, TimeoutError at ``deadline``.
    """
    kind, size = HEADER.unpack(_exactly(channel, HEADER.size, deadline))
    if size > most:
        raise ValueError(f"a frame of {size} bytes; the most is {most}")
    return kind, str(_exactly(channel, size, deadline), *CODEC)


def _exactly(channel: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    missing = memoryview(data)
    while missing:
        _set_timeout(channel, deadline)
        count = channel.recv_into(missing)
        if not count:
            raise EOFError("the other end is closed")
        missing = missing[count:]
    return data


def _set_timeout(channel: socket.socket, deadline: float | None) -> None:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    channel.settimeout(left)
