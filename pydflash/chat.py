"""Chat templates: messages to prompt text, with the Jinja template that the model file carries.

A template is a program from a file that somebody downloaded, so it runs in Jinja's immutable sandbox, without the padding
and formatting functions that no chat template needs, and with limits on time, numbers and text (``LIMITS`` below).
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.filters import do_items, do_join, do_replace
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ConfigError, TemplateError
from .tokenizer import named_token_id

__all__ = ["ChatTemplate", "Message"]

Message = Mapping[str, Any]

# LIMITS: far above a conversation that fills a context of a million tokens.
MAX_SOURCE = 1 << 20  # characters of a template; the longest published ones have tens of thousands
MAX_TEXT = 16 << 20  # characters of the output, and of any text or list made on the way
MAX_SECONDS = 10.0
MAX_BITS = 4096  # of an integer

CLOCK = " clock"  # a name that no template can spell: the render's deadline travels in its context
FILENAME = "<template>"  # what Jinja calls a template that comes from a string

# These turn a short template into any amount of text; llama.cpp's template engine has none of the methods either.
DROPPED_FILTERS = ("center", "filesizeformat", "format", "indent", "pprint", "urlize", "wordwrap", "xmlattr")
DROPPED_METHODS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill"})


class ChatTemplate:
    """A compiled chat template. ``source`` is its text; ``special`` its token texts, such as ``{"eos_token": "<|im_end|>"}``."""

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        """Raises TemplateError, with the line, where the template does not compile."""
        self.source = source
        self.special = dict(special or {})
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source):,} characters; the most allowed is {MAX_SOURCE:,}")
        try:
            self._template = _Sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, SyntaxError, OverflowError) as error:
            raise TemplateError(f"the chat template does not compile: {_reason(error)}") from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """Compile the GGUF key ``tokenizer.chat_template``, with the file's BOS, EOS and padding tokens as variables.

        Raises TemplateError where the file has no template: guessing one makes a model answer badly without any message.
        """
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source.strip():
            raise TemplateError(
                "the model file has no chat template (tokenizer.chat_template): pass the one from the model's page as"
                " ChatTemplate(source), or write the whole prompt yourself as a string"
            )
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
        ids = {variable: named_token_id(metadata, name) for variable, name in names.items()}
        return cls(source, {variable: tokens[i] for variable, i in ids.items() if i is not None and 0 <= i < len(tokens)})

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt text of a conversation, ready for ``Tokenizer.encode``.

        messages: dicts with ``role`` and ``content`` (a string, a list of ``{"type": "text", "text": ...}``, or nothing
        beside ``tool_calls``); other keys reach the template as they are. Tool-call arguments may be JSON text.
        variables: whatever else the template knows, such as ``enable_thinking=False``.
        Raises ConfigError, with the message's index, for malformed messages; TemplateError, with the template's line,
        where the template refuses the conversation, fails, or exceeds a limit.
        """
        context = {
            **self.special,
            "messages": _checked(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **variables,
            CLOCK: time.monotonic() + MAX_SECONDS,
        }
        pieces, length = [], 0
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise _LimitReached(f"the output exceeds {MAX_TEXT:,} characters")
        except Exception as error:
            raise TemplateError(f"the chat template failed: {_where(error)}{_reason(error)}") from error
        return "".join(pieces)


class _LimitReached(jinja2.TemplateRuntimeError):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (the environment of Hugging Face's library), with limits.

    Time is checked at every loop turn and call, which is the only way a template spends it; text and lists are checked
    where they can grow faster than the template that makes them: operators, ``~``, ``replace`` and ``join``.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in DROPPED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters.update(
            items=do_items, tojson=_to_json, replace=_replace, join=_join, metered=_metered, bounded=_bounded
        )
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "metered")
        for parent in [tree, *tree.find_all(nodes.Node)]:
            _wrap_concatenations(parent)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in DROPPED_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_clock(__context)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType) and isinstance(owner, str):
            if __obj.__name__ == "replace":
                return _replace(__context, owner, *args, **kwargs)
            if __obj.__name__ == "join":
                return _join(__context, *args, owner)
        return super().call(__context, __obj, *args, **kwargs)
