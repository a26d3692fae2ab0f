"""In a terminal with a shell: a paste is one message, and nothing typed or pasted in a chat reaches the shell."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pydflash.control_chars import escape_controls

ROOT = Path(__file__).parents[2]
DEADLINE = 40.0  # seconds; a busy machine takes a few to start Python
ON, OFF = "\x1b[?2004h", "\x1b[?2004l"
CONTROL_C, CONTROL_D, ENTER = "\x03", "\x04", "\r"

# A shell on a terminal of its own, which it controls; no fork in this process, which has threads. A process that was
# started by nohup or in the background ignores some signals, and its children would.
SHELL = """
import os, signal, sys
for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
terminal = os.open(sys.argv[1], os.O_RDWR)
for descriptor in range(3):
    os.dup2(terminal, descriptor)
os.execvpe("sh", ["sh", "-i"], {**os.environ, "PS1": "shell$ ", "TERM": "xterm", "ENV": ""})
"""
# A chat whose answers repeat the message; some messages make it wait or fail.
CHAT = """
import time
from pydflash.cli.chat_input import chat_input
with chat_input() as ask:
    while (message := ask()) is not None:
        print("answer", len(message), repr(message[:40]), repr(message[-20:]), flush=True)
        if message in ("wait", "wait and fail"):
            print("waiting", flush=True)
            time.sleep(1.5)
        if message.endswith("fail"):
            raise ValueError("failed as asked")
print("the chat has ended", flush=True)
"""


LEFT = "touch mark\ntouch mark\n"
"""What a shell must not see."""


def paste(text: str) -> str:
    """As a terminal sends pasted text when bracketed paste is on."""
    return f"\x1b[200~{text}\x1b[201~"


def answer(message: str) -> str:
    return f"answer {len(message)} {message[:40]!r} {message[-20:]!r}"


class Terminal:
    """The user's side: what was typed goes in, what was printed comes out."""

    def __init__(self, folder: Path) -> None:
        self._master, slave = pty.openpty()
        self.printed, self._seen = "", 0
        command = [sys.executable, "-c", SHELL, os.ttyname(slave)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._shell = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
        self.expect("shell$ ")
        os.close(slave)  # the shell has opened its own

    def type(self, text: str) -> None:
        data = text.encode()
        while data:  # as terminals do: no more than is taken, and what comes out is read meanwhile
            self._read(0.0)
            if select.select([], [self._master], [], 0.1)[1]:
                data = data[os.write(self._master, data[:512]) :]

    def expect(self, text: str) -> str:
        """Wait until ``text`` is printed after what was expected before; returns what was printed up to there."""
        end = time.monotonic() + DEADLINE
        while (at := self.printed.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {escape_controls(self.printed[self._seen :])}"
            self._read(0.1)
        before, self._seen = self.printed[self._seen : at], at + len(text)
        return before

    def start(self, program: Path, redirect: str = "") -> None:
        self.type(f"{sys.executable} {program} {redirect}{ENTER}")
        self.expect(ON)
        self.expect("> ")

    def close(self) -> None:
        os.close(self._master)  # the shell's terminal is gone, and so is the shell
        self._shell.kill()
        self._shell.wait()

    def _read(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            self.printed += os.read(self._master, 1 << 16).decode(errors="replace")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.py"
    path.write_text(CHAT)
    return path


def check_shell(terminal: Terminal, folder: Path) -> None:
    """The shell is back, has run nothing, and its terminal is as it was."""
    terminal.expect("shell$ ")
    terminal.type(f"echo back-$((40 + 2)); stty -a{ENTER}")
    terminal.expect("back-42")
    settings = terminal.expect("echoke") if sys.platform == "linux" else terminal.expect("shell$ ")
    assert re.search(r"(?<!-)\bicanon\b", settings)
    assert re.search(r"(?<!-)\becho\b", settings)
    assert not (folder / "mark").exists()
    assert terminal.printed.rfind(OFF) > terminal.printed.rfind(ON)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n"])
def test_a_paste_of_several_lines_is_one_message(terminal: Terminal, chat: Path, tmp_path: Path, newline: str) -> None:
    terminal.start(chat)
    terminal.type("see: " + paste(newline.join(["def f():", "    return 1", "", "touch mark", ""])))
    terminal.type(ENTER)
    terminal.expect(answer("see: def f():\n    return 1\n\ntouch mark"))
    terminal.type("/quit" + ENTER)
    terminal.expect("the chat has ended")
    assert terminal.printed.count("answer ") == 1
    check_shell(terminal, tmp_path)


def test_a_paste_that_the_terminal_does_not_mark_is_one_message(terminal: Terminal, chat: Path, tmp_path: Path) -> None:
    terminal.start(chat)
    terminal.type("one\rtouch mark\rthree\r")
    terminal.expect(answer("one\ntouch mark\nthree"))
    terminal.expect("> ")
    terminal.type(CONTROL_D)
    terminal.expect("the chat has ended")
    check_shell(terminal, tmp_path)


def test_long_lines_and_many_lines_arrive_whole(terminal: Terminal, chat: Path) -> None:
    terminal.start(chat)
    terminal.type(paste("x" * 9000 + "\n" + "line\n" * 200) + ENTER)
    terminal.expect(answer("x" * 9000 + "\nline" * 200))
    terminal.type("/quit" + ENTER)
    terminal.expect("the chat has ended")


def test_what_arrives_during_an_answer_is_the_next_message(terminal: Terminal, chat: Path) -> None:
    terminal.start(chat)
    terminal.type("wait" + ENTER)
    terminal.expect("waiting")
    terminal.type(paste("one\ntwo\n") + ENTER)
    shown = terminal.expect("> ")
    assert "two" not in shown  # no echo into the answer
    terminal.expect(answer("one\ntwo"))
    terminal.type("wait" + ENTER)
    terminal.expect("waiting")
    terminal.type("typed ahead" + ENTER)
    terminal.expect(answer("typed ahead"))
    terminal.type("/quit" + ENTER)
    terminal.expect("the chat has ended")


def test_a_blank_line_asks_again(terminal: Terminal, chat: Path) -> None:
    terminal.start(chat)
    for blank in ("", "   ", paste("\n\n")):
        terminal.type(blank + ENTER)
        terminal.expect(OFF)
        terminal.expect("> ")
    terminal.type("hello" + ENTER)
    terminal.expect(answer("hello"))
    terminal.type(CONTROL_D)
    terminal.expect("the chat has ended")
    assert terminal.printed.count("answer ") == 1


def test_prompts_are_on_the_terminal_when_answers_go_to_a_file(terminal: Terminal, chat: Path, tmp_path: Path) -> None:
    terminal.start(chat, "> answers")
    terminal.type(paste("one\ntwo") + ENTER)
    terminal.expect("> ")
    terminal.type("/quit" + ENTER)
    check_shell(terminal, tmp_path)
    assert (tmp_path / "answers").read_text() == answer("one\ntwo") + "\nthe chat has ended\n"


def test_without_a_terminal_each_line_is_a_message(chat: Path) -> None:
    def run(text: str) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(chat)]
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=True)
        assert "\x1b" not in done.stdout
        assert done.stdout.endswith("the chat has ended\n")
        return re.findall(r"answer \d+ '(.*)' '", done.stdout)

    assert run("one\n\n  two\n") == ["one", "  two"]
    assert run("one\n/quit\ntwo\n") == ["one"]
    assert run("") == []


def test_the_chat_command_answers_a_paste_once(terminal: Terminal, target_path: Path, tmp_path: Path) -> None:
    options = "--max-tokens 3 --threads 1 --device cpu --temperature 0 --stats"
    program = "-c 'from pydflash.cli import main; main()' chat"
    terminal.type(f"{sys.executable} {program} {target_path} {options}{ENTER}")
    terminal.expect(ON)
    terminal.expect("> ")
    terminal.type(paste("hello\ntouch mark\n") + ENTER)
    terminal.expect("acceptance length")
    terminal.type("/quit" + ENTER + LEFT)
    check_shell(terminal, tmp_path)
    assert terminal.printed.count("acceptance length") == 1


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [LEFT, paste(LEFT), "\x1b[200~" + LEFT, LEFT * 2000])
@pytest.mark.parametrize("end", ["/quit" + ENTER, CONTROL_D, CONTROL_C])
def test_what_was_not_read_at_the_end_does_not_reach_the_shell(
    terminal: Terminal, chat: Path, tmp_path: Path, end: str, left: str
) -> None:
    terminal.start(chat)
    terminal.type(end + left)
    terminal.expect("KeyboardInterrupt" if end == CONTROL_C else "the chat has ended")
    check_shell(terminal, tmp_path)


@pytest.mark.parametrize("left", [LEFT, paste(LEFT) + ENTER])
def test_an_error_during_an_answer_takes_nothing_to_the_shell(
    terminal: Terminal, chat: Path, tmp_path: Path, left: str
) -> None:
    terminal.start(chat)
    terminal.type("wait and fail" + ENTER)
    terminal.expect("waiting")
    terminal.type(left)
    terminal.expect("failed as asked")
    check_shell(terminal, tmp_path)


@pytest.mark.parametrize("during", ["prompt", "answer"])
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT"])
def test_a_signal_takes_nothing_to_the_shell(
    terminal: Terminal, chat: Path, tmp_path: Path, name: str, during: str
) -> None:
    """Signals from elsewhere, not from the keyboard: the half of a paste has arrived."""
    chat.write_text("import os\nopen('pid', 'w').write(str(os.getpid()))\n" + CHAT)
    terminal.start(chat)
    if during == "answer":
        terminal.type("wait" + ENTER)
        terminal.expect("waiting")
    terminal.type("\x1b[200~" + LEFT)
    subprocess.run(["kill", f"-{name}", (tmp_path / "pid").read_text()], check=True)
    check_shell(terminal, tmp_path)
