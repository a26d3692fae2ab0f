"""Templates stay inside their sandbox: they reach nothing, and end before time or memory run out."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from pydflash.errors import TemplateError
from pydflash.text import sandbox
from pydflash.text.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source: str, messages: Any = None, **variables: Any) -> str:
    return ChatTemplate(source).render([USER] if messages is None else messages, **variables)


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
    with pytest.raises(TemplateError, match=r"line 1: access to attribute 'ljust' of 'str' object is unsafe"):
        render("{{ 'x'.ljust(3) }}")


def repeated(step: str) -> str:
    return f"{{% set n = namespace(v='xx') %}}{{% for i in range(60) %}}{{% set n.v = {step} %}}{{% endfor %}}"


BOMBS = {
    "range": "{% for i in range(100000000) %}{% endfor %}",
    "output": "{% for i in range(10000) %}{{ 'x' * 10000 }}{% endfor %}",
    "times": "{{ ('x' * 1000000000)|length }}",
    "list": "{{ ([1] * 1000000000)|length }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(v=3) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "plus": repeated("n.v + n.v"),
    "tilde": repeated("n.v ~ n.v"),
    "replace": repeated("n.v.replace('x', n.v)"),
    "filter": repeated("n.v|replace('x', n.v)"),
    "join": repeated("n.v.join(n.v)"),
    "join filter": repeated("n.v|join(n.v)"),
    "centre": "{{ 'x'.center(1000000000)|length }}",
    "centre filter": "{{ 'x'|center(1000000000)|length }}",
    "format": "{{ '{:1000000000}'.format(1)|length }}",
    "nested format": "{{ '{:{}}'.format(1, 1000000000)|length }}",
    "percent": "{{ ('%1000000000d' % 1)|length }}",
    "star": "{{ '%*d'|format(1000000000, 1)|length }}",
    "indent": "{{ 'a\nb'|indent(1000000000)|length }}",
    "json": "{{ [1]|tojson(indent=1000000000)|length }}",
    "endless": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_runaway_sizes_are_stopped_before_they_are_made(source: str) -> None:
    with pytest.raises(
        TemplateError, match=r"would exceed|most allowed|allowed: 0 to|width above|unsafe|No filter|too big|recur"
    ):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(9999)|list %}"
        "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for x in [60] recursive %}{{ loop([x - 1, x - 1]) if x else '' }}{% endfor %}",
    ],
    ids=["loops", "macros", "recursive loop"],
)
def test_runaway_time_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises(TemplateError, match="ran for more than"):
        render(source)
