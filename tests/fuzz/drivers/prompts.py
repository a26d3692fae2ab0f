"""Messages, prompts, tools and variables of wrong types and shapes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydflash.decode import SamplingParams
from pydflash.engine import Engine
from tests.fuzz.drivers.edits import scalar
from tests.fuzz.junk import choose, revive

__all__ = ["Prompts"]

KEYS = ("role", "content", "tool_calls", "reasoning_content", "name", "x")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ (call.function or call).arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{{ tools | tojson }}{{ x }}"
)


class Prompts:
    def __init__(self, folder: Path) -> None:
        from pydflash.text.chat import ChatTemplate

        options: dict[str, Any] = {"device": "cpu", "threads": 1, "max_context": 64, "environment": {}}
        self._engine = Engine.load(folder / "target.gguf", folder / "draft.gguf", **options)
        self._template = ChatTemplate(TEMPLATE)

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        return {
            "prompt": _prompt(rng),
            "tools": None if rng.random() < 0.6 else choose(rng) if rng.random() < 0.5 else [_inner(rng)],
            "variables": None if rng.random() < 0.6 else choose(rng) if rng.random() < 0.3 else {"x": _inner(rng)},
            "own template": rng.random() < 0.5,
            "call": rng.choice(("encode", "generate", "render", "decode")),
        }

    def run(self, recipe: dict[str, Any]) -> None:
        prompt, tools, variables = (revive(recipe[name]) for name in ("prompt", "tools", "variables"))
        if recipe["call"] == "render":
            self._template.render(prompt, tools=tools)
        elif recipe["call"] == "decode":
            self._engine.tokenizer.decode(prompt)
        elif recipe["call"] == "encode":
            self._engine.encode(prompt, tools=tools, variables=variables)
        else:
            self._engine.generate(prompt, SamplingParams(max_tokens=2), tools=tools, variables=variables)


def _prompt(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return choose(rng)
    if kind == 1:
        return [rng.choice((1, 2, 300, 319, 320, -1, 2**31, 2**63, 2**70, 0.5, True, choose(rng))) for _ in range(3)]
    return [_message(rng) for _ in range(rng.choice((1, 1, 2, 3)))]


def _message(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return choose(rng)
    message: dict[str, Any] = {"role": rng.choice(("user", "assistant", "system", "tool")), "content": "hi"}
    for _ in range(rng.choice((0, 1, 1, 2))):
        message[rng.choice(KEYS)] = _inner(rng)
    if rng.random() < 0.2:
        message["content"] = [{"type": rng.choice(("text", "image", choose(rng))), "text": _inner(rng)}]
    if rng.random() < 0.3:
        message["tool_calls"] = [{"function": {"name": _inner(rng), "arguments": _inner(rng)}, "id": _inner(rng)}]
    return message


def _inner(rng: random.Random) -> Any:
    return choose(rng) if rng.random() < 0.6 else scalar(rng)
