"""A conversation becomes a prompt by the model's template, with its tokens; the template's process ends with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pydflash.errors import BadMetadata, ConfigError, SessionClosed, TemplateError
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


def test_conversation_with_special_tokens_and_thinking_switch() -> None:
    template = ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
    head = "<|im_start|>user\nhi<|im_end|>\n"
    assert template.render([USER]) == head + "<|im_start|>assistant\n<think>\n"
    assert template.render([USER], enable_thinking=False) == head + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert template.render([USER], add_generation_prompt=False) == head
    assert template.source == CHATML


def test_a_template_is_compiled_when_it_is_made_unless_told_not_to_wait() -> None:
    with pytest.raises(TemplateError, match="does not compile: line 2: Expected an expression"):
        ChatTemplate("a\n{% if %}")
    template = ChatTemplate("a\n{% if %}", wait=False)
    for use in (template.compile, lambda: template.render([USER])):
        with pytest.raises(TemplateError, match="does not compile: line 2: Expected an expression"):
            use()


def test_a_closed_template_says_so() -> None:
    with ChatTemplate(CHATML) as template:
        pass
    with pytest.raises(SessionClosed, match="closed"):
        template.render([USER])


def test_a_clock_of_the_caller_s_cannot_enter_the_process_and_is_refused() -> None:
    """``strftime_now`` is the template's own; a caller who needs a fixed date gives it as the text that it becomes."""
    with ChatTemplate("{{ date_string or strftime_now('%Y') }}") as template:
        assert template.render([USER], date_string="26 Jul 2024") == "26 Jul 2024"
        with pytest.raises(ConfigError, match="strftime_now is a function"):
            template.render([USER], strftime_now=lambda pattern: f"then {pattern}")


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
