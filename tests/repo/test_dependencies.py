"""The least versions that pyproject.toml declares are those that the package is safe with."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest

from pydflash.errors import TemplateError
from pydflash.text.chat import ChatTemplate

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# In jinja2 3.1.5 the attr filter handed out str.format itself, with which a template of a model file read the process's
# memory (CVE-2025-27516); 3.1.6 is the first version that hands out the sandbox's.
SAFE_JINJA2 = (3, 1, 6)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def test_the_declared_jinja2_has_a_sandbox_that_holds() -> None:
    (declared,) = re.findall(r'"jinja2>=([\d.]+)"', PROJECT.read_text(encoding="utf-8"))
    assert version(declared) >= SAFE_JINJA2
    assert version(jinja2.__version__) >= version(declared)


@pytest.mark.parametrize(
    ("method", "argument"), [("format", "x=raise_exception"), ("format_map", "{'x': raise_exception}")]
)
def test_a_template_cannot_format_its_way_out_of_the_sandbox(method: str, argument: str) -> None:
    template = ChatTemplate("{{ ('{x.__globals__}'|attr('" + method + "'))(" + argument + ") }}")
    text = ""
    with suppress(TemplateError):
        text = template.render([{"role": "user", "content": "hi"}])
    assert "__name__" not in text  # nothing of the module that raise_exception is defined in
