"""Messages in every shape that clients send reach the template in one; malformed ones are refused by their index."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.text.chat import ChatTemplate
from pydflash.text.messages import checked_messages

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


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_every_api_are_text(kind: str) -> None:
    parts = [{"type": kind, "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "refusal", "refusal": "b"}]
    assert checked_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "assistant", "content": None, "reasoning_content": "hm"}, ""),
        ({"role": "assistant", "reasoning": "hm"}, ""),
        ({"role": "assistant", "content": None, "tool_calls": []}, ""),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": "yes", "refusal": None}, "yes"),
        ({"role": "tool", "tool_call_id": "1", "content": None}, ""),
        ({"role": "tool", "tool_call_id": "1"}, ""),
        ({"role": "function", "name": "f", "content": "4"}, "4"),
    ],
)
def test_turns_may_lack_content_where_they_hold_something_else(message: dict[str, Any], content: str) -> None:
    checked = checked_messages([USER, message])[1]
    assert checked["content"] == content
    assert None not in checked.values()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_one_name(name: str) -> None:
    message = {"role": "assistant", "content": "four", name: "two and two"}
    expected = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
    assert checked_messages([message]) == [expected]
    assert checked_messages([{**message, "reasoning_content": "two and two"}]) == [expected]


@pytest.mark.parametrize("stored", ["<think>\nwhy\n</think>\n\nfour", "why\n</think>\n\nfour"])
def test_reasoning_stored_inside_an_answer_is_taken_out_of_it(stored: str) -> None:
    (message,) = checked_messages([{"role": "assistant", "content": stored}])
    assert (message["reasoning_content"], message["content"]) == ("why", "four")
    for kept in ({"role": "user", "content": stored}, {"role": "assistant", "content": stored, "reasoning": "else"}):
        assert checked_messages([kept])[0]["content"] == stored


def test_a_template_that_does_not_read_reasoning_gets_the_whole_answer() -> None:
    stored = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nfour"}
    assert render("{{ messages[0].content }}", [stored]) == stored["content"]
    assert render("{{ messages[0].content }}{# reasoning_content #}", [stored]) == "four"


def test_the_old_form_of_a_call_becomes_the_new_one() -> None:
    call, result = checked_messages(
        [
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 2}'}},
            {"role": "function", "name": "f", "content": "4"},
        ]
    )
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"n": 2}}}]
    assert "function_call" not in call
    assert (result["role"], result["name"]) == ("tool", "f")


@pytest.mark.parametrize("arguments", ["", " ", None, "null", "{}", {}])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}
    assert checked_messages([message])[0]["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": {}}}]


def test_objects_of_client_libraries_are_messages_too() -> None:
    class Model:
        def __init__(self, **fields: Any) -> None:
            self.fields = fields

        def model_dump(self) -> dict[str, Any]:
            return self.fields

    call = Model(id="1", type="function", function=Model(name="f", arguments='{"n": 2}'))
    given = (USER, Model(role="assistant", content=None, refusal=None, function_call=None, tool_calls=[call]))
    function = {"name": "f", "arguments": {"n": 2}}
    assert checked_messages(given)[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


def test_the_dialect_of_ollama_is_read() -> None:
    messages = [
        {"role": "user", "content": "2+2?", "images": None},
        {
            "role": "assistant",
            "content": "",
            "thinking": "add",
            "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "tool_name": "f", "content": "4"},
    ]
    user, call, result = checked_messages(messages)
    assert user == {"role": "user", "content": "2+2?"}
    assert call["reasoning_content"] == "add"
    assert result["content"] == "4"


def test_values_of_numpy_reach_the_template_as_plain_ones() -> None:
    message = {**USER, "count": np.int64(2), "scores": np.array([0.5])}
    assert render("{{ messages[0].count }} {{ messages[0].scores | tojson }}", [message]) == "2 [0.5]"


def test_the_caller_s_messages_are_left_as_they_are() -> None:
    message = {"role": "assistant", "thinking": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    given = copy.deepcopy(message)
    checked_messages([message])
    assert message == given


def calling(*calls: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": list(calls)}]


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
        (calling({"function": {"arguments": "{"}}), r"tool_calls\[0\].* not JSON"),
        (calling({"arguments": "[1]"}), r"tool_calls\[0\].* not a JSON object"),
        (calling({"name": "f", "arguments": 3}), r"tool_calls\[0\].arguments is not a JSON object: 3"),
        (calling({"name": "f", "arguments": "[" * 100_000}), r"tool_calls\[0\].arguments is not JSON"),
        (calling({"name": "f", "arguments": '{"a":' + "[" * 500 + "]" * 500 + "}"}), "nested deeper"),
        (calling({"function": "f"}), r"tool_calls\[0\].function is 'f'"),
        (calling({"type": "custom", "custom": {"name": "f"}}), r"tool_calls\[0\].name is None"),
        (calling({"function": {"name": "f", "arguments": {"x": {1}}}}), r"\[0\].function.arguments.x is a set"),
        ([{**calling({"name": "f"})[0], "function_call": {"name": "f"}}], "tool_calls and function_call"),
        ([{"role": "assistant", "function_call": 3}], r"messages\[0\].function_call is 3"),
        (b"hello", "messages is a bytes"),
        ([{"role": "user", "content": None}], r"messages\[0\] \(user\) has no content"),
        ([{"role": "system"}], r"messages\[0\] \(system\) has no content"),
        ([{"role": "user", "content": b"hi"}], r"messages\[0\].content is a bytes; decode it"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\] is of type 'text' without text"),
        ([{**USER, "images": ["aGk="]}], r"messages\[0\] has images; only text"),
        ([{"role": "assistant", "reasoning": {"summary": []}}], r"messages\[0\].reasoning is a dict"),
        ([{"role": "assistant", "reasoning": "a", "thinking": "b"}], "reasoning and thinking that differ"),
    ],
)
def test_malformed_messages_are_refused_with_their_index(messages: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        render("x", messages)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ({"name": "f"}, "tools is a dict"),
        ("f", "tools is a str"),
        (3, "tools is a int"),
        ([render], r"tools\[0\] is a function"),
        (["f"], r"tools\[0\] is a str"),
        ([{"function": {"parameters": {"x": {1}}}}], r"tools\[0\].function.parameters.x is a set"),
    ],
)
def test_malformed_tools_are_refused(tools: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        render("x", tools=tools)


def test_variables_that_are_no_data_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"variables\.documents\[0\]\.read is a function"):
        render("x", documents=[{"read": render}])
