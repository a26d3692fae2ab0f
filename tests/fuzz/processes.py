"""The worker process as its parent sees it: each trial has a limit of time, and its end is an outcome too."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tests.fuzz.outcomes import Outcome

__all__ = ["MEMORY", "SECONDS", "Worker"]

SECONDS = 12.0
MEMORY = 2 << 30
STARTUP_SECONDS = 60.0  # until a worker's first answer: it imports, and loads the good files
ROOT = Path(__file__).parents[2]


class Worker:
    """Runs trials in a child process, which is replaced when it dies or takes longer than ``seconds`` for one."""

    def __init__(self, folder: Path, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._command = [sys.executable, "-m", "tests.fuzz.worker", str(folder), str(memory)]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._fresh = True  # no answer yet
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)

    def run(self, driver: str, first: int, count: int) -> Iterator[tuple[int, Outcome]]:
        """Seeds ``first`` to ``first + count - 1`` with their outcomes, in order."""
        seed, end = first, first + count
        while seed < end:
            self._ask({"driver": driver, "first": seed, "count": end - seed})
            while seed < end:
                answer = self._answer()
                yield seed, answer if isinstance(answer, Outcome) else Outcome(*answer)
                seed += 1
                if isinstance(answer, Outcome):
                    break

    def replay(self, driver: str, recipe: Any) -> Outcome:
        self._ask({"driver": driver, "recipe": recipe})
        answer = self._answer()
        return answer if isinstance(answer, Outcome) else Outcome(*answer)

    def recipe(self, driver: str, seed: int) -> Any:
        """What ``seed`` tries."""
        self._ask({"driver": driver, "describe": seed})
        return self._answer()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> None:
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
            self._process = subprocess.Popen(self._command, cwd=ROOT, bufsize=0, **pipes)  # type: ignore[call-overload]
            self._fresh, self._pending = True, b""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _answer(self) -> Any:
        """The next line's value; an Outcome where the process died or took too long."""
        assert self._process is not None
        deadline = time.monotonic() + (max(STARTUP_SECONDS, self._seconds) if self._fresh else self._seconds)
        while b"\n" not in self._pending:
            piece = self._read(deadline)
            if piece is None:
                self._process.send_signal(signal.SIGABRT)  # faulthandler writes where it is
                time.sleep(0.2)
                return self._ended("hang")
            if not piece:
                return self._ended("crash")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        self._fresh = False
        return json.loads(line)

    def _read(self, deadline: float) -> bytes | None:
        """Some bytes, none at the end of the stream; None when there are none in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        return os.read(descriptor, 1 << 16) if ready else None

    def _ended(self, kind: str) -> Outcome:
        assert self._process is not None
        code = self._process.wait() if kind == "crash" else None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-2000:]
        self.close()
        return Outcome(kind, f"exit code {code}: {said}" if kind == "crash" else said)
