"""Messages in the shapes that clients send, in the one shape that chat templates read: plain data as JSON has it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydflash.errors import ConfigError
from pydflash.text.plain import plain_copy
from pydflash.text.reasoning import split_stored

__all__ = ["checked_messages", "checked_tools", "checked_variables"]

Message = dict[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")  # of OpenAI's two APIs
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # the first is what templates read; the last, Ollama's


def checked_messages(messages: object, *, reasoning_apart: bool = True) -> list[Message]:
    """Return copies of the messages, with content as text, reasoning as ``reasoning_content``, calls as ``tool_calls``
    with parsed arguments; other keys stay as they are, keys of None are left out.

    ``reasoning_apart`` takes reasoning that was stored inside an answer out of it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages is a {type(messages).__name__}; expected a list of dicts with role and content")
    if not messages:
        raise ConfigError("messages is empty; expected at least one dict with role and content")
    copied = plain_copy(messages, "messages")
    checked = [_checked_message(message, f"messages[{i}]") for i, message in enumerate(copied)]
    return [_reasoning_apart(message) for message in checked] if reasoning_apart else checked


def checked_tools(tools: object) -> list[dict[str, Any]] | None:
    """Return copies of the tools' JSON schemas."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ConfigError(f"tools is a {type(tools).__name__}; expected a list of dicts, each a function's JSON schema")
    copied: list[dict[str, Any]] = plain_copy(tools, "tools")
    for i, tool in enumerate(copied):
        if not isinstance(tool, dict):
            raise ConfigError(f"tools[{i}] is a {type(tool).__name__}; expected a dict, a function's JSON schema")
    return copied


def checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of a template's own variables."""
    copied: dict[str, Any] = plain_copy(variables, "variables")
    return copied


def _checked_message(given: object, where: str) -> Message:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is a {type(given).__name__}; expected a dict with role and content")
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"{where} has role {_shown(role)}; expected a text such as 'user'")
    if given.get("images"):
        raise ConfigError(f"{where} has images; only text is supported")
    message = {name: value for name, value in given.items() if value is not None and name != "images"}
    if role == "function":  # the result of a function_call
        message["role"] = "tool"
    if role == "assistant":
        _set_calls(message, where)
        _set_reasoning(message, where)
    message["content"] = _content(given, message, where)
    return message


# --- content ----------------------------------------------------------------------------------------------------------


def _content(given: Message, message: Message, where: str) -> str:
    """The text of ``given``. There may be none in the result of a tool and in a turn that holds something else."""
    content, role = given.get("content"), given["role"]
    if content is not None:
        return _text(content, f"{where}.content")
    refusal = message.get("refusal")
    if role == "assistant" and isinstance(refusal, str):
        return refusal
    said = "content" in given or "tool_calls" in message or "reasoning_content" in message
    if role in ("tool", "function") or (role == "assistant" and said):
        return ""
    raise ConfigError(f"{where} ({role[:40]}) has no content; expected a text or a list of text parts")


def _text(content: object, where: str) -> str:
    """Return text as it is and text parts joined, which is what templates that accept parts do with them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{where} is a {type(content).__name__}; expected a text or a list of text parts")
    return "".join([_part_text(part, f"{where}[{i}]") for i, part in enumerate(content)])


def _part_text(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise ConfigError(
            f'{where} is a {type(part).__name__}; expected a part such as {{"type": "text", "text": "..."}}'
        )
    kind = part.get("type") or "text"
    text = part.get("refusal" if kind == "refusal" else "text") if kind in TEXT_PARTS else None
    if not isinstance(text, str):
        problem = f"of type {_shown(kind)} without text" if kind in TEXT_PARTS else _shown(kind)
        raise ConfigError(f'{where} is {problem}; only {{"type": "text", "text": "..."}} is supported')
    return text


def _set_reasoning(message: Message, where: str) -> None:
    """Put reasoning where templates read it, whatever the client calls it."""
    found = {name: message.pop(name) for name in REASONING_NAMES if name in message}
    for name, text in found.items():
        if not isinstance(text, str):
            raise ConfigError(f"{where}.{name} is a {type(text).__name__}; expected a text")
    if len(set(found.values())) > 1:
        raise ConfigError(f"{where} has {' and '.join(found)} that differ; give one of them")
    if found:
        message["reasoning_content"] = next(iter(found.values()))


def _reasoning_apart(message: Message) -> Message:
    """The message with the reasoning that its content begins with under its own name."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return message
    reasoning, content = split_stored(message["content"])
    return message if content == message["content"] else {**message, "reasoning_content": reasoning, "content": content}


# --- tool calls -------------------------------------------------------------------------------------------------------


def _set_calls(message: Message, where: str) -> None:
    if "function_call" in message:  # how OpenAI's API once wrote a single call
        if message.get("tool_calls"):
            raise ConfigError(f"{where} has tool_calls and function_call; give one of them")
        call = message.pop("function_call")
        message["tool_calls"] = [{"type": "function", "function": _function(call, f"{where}.function_call")}]
    elif "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConfigError(f"{where} is {_shown(calls)}; expected a list of dicts")
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if "function" not in call:
        return _function(call, where)
    return {**call, "function": _function(call["function"], f"{where}.function")}


def _function(function: object, where: str) -> dict[str, Any]:
    """The name and the arguments of a call, parsed: OpenAI's API carries text, templates iterate over a dict."""
    if not isinstance(function, dict):
        raise ConfigError(f"{where} is {_shown(function)}; expected a dict with name and arguments")
    checked = dict(function)
    if "arguments" in function:
        checked["arguments"] = _arguments(function["arguments"], f"{where}.arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name is {_shown(name)}; expected the name of a function")
    return checked


def _arguments(arguments: object, where: str) -> dict[str, Any]:
    parsed = arguments
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}): {_shown(arguments)}") from None
        parsed = plain_copy(parsed, where)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where} is not a JSON object: {_shown(arguments)}")
    return parsed


def _shown(value: object) -> str:
    """A short form of ``value``, however large or deep it is."""
    return reprlib.repr(value)
