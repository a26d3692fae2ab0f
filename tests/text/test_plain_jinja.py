"""What a template renders in its process is what plain Jinja renders, with the functions that chat templates expect."""

from __future__ import annotations

import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pydflash.errors import TemplateError
from pydflash.text.template_process import TemplateProcess

SETS, CONSTRUCTS_EACH, CONVERSATIONS = 24, 6, 120

# What published templates are made of. Each expects ``messages``, ``tools``, ``flag`` and the special tokens.
DATA = Path(__file__).parents[1] / "data"
CONSTRUCTS = (DATA / "constructs.jinja").read_text(encoding="utf-8").removesuffix("\n").split("\n=====\n")


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    bare = source.replace("{% generation %}", "{% if true %}").replace("{% endgeneration %}", "{% endif %}")
    return environment.from_string(bare)


def outcome(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str | None, str]:
    """The text, or None and the reason."""
    try:
        return template.render(variables), ""
    except Exception as error:
        return None, str(error)


def texts(draw: random.Random) -> str:
    words = [
        "a",
        "bcd",
        "<b>&",
        "größer",
        "日本",
        "\n",
        "  ",
        "'\"",
        "<think>\nhm\n</think>\n\n",
        "{{ x }}",
        "?",
        "\U0001f680",
        "\t",
    ]
    return "".join(draw.choices(words, k=draw.randrange(8)))  # fmt: skip


def conversation(draw: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for _ in range(draw.randrange(1, 7)):
        message: dict[str, Any] = {"role": draw.choice(["system", "user", "assistant", "tool"]), "content": texts(draw)}
        if draw.random() < 0.2:
            arguments = {"city": texts(draw), "n": draw.randrange(-5, 5), "deep": [None, True, 1.5, {"x": []}]}
            message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        if draw.random() < 0.2:
            message["children"] = [{"role": "child", "content": ""}]
        if draw.random() < 0.02:
            message["content"] = [{"type": "text", "text": texts(draw)}, {"type": "image"}]
        messages.append(message)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
    return {
        "messages": messages,
        "tools": draw.choice([None, tools, tools[:1]]),
        "flag": draw.random() < 0.5,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
    }


@pytest.mark.parametrize("seed", range(SETS))
def test_renders_equal_plain_jinjas(seed: int) -> None:
    draw = random.Random(seed)
    chosen = [CONSTRUCTS[seed % len(CONSTRUCTS)], *draw.sample(CONSTRUCTS, CONSTRUCTS_EACH - 1)]
    source = draw.choice(["", "\n", "  \n"]).join(chosen)
    expected = plain(source)
    with TemplateProcess(source) as process:
        for _ in range(CONVERSATIONS):
            variables = conversation(draw)
            text, reason = outcome(expected, variables)
            if text is not None:
                assert process.render(variables) == text
            else:
                with pytest.raises(TemplateError) as caught:
                    process.render(variables)
                assert reason in str(caught.value)


def test_constructs_render_texts_rather_than_errors() -> None:
    """An error hides what follows it, so most of what is compared must be texts."""
    draw = random.Random(1)
    given = [conversation(draw) for _ in range(40)]
    for source in CONSTRUCTS:
        template = plain(source)
        rendered = [variables for variables in given if outcome(template, variables)[0] is not None]
        assert len(rendered) > 20 or ("absent.deeper" in source and not rendered), source
