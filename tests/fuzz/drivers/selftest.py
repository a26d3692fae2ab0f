"""Trials whose outcome is known."""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path

from pydflash.errors import LoadError

__all__ = ["SelfTest"]


class SelfTest:
    def __init__(self, folder: Path) -> None:
        pass

    def recipe(self, rng: random.Random) -> str:
        return rng.choice(["ok", "clean"])

    def run(self, recipe: str) -> None:
        if recipe == "clean":
            raise LoadError("the file is damaged")
        if recipe == "foreign":
            raise KeyError("name")
        if recipe == "crash":
            ctypes.string_at(0)
        if recipe == "hang":
            time.sleep(3600)
        if recipe == "memory":
            bytearray(64 << 30)
