"""Templates render what their authors meant, reach nothing, and say on which line they failed."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from typing import Any

import pytest

from pydflash.errors import TemplateError
from pydflash.text import sandbox
from pydflash.text.sandbox import Template
from pydflash.text.template_protocol import Limits

USER = {"role": "user", "content": "hi"}


def render(source: str, messages: Any = None, *, limits: Limits | None = None, **variables: Any) -> str:
    given = {"messages": [USER] if messages is None else messages, **variables}
    return Template(source, limits).render(given)


# --- the language -----------------------------------------------------------------------------------------------------


def test_namespace_keeps_values_across_a_reversed_loop() -> None:
    source = (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages[::-1] %}{% if ns.last == -1 and m.role == 'user' %}"
        "{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}"
    )
    assert render(source, [USER, USER, {"role": "assistant", "content": "x"}]) == "1"


def test_loop_neighbours_length_and_controls() -> None:
    source = (
        "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ m.role }}"
        ">{{ loop.nextitem.role if not loop.last else '-' }} of {{ loop.length }};"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    roles = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    assert render(source, roles) == "->system>user of 3;system>user>assistant of 3;"
    assert render("{% for i in range(4) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "023"
    assert render("{% for x in [] %}x{% else %}none{% endfor %}") == "none"
    assert render("{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}") == "123"


def test_blocks_are_trimmed_and_lines_stripped_as_templates_expect() -> None:
    assert render("{% if true %}\n    {% set x = 1 %}\na\n    {% endif %}\nb") == "a\nb"


def test_tojson_does_not_escape_html_and_keeps_unicode_and_order() -> None:
    tool = {"type": "function", "name": "größer", "b": "<a> & 'b'"}
    source = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    assert render(source, tools=[tool]) == '{"type": "function", "name": "größer", "b": "<a> & \'b\'"}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_items_filter_and_string_methods() -> None:
    source = (
        "{% for k, v in messages[0].extra|items %}{{ k }}={{ v }},{% endfor %}"
        "{{ 'a</think>b'.split('</think>')[-1].lstrip('b') ~ ('xyx'|replace('x', 'u')) ~ 'aXbX'.replace('X', '-', 1) }}"
        "{{ ', '.join(['p', 'q']) }}{{ [{'n': 1}, {'n': 2}] | join('/', attribute='n') }}"
    )
    assert render(source, [{**USER, "extra": {"a": 1, "b": [2]}}]) == "a=1,b=[2],uyua-bXp, q1/2"
    assert (
        render("{% for s in ['a-b', '-'] %}{{ s.replace('-', '') }}.{{ '+'.join(s) }};{% endfor %}") == "ab.a+-+b;.-;"
    )


def test_macros_concatenation_and_formats() -> None:
    assert render("{% macro m(a, b='z') %}{{ a ~ 1 ~ b ~ none }}{% endmacro %}{{ m('x') }}{{ m('y', b='') }}") == (
        "x1zNoney1None"
    )
    assert render("{{ '%s is %03d' % ('a', 7) }} {{ '%s'|format('b') }} {{ '{:>4}|{{}}'.format(5) }}") == (
        "a is 007 b    5|{}"
    )
    assert render("{{ 'a\\nb' | indent(2) }}{% generation %}g{{ 1 }}{% endgeneration %}") == "a\n  bg1"


def test_strftime_now_uses_the_clock() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_raise_exception_names_line_and_reason() -> None:
    with pytest.raises(TemplateError, match=r"line 2: no user query"):
        render("{{ 1 }}\n{{ raise_exception('no user query') }}")


def test_render_errors_inside_macros_name_the_innermost_line() -> None:
    with pytest.raises(TemplateError, match=r"line 2: 'dict object' has no attribute 'b'"):
        render("{% macro m(x) %}\n{{ x.b.c }}\n{% endmacro %}\n\n{{ m({}) }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{{ x | nothing }}", "line 1: No filter named 'nothing'"),
        ("\n\n{% endfor %}", "line 3"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError"),
    ],
)
def test_compile_errors_name_line_and_reason(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        Template(source)


# --- the sandbox ------------------------------------------------------------------------------------------------------


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages|attr('__class__')|string ~ messages|attr('__init__')|string ~ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}'|attr('format'))(1).x.y }}",
    "{% set f = ''|attr('format_map') %}{{ f({}).x.y }}",
    "{{ (1).__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_escapes_reach_nothing(source: str) -> None:
    messages = [dict(USER)]
    with contextlib.suppress(TemplateError):
        assert render(source, messages) == ""  # an unsafe attribute that is only printed is undefined, which is empty
    assert messages == [USER]


def test_using_an_unsafe_attribute_is_an_error_that_says_so() -> None:
    with pytest.raises(TemplateError, match=r"line 1: access to attribute '__class__' of 'list' object is unsafe"):
        render("{{ messages.__class__.__base__ }}")


@pytest.mark.parametrize(
    "source",
    [
        "\n{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}\n{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "\n{% for x in [60] recursive %}{{ loop([x - 1, x - 1]) if x else '' }}{% endfor %}",
        "\n{{ 9 ** (9 ** 9) }}",
    ],
    ids=["loops", "macros", "recursive loop", "one operation"],
)
def test_runaway_time_is_stopped_and_its_line_named(source: str) -> None:
    with pytest.raises(TemplateError, match=r"failed: line 2: it reached the time limit of 0\.2 seconds"):
        render(source, limits=Limits(seconds=0.2))


def test_compiling_and_the_first_rendering_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sandbox._Sandbox.from_string

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return compiled(*given)

    monkeypatch.setattr(sandbox._Sandbox, "from_string", slowly)
    template = Template(
        "{% for i in range(x) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", Limits(seconds=0.5)
    )
    for least, most in ((0.0, 0.4), (0.5, 1.0)):
        begin = time.monotonic()
        with pytest.raises(TemplateError, match=r"it reached the time limit of 0\.5 seconds"):
            template.render({"x": 9999})
        assert least <= time.monotonic() - begin < most


def test_a_template_cannot_flood_its_reader() -> None:
    with pytest.raises(TemplateError, match=r"it reached the limit of 16,777,216 characters of output"):
        render("{% for i in range(10000) %}{{ 'x' * 10000 }}{% endfor %}")
