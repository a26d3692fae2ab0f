"""The row counts and positions on which kernels, graphs and settings agree."""

from __future__ import annotations

__all__ = ["CHUNKS", "EXACT_ROWS", "MOST_POSITIONS", "TAPE_ROWS", "WIDTHS"]

EXACT_ROWS = 16
"""The widest step whose rows are bit-equal to the same rows alone."""

TAPE_ROWS = 16
"""Rows of the delta-net's tape (PYDFLASH_TAPE_ROWS): what a forward may leave pending."""

MOST_POSITIONS = 1 << 24
"""The largest ``max_context``."""

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows that a graph can have: few distinct values, so that graphs are reused."""

CHUNKS = tuple(width for width in WIDTHS if width > EXACT_ROWS)
"""Valid values of ``chunk``."""
