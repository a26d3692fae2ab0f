"""What drivers of files have in common: numbers at the edges, and changes to bytes."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["INTEGERS", "REALS", "TEXTS", "edit_bytes", "raw_edits", "scalar"]

INTEGERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 319, 320, 321, 1000,
    4096, 65_535, 65_536, 1 << 20, (1 << 24) - 1, 1 << 24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, -1, -2, -64, -(2**31), -(2**31) - 1, -(2**63),
)  # fmt: skip
REALS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-30,
    1e-6,
    1e6,
    1e12,
    1e39,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)
TEXTS = (
    "", " ", "a", "a b", "x" * 70_000, "\x00", "\udcff", "\ud800", "\x1b[31m", "{{", "{% for x in y %}", "{{ 1/0 }}",
    "{{ messages[0]['content'] }}", "gpt2", "qwen2", "llama-bpe", "default", "qwen35", "qwen35moe", "dflash", "llama",
    "<|im_end|>", "F32", "BF16", "I64", "sliding_attention", "full_attention", "1", "NaN", "日本語", "e\u0301",
)  # fmt: skip


def scalar(rng: random.Random) -> Any:
    """A value of any of JSON's types."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(INTEGERS)
    if kind < 5:
        return rng.choice(REALS)
    if kind < 7:
        return rng.choice(TEXTS)
    return rng.choice([None, True, False, [], {}, [1, "a"], [[1]], {"a": 1}, [None], [0.5], [-1], [2**70], ["a"]])


def raw_edits(rng: random.Random, size: int) -> list[list[Any]]:
    """Changes to a file of ``size`` bytes that know nothing of what is in it; its beginning is changed more often."""
    edits: list[list[Any]] = []
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(size, rng.choice((64, 4096, size))))
        kind = rng.randrange(8)
        if kind == 0:
            edits.append(["cut", rng.choice((at, max(size - 1 - rng.randrange(64), 0)))])
        elif kind == 1:
            edits.append(["insert", at, rng.randbytes(rng.choice((1, 4, 8, 32))).hex()])
        elif kind == 2:
            edits.append(["remove", at, rng.choice((1, 4, 8, 32))])
        elif kind == 3:
            number = rng.choice(INTEGERS) % (1 << 64)
            edits.append(["write", at, number.to_bytes(8, "little")[: rng.choice((4, 8))].hex()])
        elif kind == 4:
            edits.append(["flip", at, rng.randrange(8)])
        else:
            edits.append(["write", at, rng.randbytes(rng.choice((1, 1, 2, 4, 8))).hex()])
    return edits


def edit_bytes(content: bytes, edits: list[list[Any]]) -> bytes:
    out = bytearray(content)
    for what, at, *more in edits:
        if what == "cut":
            del out[at:]
        elif what == "insert":
            out[at:at] = bytes.fromhex(more[0])
        elif what == "remove":
            del out[at : at + more[0]]
        elif what == "write":
            data = bytes.fromhex(more[0])
            out[at : at + len(data)] = data
        elif what == "flip" and at < len(out):
            out[at] ^= 1 << more[0]
    return bytes(out)
