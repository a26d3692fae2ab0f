"""Who generates with an engine, and the stream of chunks that they read."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

from pydflash.engine.completion import Chunk
from pydflash.errors import StateError

__all__ = ["Caller", "Stream"]


class Caller:
    """Whoever generates with an engine, as its stream and the engine both know it."""

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.advancing = threading.Lock()  # held while the next chunk is made
        self.thread: threading.Thread | None = None  # that asked for a chunk last
        self.done = False

    @property
    def in_the_way(self) -> bool:
        """Whether another caller must not take the engine: another thread may ask for the next chunk, or waits for it.

        A stream that was left unfinished, in a variable or a traceback, gives way to the next call of its own thread,
        and to all once that has ended.
        """
        if self.done or self.thread is None:
            return False
        return self.advancing.locked() or (self.thread is not threading.current_thread() and self.thread.is_alive())


class Stream(Iterator[Chunk]):
    """The chunks of one generation. ``close()`` ends it, from any thread, and so does leaving a ``with`` block.

    A thread that waits for the next chunk meanwhile gets a last one, whose ``finish_reason`` is "cancelled", after the
    step or the chunk of the prompt under way.
    """

    def __init__(self, chunks: Generator[Chunk, None, None], caller: Caller) -> None:
        self._chunks, self._caller = chunks, caller

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if not self._caller.advancing.acquire(blocking=False):
            raise StateError("another thread waits for this stream's next chunk; give each thread a stream of its own")
        try:
            self._caller.thread = threading.current_thread()
            return next(self._chunks)
        finally:
            self._caller.advancing.release()

    def close(self) -> None:
        """End the generation. Safe to call twice."""
        self._caller.cancel.set()
        if self._caller.advancing.acquire(blocking=False):  # else the thread that makes the next chunk ends it
            try:
                self._chunks.close()
            finally:
                self._caller.advancing.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
