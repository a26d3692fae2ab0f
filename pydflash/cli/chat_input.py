"""Ask for the messages of a chat. A pasted text is one message, and nothing typed or pasted reaches the shell.

Bracketed paste is on for the whole chat, so that the terminal marks pasted text whenever it arrives. What arrives while
an answer is printed is not echoed; it waits for the next prompt. Whatever has not been read when the chat ends, for
whatever cause, is thrown away.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

__all__ = ["chat_input"]

_PROMPT = "> "
_QUIT = "/quit"
_BURST_SECONDS = 0.01  # nobody types so fast; it is between keys of a paste by a terminal that does not mark it
_QUIET_SECONDS = 0.1  # without input, and a paste is taken to have ended

Ask = Callable[[], "str | None"]


@contextmanager
def chat_input() -> Iterator[Ask]:
    """A function that asks for the next message and returns it; None when the chat is to end (``/quit``, Ctrl-D, end of
    the input).

    On a terminal a message may have several lines (pasted ones), elsewhere each line is one. Blank ones are skipped.
    Ctrl-C raises KeyboardInterrupt.
    """
    if not sys.stdin.isatty():
        yield lambda: _next_message(lambda: input(_PROMPT))
        return
    with _terminal() as read:
        yield lambda: _next_message(read)


def _next_message(read: Callable[[], str]) -> str | None:
    while True:
        try:
            text = read()
        except EOFError:
            return None
        if text.strip() == _QUIT:
            return None
        if text.strip():
            return text.strip("\r\n").rstrip()


# --- the terminal -----------------------------------------------------------------------------------------------------


@contextmanager
def _terminal() -> Iterator[Callable[[], str]]:
    """A function that reads one message with a line editor."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.utils import is_dumb_terminal

    descriptor = sys.stdin.fileno()
    with ExitStack() as undo:
        if sys.stdout.isatty():
            output = _output(sys.stdout)
        else:  # the answers go elsewhere, the prompts must not
            output = _output(undo.enter_context(open(os.ttyname(descriptor), "w", encoding="utf-8")))
        undo.enter_context(_terminating_signals_raise())
        undo.enter_context(_input_kept_from_shell(descriptor))
        paste_marks = not is_dumb_terminal()
        if paste_marks:
            undo.callback(_switch, output.disable_bracketed_paste, output)
            _switch(output.enable_bracketed_paste, output)
        session: PromptSession[str] = PromptSession(
            [("ansicyan", _PROMPT)], output=output, key_bindings=_keys(descriptor)
        )

        def read() -> str:
            try:
                return session.prompt()
            finally:
                if paste_marks:  # the editor switches it off
                    _switch(output.enable_bracketed_paste, output)

        yield read


def _output(terminal: TextIO) -> Output:
    """Draws the prompts."""
    from prompt_toolkit.output.vt100 import Vt100_Output

    output = Vt100_Output.from_pty(terminal, term=os.environ.get("TERM"))
    output.enable_cpr = False  # the terminal's answer (its cursor position) would be input that nobody has typed
    return output


def _switch(command: Callable[[], None], output: Output) -> None:
    command()
    output.flush()


def _keys(descriptor: int) -> KeyBindings:
    """Enter ends a message, unless more keys are there already: they come from a paste that was not marked.

    ``/quit`` on a line of such a paste ends the chat, since input that was typed ahead looks the same.
    """
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not event.key_processor.input_queue and not _is_readable(descriptor, _BURST_SECONDS):
            buffer.validate_and_handle()
        elif buffer.document.current_line.strip() == _QUIT:
            event.app.exit(exception=EOFError)
        else:
            buffer.insert_text("\n")

    return keys


@contextmanager
def _input_kept_from_shell(descriptor: int) -> Iterator[None]:
    """No echo, and no lines of the system's (which end at 4,095 bytes) while the program is not reading; at the end,
    unread input is thrown away and the terminal is as it was."""
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
    quiet[6][termios.VSUSP] = b"\0"  # a stopped program would leave the shell a terminal without echo
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        if _may_set(descriptor):
            try:
                _drain(descriptor)
            finally:
                with suppress(termios.error):  # the terminal is gone
                    termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def _drain(descriptor: int) -> None:
    """Read and forget input until none has come for a while: a long paste arrives in pieces."""
    with suppress(OSError):  # the terminal is gone, which reads like an end of the input or is an error
        while _is_readable(descriptor, _QUIET_SECONDS) and os.read(descriptor, 1 << 16):
            pass


def _is_readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _may_set(descriptor: int) -> bool:
    """Whether the system lets this process set the terminal; it stops one in the background that tries."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # not the terminal that controls this process
        return True


@contextmanager
def _terminating_signals_raise() -> Iterator[None]:
    """Signals that would end the program at once raise SystemExit, so that the terminal is put right."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    ending = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    taken = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores one
    for number in taken:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
