"""One thread uses a device at a time, nothing is freed beside a step, and a child of fork gets an error."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from pydflash._ffi import ffi
from pydflash.errors import NativeError, PydflashError, SessionClosed, StateError
from pydflash.ggml_types import GGMLType
from pydflash.models import Model, load_model
from pydflash.native import Arena, Backend, DeviceLock
from pydflash.runtime import Session
from tests.tiny import GEOMETRIES, write_target

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SPECS = {"x": ((4, 64), GGMLType.F32)}


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def in_child(work: Callable[[], Any]) -> str:
    """What ``work`` returns or raises in a child of fork, as text; 'hangs' after 30 seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    timer = threading.Timer(30, os.kill, (pid, 9))
    timer.start()
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    timer.cancel()
    return text if status == 0 else "hangs"


# --- steps ------------------------------------------------------------------------------------------------------------


def test_steps_nest_and_exclude_other_threads() -> None:
    lock, order, inside = DeviceLock("a device"), [], threading.Event()

    def other() -> None:
        inside.wait()
        with lock.step():
            order.append("other")

    thread = in_thread(other)
    with lock.step(), lock.step():
        inside.set()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_an_exception_in_a_step_ends_it() -> None:
    lock = DeviceLock("a device")
    with pytest.raises(KeyError), lock.step():
        raise KeyError
    thread = in_thread(lambda: lock.step().__enter__())
    thread.join(5)
    assert not thread.is_alive()


def test_after_close_no_step_begins_and_closing_is_still_possible() -> None:
    lock = DeviceLock("device 'cpu'")
    lock.close()
    lock.close()
    with pytest.raises(SessionClosed, match="device 'cpu' was closed together with its model"), lock.step():
        pass
    with lock.step(to_free=True):
        pass


# --- what is collected ------------------------------------------------------------------------------------------------


class Freed:
    """Native objects, and which of them were freed in which thread."""

    def __init__(self, lock: DeviceLock) -> None:
        self.lock, self.log = lock, []  # type: ignore[var-annotated]

    def new(self) -> Any:
        return self.lock.own(ffi.new("int[1]"), lambda native: self.log.append(threading.get_ident()), "a thing")


def test_what_is_collected_beside_a_step_is_freed_by_the_next_one() -> None:
    lock = DeviceLock("a device")
    freed, taken, done = Freed(lock), threading.Event(), threading.Event()
    thing = freed.new()

    def hold() -> None:
        with lock.step():
            taken.set()
            done.wait()

    thread = in_thread(hold)
    taken.wait()
    del thing
    gc.collect()
    assert freed.log == []
    done.set()
    thread.join()
    assert freed.log == []
    with lock.step():
        assert freed.log == [threading.get_ident()]


def test_the_thread_in_a_step_frees_at_once_and_so_does_anyone_after_the_last_one() -> None:
    lock = DeviceLock("a device")
    freed = Freed(lock)
    thing, later = freed.new(), freed.new()
    with lock.step():
        del thing
        assert len(freed.log) == 1
    lock.close()
    del later
    assert len(freed.log) == 2


def test_what_is_released_is_not_freed_again_when_it_is_collected() -> None:
    lock = DeviceLock("a device")
    freed = Freed(lock)
    thing = freed.new()
    with lock.step():
        ffi.release(thing)
        del thing
        gc.collect()
    assert len(freed.log) == 1


def test_a_null_pointer_is_an_error_that_names_what_was_asked() -> None:
    with pytest.raises(NativeError, match="a thing"):
        DeviceLock("a device").own(ffi.NULL, lambda native: None, "a thing")


def test_a_backend_that_is_dropped_frees_all_that_is_left_on_it() -> None:
    backend = Backend("cpu", threads=1)
    arena = Arena(backend, SPECS, "an arena")
    freed, gone = Freed(backend.lock), weakref.ref(backend)
    thing = freed.new()
    del thing  # nobody takes a step any more
    assert freed.log == []
    del backend, arena
    gc.collect()
    assert gone() is None
    assert len(freed.log) == 1


def test_sessions_collected_while_another_runs_change_nothing(model_of: Callable[..., Model]) -> None:
    model, stop = model_of("equal"), threading.Event()

    def litter() -> None:
        while not stop.is_set():
            session = Session(model, 64)
            session.forward(TOKENS)
            del session  # not closed: its graphs and caches are collected

    with Session(model, 256) as session:
        wanted = session.forward(TOKENS, "all").logits
        session.commit(0)
        threads = [in_thread(litter) for _ in range(2)]
        for _ in range(30):
            assert np.array_equal(session.forward(TOKENS, "all").logits, wanted)
            session.commit(0)
        stop.set()
        for thread in threads:
            thread.join()


# --- threads ----------------------------------------------------------------------------------------------------------


def test_sessions_of_one_model_in_threads_compute_what_they_compute_alone(model_of: Callable[..., Model]) -> None:
    model = model_of("gqa6", "q8_0")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, model.config.vocab, n).tolist() for n in (5, 40, 100, 17)]

    def logits(prompt: list[int]) -> Any:
        with Session(model, 256, "q4_0", "q8_0", chunk=32) as session:
            session.forward(prompt[:-3], "none")
            session.commit(len(prompt) - 3)
            return session.forward(prompt[-3:], "all").logits

    wanted = [logits(prompt) for prompt in prompts]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(8) if not np.array_equal(logits(prompts[i]), wanted[i]))

    threads = [in_thread(lambda i=i: work(i)) for i in range(len(prompts))]
    for thread in threads:
        thread.join()
    assert wrong == []


def run_until_an_error(session: Session, errors: list[type], begun: threading.Event) -> None:
    try:
        while True:
            session.forward(TOKENS * 8)
            begun.set()
            session.reset()
    except PydflashError as error:
        errors.append(type(error))


@pytest.mark.parametrize("what", ["session", "model"])
def test_closing_what_another_thread_uses_waits_for_its_step(tmp_path: Any, what: str) -> None:
    path = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"], "f32", seed=1)
    for _ in range(10):
        model = load_model(path, "cpu", threads=2)
        session, errors, begun = Session(model, 256), [], threading.Event()
        thread = in_thread(partial(run_until_an_error, session, errors, begun))
        begun.wait()
        (session if what == "session" else model).close()
        thread.join(20)
        assert not thread.is_alive()
        assert errors == [SessionClosed]
        session.close()
        model.close()


def test_an_output_of_an_earlier_forward_is_refused_in_any_thread(model_of: Callable[..., Model]) -> None:
    with Session(model_of("equal"), 64) as session:
        stale = session.forward(TOKENS)
        session.commit(0)
        session.forward(TOKENS)
        for read in (lambda: stale.logits, lambda: stale.argmax):
            with pytest.raises(StateError, match="earlier forward"):
                read()


# --- fork -------------------------------------------------------------------------------------------------------------


def test_a_child_of_fork_is_told_what_to_do_and_the_parent_goes_on(model_of: Callable[..., Model]) -> None:
    with Session(model_of("equal"), 64) as session:
        wanted = session.forward(TOKENS).logits
        session.commit(0)
        for use in (
            lambda: session.forward(TOKENS),
            lambda: session.reset(),
            lambda: session.snapshot(),
            lambda: Session(session.model, 64),
            lambda: session.model.backend.synchronize(),
        ):
            said = in_child(use)
            assert said.startswith("StateError: device 'cpu' was opened by process"), said
            assert "load the model after the fork" in said
        assert np.array_equal(session.forward(TOKENS).logits, wanted)


def test_a_child_may_close_collect_and_load_for_itself(tmp_path: Any) -> None:
    path = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"], "f32", seed=1)
    with load_model(path, "cpu", threads=2) as model, Session(model, 64) as session:
        wanted = int(session.forward(TOKENS).argmax[0])

        def child() -> int:
            session.close()
            model.close()
            gc.collect()
            with load_model(path, "cpu", threads=2) as own, Session(own, 64) as fresh:
                return int(fresh.forward(TOKENS).argmax[0])

        assert in_child(child) == str(wanted)
        session.commit(0)
        assert int(session.forward(TOKENS).argmax[0]) == wanted


def test_a_fork_while_another_thread_is_in_a_step_does_not_hang(model_of: Callable[..., Model]) -> None:
    model, stop = model_of("equal"), threading.Event()

    def work() -> None:
        with Session(model, 1024) as session:
            while not stop.is_set():
                session.forward([1] * 500, "none")
                session.reset()

    thread = in_thread(work)
    with Session(model, 64) as session:
        for _ in range(5):
            assert in_child(lambda: session.forward(TOKENS)).startswith("StateError")
    stop.set()
    thread.join()


# --- the end of the interpreter ---------------------------------------------------------------------------------------

ENDING = """
import sys, threading
from pydflash import Session, load_model
model = load_model(sys.argv[1], "cpu", threads=2)
begun = [threading.Event() for _ in range(3)]
def work(event):
    session = Session(model, 1024)
    while True:
        for _ in session.prefill([1] * 600):
            pass
        event.set()
        session.reset()
for event in begun:
    threading.Thread(target=work, args=(event,), daemon=True).start()
for event in begun:
    event.wait()
"""


def test_the_interpreter_ends_beside_daemon_threads_in_a_step(tmp_path: Any) -> None:
    path = write_target(tmp_path / "t.gguf", GEOMETRIES["equal"], "f32", seed=1)
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", ENDING, path], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
