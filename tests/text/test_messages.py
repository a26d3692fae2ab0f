"""Messages in every shape that clients send reach the template in one; malformed ones are refused by their index."""

from __future__ import annotations

from typing import Any

import pytest

from pydflash.errors import ConfigError
from pydflash.text.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source: str, messages: Any = None, **variables: Any) -> str:
    return ChatTemplate(source).render([USER] if messages is None else messages, **variables)


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
