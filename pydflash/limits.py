"""The row counts and positions on which kernels, graphs and settings agree.

Those of the kernels are ggml_ext/contract.h's, from which the build makes ``_contract.py``.
"""

from __future__ import annotations

import pydflash._contract as _contract

__all__ = [
    "CHANNEL_STEP",
    "CHUNKS",
    "EXACT_ROWS",
    "MAX_HEAD",
    "MAX_PARAMS",
    "MAX_TAPS",
    "MOST_POSITIONS",
    "PAGE",
    "SLOT_STEP",
    "STEP_ROWS",
    "TAPE_ROWS",
    "WIDTHS",
]

EXACT_ROWS: int = _contract.EXACT_ROWS
"""The widest step of a sequence whose rows are bit-equal to the same rows alone."""

STEP_ROWS: int = _contract.STEP_ROWS
"""The widest step of several sequences, of which each has at most ``EXACT_ROWS`` rows."""

TAPE_ROWS: int = _contract.TAPE_ROWS
"""Rows of the delta-net's tape: what a forward may leave pending."""

MAX_TAPS: int = _contract.MAX_TAPS
"""The longest convolution of a delta-net layer."""

CHANNEL_STEP: int = _contract.CHANNEL_STEP
"""The channels of that convolution are a multiple of this."""

SLOT_STEP: int = _contract.SLOT_STEP
"""The slots of a K/V cache are a multiple of this."""

PAGE: int = _contract.PAGE
"""Positions of a page of a K/V cache."""

MAX_PARAMS: int = _contract.MAX_PARAMS
"""32-bit parameters of an operation's node."""

MAX_HEAD: int = _contract.MAX_HEAD
"""The most values of a head."""

MOST_POSITIONS = 1 << 24
"""The largest ``max_context``."""

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows that a graph can have: few distinct values, so that graphs are reused."""

CHUNKS = tuple(width for width in WIDTHS if width > EXACT_ROWS)
"""Valid values of ``chunk``."""
