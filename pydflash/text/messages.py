"""Messages in the shapes that clients send, in the one shape that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydflash.errors import ConfigError

__all__ = ["checked_messages", "checked_tools"]


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Return copies of the messages with text parts joined and tool-call arguments parsed."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages is a {type(messages).__name__}; expected a list of dicts with role and content")
    if not messages:
        raise ConfigError("messages is empty; expected at least one dict with role and content")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where} is a {type(message).__name__}; expected a dict with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"{where} has role {role!r}; expected a text such as 'user'")
    checked = dict(message)
    calls = message.get("tool_calls")
    if calls:
        checked["tool_calls"] = _checked_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and not calls:
        raise ConfigError(f"{where} ({role}) has no content; expected a text or a list of text parts")
    checked["content"] = "" if content is None else _checked_content(content, f"{where}.content")
    return checked


def _checked_content(content: object, where: str) -> str:
    """Return text as it is and text parts joined, which is what templates that accept parts do with them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ConfigError(f"{where} is a {type(content).__name__}; expected a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = repr(part.get("type")) if isinstance(part, Mapping) else f"a {type(part).__name__}"
            raise ConfigError(f'{where}[{i}] is {kind}; only {{"type": "text", "text": "..."}} is supported')
        texts.append(text)
    return "".join(texts)


def _checked_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Return the calls with JSON-text arguments parsed: OpenAI's API carries text, templates iterate over a dict."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise ConfigError(f"{where} is {calls!r}; expected a list of dicts")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            function = {**function, "arguments": _parsed_arguments(arguments, f"{where}[{i}]")}
            call = {**call, "function": function} if "function" in call else function
        checked.append(dict(call))
    return checked


def _parsed_arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} has arguments that are not JSON ({error}): {text[:80]!r}") from None
    if not isinstance(arguments, dict):
        raise ConfigError(f"{where} has arguments that are not a JSON object: {text[:80]!r}")
    return arguments


def checked_tools(tools: object) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"tools is {tools!r}; expected a list of dicts, each a function's JSON schema")
    return list(tools)
