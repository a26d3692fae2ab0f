"""Text and control are two alphabets: no text inside a message becomes a control token or another added token.

Whoever writes a chat template means ``<|im_end|>`` as a control token; whoever writes a message means the characters.
Both arrive in one rendered text. So, before rendering, the first character of each added token's text in whatever the
caller gives (contents, names, arguments, tools, documents, other variables) becomes a *stand-in*: a character, usually
a private-use one, that occurs nowhere else and that templates pass on like a letter. The rendered text is split at the
token texts that are left, the stand-ins become the characters again, and the pieces are encoded as text.

Two texts can still spell a token together where a template puts them side by side. Therefore a second render has
stand-ins for all brackets: the characters that are the first or the last punctuation of some token's text. Where the
two renders differ in their tokens, the second one counts.

What is guaranteed: the added tokens of a prompt are those, in order, that the template writes when no bracket of any
token comes from the caller. What is not: a token whose brackets the template itself writes around a caller's text
(``'<|' + role + '|>'``) is the template's, and one that is spelled without punctuation can be joined from two texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydflash.errors import ConfigError
from pydflash.settings import Choice, Declaration
from pydflash.text.special_tokens import AddedTokens
from pydflash.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pydflash.text.chat import ChatTemplate

__all__ = ["SPECIAL", "Special", "encode_messages", "encode_text"]

Special: TypeAlias = Literal["template", "all", "none"]
SPECIAL = Declaration(
    "template",
    Choice(("template", "all", "none")),
    "Read texts such as <|im_end|> as control tokens where the chat template or a raw prompt has them (template), in"
    " messages too (all), or nowhere (none).",
)

# Characters without meaning, which no letter case and no normal form changes and which are no white space: private use
# in the basic plane first, then private use in planes of their own, then planes without characters.
STAND_INS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0x40000, 0xE0000))
ESCAPES = re.compile(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")


def encode_text(tokenizer: Tokenizer, text: str, special: Special = "template") -> list[int]:
    """Return the ids of a raw prompt, whose author wrote every token that it spells unless ``special`` is "none"."""
    return tokenizer.encode(text, added=special != "none")


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, context: Mapping[str, Any], special: Special = "template"
) -> list[int]:
    """Return the ids of a conversation; ``context`` is what ``template.context`` made of it.

    ``special`` "all" reads every token text of the rendered conversation as a token, "none" reads none. Raises
    ConfigError for texts that cannot be encoded, TemplateError where the template fails.
    """
    if special != "template":
        return encode_text(tokenizer, template.render_context(context), special)
    ids: list[int] = []
    for part in _rendered(tokenizer.added, template, context):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, added=False)
    return ids


def _rendered(added: AddedTokens, template: ChatTemplate, context: Mapping[str, Any]) -> list[str | int]:
    """The rendered conversation: the template's added tokens, and the texts between them."""
    own = {name for name in context if name in template.special or name.endswith("_token")}  # tokens given by name
    given = {name: value for name, value in context.items() if name not in own}
    texts = list(_leaves(given))

    def render(change: Callable[[str], str]) -> list[str | int]:
        return added.split(template.render_context({**context, **_changed(given, change)}))

    if all(added.starts.isdisjoint(text) and added.brackets.isdisjoint(text) for text in texts):
        return render(str)
    stand_ins = _StandIns(added, [template.source, *added.ids, *texts])
    parts, strict = render(stand_ins.for_tokens), render(stand_ins.for_brackets)
    chosen = parts if _tokens(parts) == _tokens(strict) else strict
    return [part if isinstance(part, int) else stand_ins.undo(part) for part in chosen]


def _tokens(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _leaves(value: Any) -> Iterator[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _leaves(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain data with ``change`` applied to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    return value


class _StandIns:
    """Characters that stand for brackets and first characters of tokens, none of which occurs in ``texts``."""

    def __init__(self, added: AddedTokens, texts: Sequence[str]) -> None:
        characters = sorted(added.brackets | added.starts)
        self._added = added
        self._of = dict(zip(characters, _unused(texts, len(characters))))
        self._undo = {form: character for character, own in self._of.items() for form in _forms(own)}
        self._any = re.compile("|".join(map(re.escape, self._undo)) or "(?!)")

    def for_tokens(self, text: str) -> str:
        return self._added.replace_starts(text, self._of)

    def for_brackets(self, text: str) -> str:
        text = self.for_tokens(text)
        for bracket in self._added.brackets:
            text = text.replace(bracket, self._of[bracket])  # of a few characters, much faster than str.translate
        return text

    def undo(self, text: str) -> str:
        return self._any.sub(lambda found: self._undo[found[0]], text)


def _unused(texts: Iterable[str], count: int) -> list[str]:
    """``count`` characters that occur in none of ``texts``, neither as they are nor escaped."""
    used: set[str] = set()
    for text in texts:
        used.update(text)
        used.update(ESCAPES.findall(text))
    free: list[str] = []
    for code in chain.from_iterable(STAND_INS):
        if len(free) == count:
            break
        if chr(code) not in used and used.isdisjoint(ESCAPES.findall(" ".join(_forms(chr(code))))):
            free.append(chr(code))
    if len(free) < count:
        raise ConfigError(
            "the messages hold every private-use and unassigned character, so none is left to tell their text from"
            ' control tokens; leave some out, or encode with special="all"'
        )
    return free


def _forms(character: str) -> tuple[str, ...]:
    """How a template can write a character that is not printable: itself, in ASCII JSON, and in Python's notation."""
    return character, json.dumps(character)[1:-1], repr(character)[1:-1]
