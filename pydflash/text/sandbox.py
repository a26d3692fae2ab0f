"""One chat template, compiled and rendered in Jinja's sandbox.

A template is a program that came with a download. Jinja's immutable sandbox keeps it away from Python, files and the
caller's objects; limits on time, numbers and text stop runaway loops and the cheap ways to exhaust memory. They do not
meter every byte: where templates come from strangers, give the process a memory limit.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import do_format, do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pydflash.errors import TemplateError

__all__ = ["MAX_SOURCE", "Template"]

# Far above a conversation that fills a context of a million tokens.
MAX_SOURCE = 1 << 20  # characters of a template; published ones have up to tens of thousands
MAX_TEXT = 16 << 20  # characters of the output and of each text, items of each list
MAX_BITS = 4096  # of an integer
MAX_INDENT = 64  # spaces per level in JSON, or before a line
MAX_SECONDS = 10.0

DEADLINE = " deadline"  # travels in the render's context under a name that no template can spell
FILENAME = "<template>"  # what Jinja calls a template that comes from a string

# A few characters of these make any amount of text, by a width, and chat templates do not need them.
DROPPED_FILTERS = ("center", "filesizeformat", "pprint", "urlize", "wordwrap", "xmlattr")
DROPPED_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})
# A width of five digits or more, or one taken from an argument, in either style of format string.
WIDE_FIELD = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*(\d{5}|\{)")


class Template:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError, with the line, where the template does not compile."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source):,} characters; the most allowed is {MAX_SOURCE:,}")
        try:
            self._template = _Sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
        except Exception as error:  # too deep, too large, or refused by the code generator
            raise TemplateError(f"the chat template does not compile: {_reason(error)}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateError, with the line, where the template refuses, fails, or reaches a limit."""
        context = {**variables, DEADLINE: time.monotonic() + MAX_SECONDS}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(context):
                length += len(piece)
                _check_size(length, "the output")
                pieces.append(piece)
        except Exception as error:
            raise TemplateError(f"the chat template failed: {_line(error)}{_reason(error)}") from error
        return "".join(pieces)


class _LimitReached(jinja2.TemplateRuntimeError):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the options and functions that chat templates are written for, and with limits.

    Time is checked at each loop turn and each call, since nothing else repeats. Sizes are checked where a result can be
    far larger than what it is made of.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        for name in DROPPED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters.update(tojson=_to_json, replace=_replace, join=_join, indent=_indent, format=_format)
        self.filters.update(metered=_metered, concatenated=_joined)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        metered: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return metered

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in DROPPED_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_deadline(__context)
        if isinstance(__obj, MethodType | BuiltinMethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "replace":
                own = {
                    name: value for name, value in kwargs.items() if not name.startswith("_")
                }  # not Jinja's _loop_vars
                return _replace(__obj.__self__, *args, **own)
            if __obj.__name__ == "join" and len(args) == 1:
                return _joined(args[0], __obj.__self__)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The tag ``generation`` marks the model's own words for training; here its body is rendered as if it were bare."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Routes every loop and every ``~`` through a filter that keeps the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "concatenated")


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _metered(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_deadline(context)
        yield item


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: Any = "", attribute: str | int | None = None
) -> str:
    """Jinja's filter, parameter names included."""
    return _joined(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def _joined(items: Iterable[Any], separator: Any = "") -> str:
    between = str(separator)
    texts, length = [], 0
    for item in items:
        texts.append(str(item))
        length += len(texts[-1]) + len(between)
        _check_size(length, "a joined text")
    return between.join(texts)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    limit = -1 if count is None else count
    found = text.count(old) if limit < 0 else min(text.count(old), limit)
    _check_size(len(text) + found * len(new), "a replaced text")
    return text.replace(old, new, limit)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    if size > MAX_INDENT:
        raise _LimitReached(f"indent has width {size}; allowed: 0 to {MAX_INDENT}")
    return do_indent(s, width, first, blank)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value)
    return do_format(value, *args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes ``<`` and others for HTML, which the model would read."""
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise _LimitReached(f"tojson has indent {indent}; allowed: 0 to {MAX_INDENT}")
    text: str = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _check_format(text: str) -> None:
    if WIDE_FIELD.search(text.replace("{{", "")):
        raise _LimitReached(f"the format {text[:80]!r} has a width above 9,999 or taken from an argument")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it is computed."""
    sequences = (str, list, tuple, bytes)
    if operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
        _check_size(len(left) + len(right), "the result of +")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, sequences) and isinstance(times, int):
                _check_size(len(sequence) * times, "the result of *")
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise _LimitReached(f"a number would have about {bits:,} bits; the most allowed is {MAX_BITS:,}")


def _check_size(size: int, what: str) -> None:
    if size > MAX_TEXT:
        raise _LimitReached(f"{what} would exceed {MAX_TEXT:,} characters or items")


def _check_deadline(context: Context) -> None:
    if time.monotonic() > context.parent[DEADLINE]:
        raise _LimitReached(f"it ran for more than {MAX_SECONDS:g} seconds")


def _line(error: BaseException) -> str:
    """Return ``"line N: "`` for the innermost template line that ``error`` came through; Jinja maps the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILENAME]
    return f"line {lines[-1]}: " if lines else ""


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
