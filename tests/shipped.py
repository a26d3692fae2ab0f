"""The shipped pair and what was stored beside it: where they lie, and why a test that needs them is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pydflash

PACKAGE_DATA = Path(pydflash.__file__).parent / "data"
TEST_DATA = Path(__file__).parent / "data"
TARGET, DRAFT = PACKAGE_DATA / "tiny-target.gguf", PACKAGE_DATA / "tiny-draft.gguf"

needs_pair = pytest.mark.skipif(
    not (TARGET.exists() and DRAFT.exists()), reason="the tiny pair is not in pydflash/data; train it with tools/tiny"
)


def held_out_prompts(count: int) -> list[str]:
    """The first ``count`` source prompts that training never saw."""
    lines = (TEST_DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [row["prompt"] for row in map(json.loads, lines) if row.get("kind", "source") == "source"]
    return prompts[:count]
