"""A template's process ends within its limits and with its owner, and nothing else ends or leaks with it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hostile_templates import HOSTILE
from pydflash.errors import ConfigError, SessionClosed, TemplateError
from pydflash.text import template_process
from pydflash.text.template_process import MAX_SOURCE, Limits, TemplateProcess

BRIEF = Limits(seconds=0.3, memory=160 << 20)

KINDS = [
    "slice", "slice filled", "batch filled", "round", "indent twice", "striptags", "sort", "map", "sum", "format many",
    "shared to text", "shared to JSON", "shared compared", "shared tuples hashed", "deep to text", "bytes ljust",
    "int to bytes", "str translate", "power", "squares", "plus", "set block", "blocks", "folded power",
]  # fmt: skip


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a child that does not say which limit it reached without much waiting."""
    monkeypatch.setattr(template_process, "GRACE", 0.2)


@pytest.fixture
def adder() -> Iterator[TemplateProcess]:
    """Adds one, or takes endless time or memory when asked to."""
    source = "{{ x + 1 if x is number }}\n{{ n ** (n ** n) if x == 'time' }}\n{{ 'a' * 99 ** n if x == 'memory' }}"
    source = "{% set n = 9 %}" + source
    with TemplateProcess(source, BRIEF) as process:
        yield process


def child_of(process: TemplateProcess) -> int:
    """The id of the child process."""
    child = process._seat.child
    assert child is not None
    return child._process.pid


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds, or is only waited for."""
    for _ in range(500):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def run(code: str, *options: str, **keywords: Any) -> str:
    """What a Python program prints; it must end well, say nothing else, and end soon."""
    program = "import os, signal, sys, threading, time\nfrom pydflash.text.template_process import *\n"
    done = subprocess.run(
        [sys.executable, *options, "-c", program + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=30, **keywords,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
def test_every_kind_of_hostile_template_ends_and_says_why() -> None:
    def said(name: str) -> str:
        with TemplateProcess(HOSTILE[name], BRIEF) as process, pytest.raises(TemplateError) as caught:
            process.render({"messages": []})
        return str(caught.value)

    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(KINDS, pool.map(said, KINDS)))
    limits = ("time limit of 0.3 seconds", "memory limit of 160 MiB", "RecursionError", "characters of output")
    assert {name: text for name, text in answers.items() if not any(limit in text for limit in limits)} == {}
    assert time.monotonic() - begin < len(KINDS) * 2


@pytest.mark.parametrize(("limit", "line"), [("time", 2), ("memory", 3)])
def test_after_a_limit_the_template_goes_on(adder: TemplateProcess, limit: str, line: int) -> None:
    assert adder.render({"x": 1}).strip() == "2"
    with pytest.raises(TemplateError, match=rf"failed: line {line}: it reached the {limit} limit of "):
        adder.render({"x": limit})
    assert adder.render({"x": 2}).strip() == "3"


@pytest.mark.usefixtures("eager")
def test_a_child_that_cannot_be_interrupted_is_ended_and_replaced() -> None:
    hashed = "{% if x %}" + HOSTILE["shared tuples hashed"] + "{% endif %}b"
    with TemplateProcess(hashed, BRIEF) as process:
        assert process.render({"x": 0}) == "b"
        first = child_of(process)
        with pytest.raises(TemplateError, match=r"failed: it reached the time limit of 0\.3 seconds"):
            process.render({"x": 1})
        assert gone(first)
        assert process.render({"x": 0}) == "b"
        assert child_of(process) != first


def test_an_error_of_the_template_is_no_reason_to_replace_the_child(adder: TemplateProcess) -> None:
    first = adder.render({"x": 1}), child_of(adder)
    with pytest.raises(TemplateError, match="line 1: "):
        TemplateProcess("{{ x.a.b }}").render({"x": 1})
    assert (adder.render({"x": 1}), child_of(adder)) == first


def test_a_child_killed_from_outside_is_replaced_unnoticed(adder: TemplateProcess) -> None:
    adder.compile()
    os.kill(child_of(adder), signal.SIGKILL)
    assert gone(child_of(adder))
    assert adder.render({"x": 2}).strip() == "3"


def test_a_source_longer_than_any_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="has 1,048,577 characters"):
        TemplateProcess("x" * (MAX_SOURCE + 1))
    with pytest.raises(ConfigError, match="is a bytes; expected a text"):
        TemplateProcess(b"x")  # type: ignore[arg-type]
    with TemplateProcess("x" * MAX_SOURCE) as process:
        assert len(process.render({})) == MAX_SOURCE


def test_large_texts_cross_both_ways() -> None:
    text = "a\ud800\U0001f600\0" * 100_000
    with TemplateProcess("{{ x }}") as process:
        assert process.render({"x": text}) == text


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": float("nan")}, {"seconds": 1e12}, {"memory": 1000}])
def test_limits_that_leave_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Limits(**limits)


# --- threads, forks, signals ------------------------------------------------------------------------------------------


def test_threads_take_turns(adder: TemplateProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: int(adder.render({"x": x})), range(200))) == list(range(1, 201))


def test_a_fork_renders_in_a_process_of_its_own_and_leaves_the_parents_alone() -> None:
    answer = run("""
        process = TemplateProcess("{{ x }}")
        process.compile()
        held = threading.Thread(target=lambda: process._seat.lock.acquire())  # ends, and never gives the lock back
        held.start(); held.join()
        pid = os.fork()
        if pid == 0:
            print(process.render({"x": 1}), len(process._seats), flush=True)
            process.close()
            sys.exit()
        os.waitpid(pid, 0)
        process._seat.lock = threading.RLock()
        print(process.render({"x": 2}))
    """)
    assert answer.split() == ["1", "2", "2"]


def test_close_ends_a_rendering_of_another_thread(adder: TemplateProcess) -> None:
    with TemplateProcess("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}") as process:
        process.compile()
        caught: list[BaseException] = []

        def work() -> None:
            try:
                process.render({})
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        process.close()
        thread.join(5)
        assert [type(error) for error in caught] == [SessionClosed]


def test_an_interrupt_ends_the_rendering_and_the_next_one_has_its_own_answer() -> None:
    answer = run("""
        process = TemplateProcess("{% for i in range(x) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ x }}")
        process.compile()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            process.render({"x": 9999})
        except KeyboardInterrupt:
            print("interrupted", process.render({"x": 1}))
    """)
    assert answer == "interrupted 1"


def test_a_terminal_s_interrupt_does_not_reach_the_child(adder: TemplateProcess) -> None:
    adder.compile()
    assert os.getsid(child_of(adder)) == child_of(adder)


def test_a_signal_handler_may_close_but_not_render_in_the_middle_of_a_rendering() -> None:
    answer = run("""
        process = TemplateProcess("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
        process.compile()
        def handler(*_):
            try:
                process.render({})
            except Exception as error:
                print(type(error).__name__)
            process.close()
        signal.signal(signal.SIGUSR1, handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            process.render({})
        except Exception as error:
            print(type(error).__name__)
    """)
    assert answer.split() == ["StateError", "SessionClosed"]


HABITS = {
    "signals": "signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.signal(signal.SIGPIPE, signal.SIG_DFL);"
    "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])",
    "reaping": "signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))",
    "files": "sys.stdin = sys.stderr = None; os.close(0); os.close(2); os.environ.clear(); os.chdir('/');"
    "import resource, socket; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); socket.setdefaulttimeout(0.001)",
}


@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS.keys())
def test_habits_of_the_parent_do_not_matter(habit: str) -> None:
    answer = run(f"""
        {habit}
        source = "{{{{ 'a' * 10 ** x if x == 11 }}}}{{{{ 9 ** (9 ** x) if x == 9 }}}}b{{{{ x }}}}"
        process = TemplateProcess(source, Limits(0.5))
        for x in (1, 11, 9, 4):
            try:
                print(process.render({{"x": x}}))
            except Exception as error:
                print(str(error).partition("reached the ")[2][:11])
            if x == 1:
                process._seat.child.kill()
                time.sleep(0.1)
    """)
    assert answer.splitlines() == ["b1", "memory limi", "time limit ", "b4"]


@pytest.mark.parametrize("place", ["checkout", "relative", "current"])
def test_the_child_finds_the_package_as_its_parent_did(place: str) -> None:
    root = Path(template_process.__file__).parents[2]
    paths = {"checkout": str(root), "relative": root.name, "current": ""}
    code = f"""
        print(os.path.dirname(sys.modules["pydflash"].__file__))
        sys.path.remove({str(root)!r})
        sys.path.insert(0, {paths[place]!r})
        print(TemplateProcess("b").render({{}}))
    """
    folder = root.parent if place == "relative" else root
    assert run(code, cwd=folder, env={"PYTHONPATH": str(root)}) == f"{root / 'pydflash'}\nb"


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_child_has_nothing_of_its_parent_s(adder: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    with open(os.devnull) as opened, TemplateProcess("") as process:
        os.set_inheritable(opened.fileno(), True)
        process.compile()
        folder = Path(f"/proc/{child_of(process)}")
        names = {entry.partition("=")[0] for entry in (folder / "environ").read_text().split("\0") if entry}
        assert names <= {*template_process.KEPT_VARIABLES, "LC_CTYPE"}  # the interpreter sets that itself
        assert {entry.name for entry in (folder / "fd").iterdir()} == {"0", "1", "2"}
        assert (folder / "cwd").resolve() == Path("/")


def test_closing_twice_and_using_what_is_closed(adder: TemplateProcess) -> None:
    pid = child_of(adder)
    adder.close()
    adder.close()
    assert pid not in children()
    with ThreadPoolExecutor(1) as other:
        for use in (adder.compile, lambda: adder.render({"x": 1}), other.submit(adder.compile).result):
            with pytest.raises(SessionClosed, match="closed"):
                use()
    assert pid not in children()


def test_processes_that_are_dropped_leave_no_child_and_no_file_open() -> None:
    gc.collect()
    before, files = children(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        TemplateProcess("b")
    with pytest.raises(TemplateError):
        TemplateProcess("{% if %}").compile()
    gc.collect()
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "busy()"])
def test_the_child_ends_with_the_interpreter(end: str) -> None:
    code = f"""
        process = TemplateProcess("{{% for i in range(x) %}}{{% for j in range(99999) %}}{{% endfor %}}{{% endfor %}}")
        process.render({{"x": 0}})
        print(process._seat.child._process.pid, flush=True)
        def busy():
            threading.Thread(target=process.render, args=({{"x": 9999}},), daemon=True).start()
            time.sleep(0.1)
        {end}
    """
    program = "import os, signal, sys, threading, time\nfrom pydflash.text.template_process import *\n"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, timeout=30
    )
    assert time.monotonic() - begin < 5
    assert gone(int(done.stdout))


# --- the start --------------------------------------------------------------------------------------------------------


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda folder: "", "no Python interpreter: sys.executable is ''"),
        (lambda folder: None, "no Python interpreter: sys.executable is None"),
        (lambda folder: script(folder, "server", "exit 0"), "no Python interpreter: sys.executable is .*server"),
        (lambda folder: str(folder / "python3"), "cannot start .*python3 to render the chat template: .*No such file"),
        (lambda folder: script(folder, "python3", "exit 3"), r"its process ended \(exit code 3\)"),
        (lambda folder: script(folder, "python3", "echo 0123456789 >&0"), r"its process ended"),
        (lambda folder: script(folder, "python3", "sleep 60"), "time limit"),
    ],
)
def test_a_program_that_is_no_interpreter_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[[Path], str | None], message: str
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path))
    monkeypatch.setattr(template_process, "START_SECONDS", 0.5)
    with pytest.raises(TemplateError, match=message):
        TemplateProcess("b").render({})
