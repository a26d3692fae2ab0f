"""Chat templates: messages to prompt text, by the Jinja template that the model file carries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydflash.errors import TemplateError
from pydflash.text.messages import checked_messages, checked_tools, checked_variables
from pydflash.text.template_process import Limits, TemplateProcess
from pydflash.text.tokenizer import named_token_id

__all__ = ["ChatTemplate"]

# What a template says that reads the reasoning of earlier answers, or takes it out of their content itself.
TAKES_REASONING = re.compile(r"""reasoning_content|split\(\s*['"]</think>|['"]</think>['"]\s+(not\s+)?in\b""")


class ChatTemplate:
    """A chat template, in a process of its own that ``close`` or ``with`` ends, or the end of this object.

    ``source`` is the template's text, ``special`` its token variables, such as ``{"eos_token": "<|im_end|>"}``.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str] | None = None,
        *,
        limits: Limits | None = None,
        wait: bool = True,
    ) -> None:
        """Start the process and compile the template, or with ``wait`` False leave that to the first use.

        Raises TemplateError, with the line, where the template does not compile.
        """
        self.source = source
        self.special = dict(special or {})
        self._process = TemplateProcess(source, limits)
        if wait:
            self.compile()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, wait: bool = True) -> ChatTemplate:
        """Compile the GGUF key ``tokenizer.chat_template``; BOS, EOS and padding tokens become its variables.

        Raises TemplateError where the file has no template: with a guessed one the model would answer worse, silently.
        """
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source.strip():
            raise TemplateError(
                "the model file has no chat template (tokenizer.chat_template); take the one from the model's page and"
                " pass it as ChatTemplate(source), or write the whole prompt yourself as a string"
            )
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        special = {}
        for variable, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
            token = named_token_id(metadata, name)
            if token is not None and 0 <= token < len(tokens):
                special[variable] = tokens[token]
        return cls(source, special, wait=wait)

    def compile(self) -> None:
        """Wait until the template is compiled. Raises TemplateError, with the line, where it does not compile."""
        self._process.compile()

    def close(self) -> None:
        """End the template's process, in the middle of a rendering too. Safe to call twice."""
        self._process.close()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt text of a conversation, for ``Tokenizer.encode``.

        messages: dicts with ``role`` and ``content``: a string, a list of ``{"type": "text", "text": ...}``, or nothing
        beside ``tool_calls``, whose arguments may be JSON text, or beside ``reasoning_content``. Other keys reach the
        template as they are.
        variables: whatever else the template knows, such as ``enable_thinking=False``.
        All of them are plain data (dicts, lists, text, numbers) or what turns into it, such as pydantic's objects: the
        template runs in another process. Raises ConfigError, with its place, for what is malformed; TemplateError, with
        the template's line, where the template refuses the conversation, fails, or reaches a limit; SessionClosed after
        ``close``.
        """
        return self.render_context(
            self.context(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        )

    def context(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> dict[str, Any]:
        """Return what the template is given for a conversation, by name. Arguments and ConfigError: see ``render``."""
        return {
            **self.special,
            # Others show it in the content.
            "messages": checked_messages(messages, reasoning_apart=bool(TAKES_REASONING.search(self.source))),
            "tools": checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
            **checked_variables(variables),
        }

    def render_context(self, context: Mapping[str, Any]) -> str:
        """Return the prompt text of what ``context`` made. Raises TemplateError like ``render``."""
        return self._process.render(context)
