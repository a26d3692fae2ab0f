"""Chat templates render what their authors meant, refuse what is malformed, and stay inside their sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from pydflash.errors import BadMetadata, ConfigError, TemplateError
from pydflash.text import chat
from pydflash.text.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}"""


def render(source: str, messages: Any = None, **variables: Any) -> str:
    return ChatTemplate(source).render([USER] if messages is None else messages, **variables)


def test_conversation_with_special_tokens_and_thinking_switch() -> None:
    template = ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
    head = "<|im_start|>user\nhi<|im_end|>\n"
    assert template.render([USER]) == head + "<|im_start|>assistant\n<think>\n"
    assert template.render([USER], enable_thinking=False) == head + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert template.render([USER], add_generation_prompt=False) == head
    assert template.source == CHATML


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


def test_strftime_now_uses_the_clock_unless_the_caller_gives_one() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}
    assert render("{{ strftime_now('%Y') }}", strftime_now=lambda pattern: f"then {pattern}") == "then %Y"


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
        ("x" * (chat.MAX_SOURCE + 1), "characters"),
    ],
)
def test_compile_errors_name_line_and_reason(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


@pytest.mark.parametrize("wrap", [lambda call: {"function": call}, lambda call: call], ids=["openai", "flat"])
def test_tool_call_arguments_as_json_text_become_a_mapping(wrap: Any) -> None:
    source = (
        "{% for call in messages[0].tool_calls %}{% set f = call.function if call.function is defined else call %}"
        "{{ f.name }}:{% for k, v in f.arguments|items %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
        "[{{ messages[0].content }}]"
    )
    for arguments in ('{"city": "Köln", "n": 2}', {"city": "Köln", "n": 2}):
        message = {"role": "assistant", "tool_calls": [wrap({"name": "f", "arguments": arguments})]}
        assert render(source, [message]) == "f:city=Köln;n=2;[]"


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hello", "messages is a str"),
        ({"role": "user"}, "messages is a dict"),
        ([], "messages is empty"),
        ([USER, "x"], r"messages\[1\] is a str"),
        ([USER, {"content": "x"}], r"messages\[1\] has role None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] has role 3"),
        ([USER, USER, {"role": "assistant"}], r"messages\[2\] \(assistant\) has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is a int"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], r"content\[1\] is 'image'"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\] is a str"),
        ([{"role": "assistant", "tool_calls": "f()"}], r"messages\[0\].tool_calls is 'f\(\)'"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], r"tool_calls\[0\].* not JSON"),
        ([{"role": "assistant", "tool_calls": [{"arguments": "[1]"}]}], r"tool_calls\[0\].* not a JSON object"),
    ],
)
def test_malformed_messages_are_refused_with_their_index(messages: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        render("x", messages)


def test_malformed_tools_are_refused() -> None:
    with pytest.raises(ConfigError, match="tools is"):
        render("x", tools={"name": "f"})


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
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    with pytest.raises(TemplateError, match="ran for more than"):
        render(source)


def test_metadata_gives_the_template_and_its_token_variables() -> None:
    metadata: Mapping[str, Any] = {
        "tokenizer.chat_template": "{{ bos_token is defined }}{{ eos_token }}{{ pad_token is defined }}",
        "tokenizer.ggml.tokens": ["a", "<|im_end|>"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0xFFFF_FFFF,
    }
    assert ChatTemplate.from_metadata(metadata).render([USER]) == "False<|im_end|>False"
    with pytest.raises(BadMetadata, match="eos_token_id"):
        ChatTemplate.from_metadata({**metadata, "tokenizer.ggml.eos_token_id": "one"})


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.chat_template": "  "}])
def test_a_missing_template_is_an_error_with_advice(metadata: Mapping[str, Any]) -> None:
    with pytest.raises(TemplateError, match=r"no chat template .*pass it as ChatTemplate"):
        ChatTemplate.from_metadata(metadata)
