"""Chat templates render what their authors meant and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from pydflash.errors import BadMetadata, TemplateError
from pydflash.text import sandbox
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


def test_strftime_now_uses_the_clock() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


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
        ("x" * (sandbox.MAX_SOURCE + 1), "characters"),
    ],
)
def test_compile_errors_name_line_and_reason(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source)


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
