"""Chat templates from a random grammar, rendered with random messages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydflash.text.chat import ChatTemplate

__all__ = ["Templates"]

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|>\n"},
    {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1, 2]}'}}]},
    {"role": "tool", "content": "3"},
]
NAMES = ("messages", "tools", "m", "ns", "loop", "x", "add_generation_prompt", "bos_token", "undefined_name")
FILTERS = (
    "tojson", "tojson(indent=2)", "trim", "length", "list", "upper", "join(',')", "join", "first", "last", "reverse",
    "sort", "unique", "map(attribute='role')", "map('upper')", "selectattr('role')", "rejectattr('content')",
    "default('d')", "replace('a', 'b')", "replace('', 'ab')", "string", "int", "float", "abs", "round", "items",
    "dictsort", "batch(3)", "slice(3)", "indent(4)", "sum", "min", "max", "safe", "e", "striptags", "truncate(5)",
    "wordcount", "random", "format(1, 2)", "attr('x')", "groupby('role')", "title", "capitalize", "urlencode",
)  # fmt: skip
TESTS = ("defined", "none", "string", "mapping", "iterable", "sequence", "number", "true", "odd", "eq(1)", "in([1])")
LITERALS = (
    "0", "1", "-1", "2**10", "10**9", "0.5", "1e308", "'a'", "''", "'%s'", "'{}'", "[]", "{}", "[1, 'a', none]",
    "{'a': 1}", "none", "true", "range(5)", "range(1000)", "namespace(a=1)", "dict(a=1)", "messages[0]", "messages[-1]",
    "messages[1:]", "messages[0].role", "messages[2].tool_calls", "'ab' * 100", "strftime_now('%Y')", "cycler(1, 2)",
    "joiner(',')", "''.__class__", "messages.__len__", "self", "loop.index",
)  # fmt: skip
PARTS = (".role", ".content", "[0]", "[-1]", "[1:]", ".items()", ".split()", ".strip()", "()")
BINARY = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or")


class Templates:
    def __init__(self, folder: Path) -> None:
        pass

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        return {"source": _body(rng, 4), "messages": rng.randrange(1, 5)}

    def run(self, recipe: dict[str, Any]) -> None:
        template = ChatTemplate(recipe["source"], {"bos_token": "<s>"})
        template.render(MESSAGES[: recipe["messages"]], tools=[{"name": "f", "parameters": {"type": "object"}}], x=3)


def _body(rng: random.Random, depth: int) -> str:
    return "".join(_node(rng, depth) for _ in range(rng.choice((1, 1, 2, 3))))


def _node(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(12) if depth else rng.randrange(3)
    value = _expression(rng, 3)
    if kind == 0:
        return rng.choice(("text ", "\n", "<|im_start|>", "{# note #}", "{{", "%}", "{% raw %}{{ x }}{% endraw %}"))
    if kind < 4:
        return "{{ " + value + " }}"
    if kind < 6:
        recursive = rng.choice(("", "", "", " recursive"))
        return "{% for m in " + value + recursive + " %}" + _body(rng, depth - 1) + "{% endfor %}"
    if kind == 6:
        return "{% if " + value + " %}" + _body(rng, depth - 1) + "{% else %}" + _body(rng, depth - 1) + "{% endif %}"
    if kind == 7:
        return "{% set " + rng.choice(NAMES) + rng.choice((" = ", ".a = ")) + value + " %}"
    if kind == 8:
        name = rng.choice(("f", "g"))
        return (
            "{% macro "
            + name
            + "(a, b=1) %}"
            + _body(rng, depth - 1)
            + "{% endmacro %}{{ "
            + name
            + "("
            + value
            + ") }}"
        )
    if kind == 9:
        return "{% set x %}" + _body(rng, depth - 1) + "{% endset %}"
    if kind == 10:
        return "{% generation %}" + _body(rng, depth - 1) + "{% endgeneration %}"
    return rng.choice(
        ("{% break %}", "{% continue %}", "{{ raise_exception('no') }}", "{% include 'x' %}", "{% endif %}")
    )


def _expression(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(8) if depth else 0
    if kind < 2:
        return rng.choice((*NAMES, *LITERALS))
    inner = _expression(rng, depth - 1)
    if kind == 2:
        return f"({inner}) | {rng.choice(FILTERS)}"
    if kind == 3:
        return f"({inner} {rng.choice(BINARY)} {_expression(rng, depth - 1)})"
    if kind == 4:
        return f"({inner} is {rng.choice(TESTS)})"
    if kind == 5:
        return f"({inner}){rng.choice(PARTS)}"
    if kind == 6:
        return f"({inner} if {_expression(rng, depth - 1)} else {_expression(rng, depth - 1)})"
    return f"[{inner}, {inner}]"
