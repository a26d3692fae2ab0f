"""Where memory, threads or stack are short there is an error, never an abort: each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pydflash
from pydflash import Engine, doctor
from pydflash.errors import DeviceError, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.machine import Memory, Processors
from pydflash.native import Arena, Backend
from pydflash.native.headroom import check_allocation, check_stack, check_threads
from tests.tiny import Geometry, write_target

DATA = Path(pydflash.__file__).parent / "data"
LOAD = f"""
import sys, threading, resource
import pydflash.engine
from pydflash import Engine, PydflashError, SamplingParams
def load(threads=2):
    return Engine.load({str(DATA / "tiny-target.gguf")!r}, {str(DATA / "tiny-draft.gguf")!r}, device="cpu",
                       threads=threads, environment={{}})
def write(engine):
    return engine.generate("class A:\\n    def f(self):\\n" * 40, SamplingParams(max_tokens=12))
"""


def run(program: str, prefix: str = "") -> str:
    """What ``program`` printed; it must end by itself. ``prefix`` is shell that runs before Python."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's threads take address space, too
    command = f'{prefix} exec "$0" -c "$1"'
    ran = subprocess.run(
        ["sh", "-c", command, sys.executable, LOAD + program], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-1500:]}"
    return ran.stdout


LIMITED = """
resource.setrlimit(resource.{which}, ({limit} << 20,) * 2)
try:
    with load() as engine:
        print(len(write(engine).tokens), "tokens")
except (PydflashError, MemoryError) as error:
    print(type(error).__name__, error)
"""
# PYDFLASH_TEST_SWEEP, MiB from one limit to the next, tries more of them; those here met each kind of failure.
STEP = int(os.environ.get("PYDFLASH_TEST_SWEEP", "0"))
ADDRESS_SPACE = range(100, 401, STEP) if STEP else (100, 160, 178, 184, 200, 220, 400)
DATA_SEGMENT = range(20, 161, STEP) if STEP else (40, 90, 110)


@pytest.mark.parametrize(
    ("which", "limit"),
    [*(("RLIMIT_AS", mib) for mib in ADDRESS_SPACE), *(("RLIMIT_DATA", mib) for mib in DATA_SEGMENT)],
)
def test_a_limit_of_memory_is_met_with_an_error(which: str, limit: int) -> None:
    out = run(LIMITED.replace("{which}", which).replace("{limit}", str(limit)))
    assert "12 tokens" in out or "Error" in out or "OutOfMemory" in out


def test_more_than_can_be_allocated_is_refused_by_name() -> None:
    with pytest.raises(OutOfMemory, match=r"a moon needs 1,152,921,504,606,846,976 bytes of host memory"):
        check_allocation(1 << 60, "a moon")
    check_allocation(1 << 20, "a pebble")


def test_threads_that_cannot_start_are_refused() -> None:
    out = run(
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2)\n"
        "try: load(threads=512)\n"
        "except PydflashError as error: print(type(error).__name__, error)"
    )
    assert "DeviceError 511 more threads were asked for, and cannot be started" in out


def test_small_stacks_of_the_process_are_refused() -> None:
    """Those of new threads, and the main thread's own."""
    program = """
for threads in (2, 1):
    try: write(load(threads))
    except PydflashError as error: print(error)
"""
    lines = run(program, prefix="ulimit -S -s 100;").splitlines()
    assert "new threads get less than the 128 KiB of stack" in lines[0]
    assert "a graph needs 128 KiB of stack, and this thread has" in lines[1]


def test_threads_with_a_stack_that_is_large_enough_start() -> None:
    check_threads(0)
    check_threads(3)


def test_a_thread_with_a_small_stack_is_refused_and_others_are_not() -> None:
    program = """
engine = load(1)
def work():
    try: print(len(write(engine).tokens), "tokens")
    except PydflashError as error: print(type(error).__name__, error)
for kib in (32, 64, 100, 256, 1024):
    threading.stack_size(kib << 10)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
work()
"""
    lines = run(program).splitlines()
    assert [line.split()[0] for line in lines] == ["DeviceError"] * 3 + ["12"] * 3
    assert "threading.stack_size" in lines[0]


def test_the_stack_of_this_thread_is_large_enough() -> None:
    check_stack()


def test_threads_that_end_leave_nothing_behind(tmp_path: Path) -> None:
    """What a product needs belongs to the back end; here, with 16,384 columns, it is 1.1 MB for each thread."""
    geometry = Geometry(64, 1, 1, 2, 1, 64, 16, 2, 2, 32, 4, 16384, 320)
    path = write_target(tmp_path / "wide.gguf", geometry, "f16")
    program = f"""
import re
from pydflash import Session, load_model
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
model = load_model({str(path)!r}, "cpu", threads=1)
session = Session(model, 64)
def work():
    session.forward(list(range(16)))
    session.commit(0)
def many(count):
    for _ in range(count):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
many(20)
before = resident()
many(200)
print(resident() - before)
"""
    grown = int(run(program))
    assert grown < 8 << 20, f"{grown:,} bytes in 200 threads"


def test_what_is_free_is_what_the_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydflash.machine.memory", lambda: Memory(1 << 20, 1 << 30))
    with Backend("cpu", threads=1) as backend:
        assert backend.memory() == (1 << 20, 1 << 30)
        with pytest.raises(OutOfMemory, match=r"a cache needs 2,\d+,\d+ bytes on cpu .*, where 1,048,576 are free"):
            Arena(backend, {"x": ((1 << 14, 32), GGMLType.F32)}, "a cache")


def test_more_threads_than_can_run_are_explained(monkeypatch: pytest.MonkeyPatch, target_path: Path) -> None:
    """They are allowed, and what they cost is said where settings are explained and in doctor."""
    monkeypatch.setattr("pydflash.machine.processors", lambda: Processors(8, 1.0))
    monkeypatch.setattr("pydflash.engine.explain.processors", lambda: Processors(8, 1.0))
    with Engine.load(target_path, device="cpu", threads=2, environment={}) as engine:
        assert "2, of which 1 can run at once" in engine.explain()
    with Engine.load(target_path, device="cpu", environment={}) as engine:
        assert engine.model.backend.threads == 1
    monkeypatch.setenv("PYDFLASH_THREADS", "2")
    assert any("PYDFLASH_THREADS is 2, and 1 can run at once" in problem for problem in doctor.examine().problems)


def test_a_backend_without_its_threads_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int) -> None:
        raise DeviceError("none")

    monkeypatch.setattr("pydflash.native.backend.check_threads", refuse)
    with pytest.raises(DeviceError, match="none"):
        Backend("cpu", threads=4)
