"""One chat template, compiled and rendered in Jinja's sandbox.

A template is a program that came with a download. Jinja's immutable sandbox keeps it away from Python, files and the
caller's objects. What it takes of time and memory is bounded by the process it runs in (``template_process``).
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pydflash.errors import TemplateError
from pydflash.text.template_protocol import MAX_OUTPUT, Limits

__all__ = ["Template"]

FILENAME = "<template>"  # what Jinja calls a template that comes from a string


class Template:
    """A compiled template. It lives in the main thread of its process, whose alarm signal it uses."""

    def __init__(self, source: str, limits: Limits | None = None) -> None:
        """Raises TemplateError, with the line, where the template does not compile."""
        self._limits = limits or Limits()
        begin = time.monotonic()
        try:
            with _alarm(self._limits):
                self._template = _Sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
        except Exception as error:  # too deep, too large, or refused by the code generator
            raise TemplateError(f"the chat template does not compile: {self._reason(error)}") from error
        self._spent = time.monotonic() - begin

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateError, with the line, where the template refuses, fails, or reaches a limit."""
        pieces, length = [], 0
        spent, self._spent = self._spent, 0.0
        try:
            with _alarm(self._limits, spent):
                for piece in self._template.generate(variables):
                    length += len(piece)
                    if length > MAX_OUTPUT:
                        raise _LimitReached(f"it reached the limit of {MAX_OUTPUT:,} characters of output")
                    pieces.append(piece)
                return "".join(pieces)
        except Exception as error:
            raise TemplateError(f"the chat template failed: {_line(error)}{self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, MemoryError):
            return self._limits.memory_reached
        return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


class _LimitReached(jinja2.TemplateRuntimeError):
    pass


@contextmanager
def _alarm(limits: Limits, spent: float = 0.0) -> Iterator[None]:
    """Raise in the middle of whatever runs when the time is over; the traceback then names the template's line.

    A long operation in C notices only when it ends, if ever: the parent process does not wait for that.
    """

    def stop(*_: object) -> NoReturn:
        raise _LimitReached(limits.time_reached)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(limits.seconds - spent, 1e-3))  # 0 would mean never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Rendering(CodeGenerator):
    """Leaves constant expressions to the rendering.

    Jinja computes them while it compiles, where it takes a limit that was reached for an expression that is not
    constant, goes on, and knows no line.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the options and functions that chat templates are written for."""

    code_generator_class = _Rendering

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        del self.globals["lipsum"]  # random text
        self.filters["tojson"] = _to_json
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)


class _Generation(Extension):
    """The tag ``generation`` marks the model's own words for training; here its body is rendered as if it were bare."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes ``<`` and others for HTML, which the model would read."""
    text: str = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _line(error: BaseException) -> str:
    """Return ``"line N: "`` for the innermost template line that ``error`` came through.

    Jinja maps the traceback to the template's lines, but not where memory runs out while it does.
    """
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == FILENAME:
            template = frame.f_globals.get("__jinja_template__")
            found = f"line {template.get_corresponding_lineno(number) if template else number}: "
    return found
