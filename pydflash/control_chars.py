"""Make text from a file safe to print: what a terminal would obey is spelled out instead."""

from __future__ import annotations

import re

__all__ = ["escape_controls"]

# C0 and C1 controls, which move the cursor or start a command of the terminal; line and paragraph separators; marks
# that reverse the direction of writing, so that text looks like another; and surrogates, which have no UTF-8.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escape_controls(text: str, keep: str = "") -> str:
    r"""``text`` with control characters spelled as ``\x1b`` or ``\u202e``, except those in ``keep``.

    A byte that is not UTF-8, which the reader of GGUF files keeps as a lone surrogate, is spelled as that byte.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _spelled(found[0]), text)


def _spelled(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
