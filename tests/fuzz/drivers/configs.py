"""Settings and environments of wrong types and values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydflash.config import EngineConfig, table
from pydflash.settings import declarations
from tests.fuzz.drivers.edits import INTEGERS, REALS, TEXTS
from tests.fuzz.junk import choose, revive

__all__ = ["Configs"]

NAMES = tuple(declarations(EngineConfig))
WORDS = (
    *TEXTS, "f16", "q8_0", "q4_0", "turbo4", "auto", "none", "cpu", "cuda", "cuda:0", "cuda:99999", "0", "1", "-1",
    "512", "yes", "on", "off", "TRUE", "1e3", "0x10", "1_000", " 1", "\u0661", "9" * 5000, "inf", "nan",
)  # fmt: skip


class Configs:
    def __init__(self, folder: Path) -> None:
        pass

    def recipe(self, rng: random.Random) -> dict[str, Any]:
        settings = {rng.choice(NAMES): _value(rng) for _ in range(rng.choice((0, 1, 1, 2, 4)))}
        environment: Any = {
            f"PYDFLASH_{rng.choice((*NAMES, 'x')).upper()}": rng.choice(WORDS) for _ in range(rng.choice((0, 1, 2)))
        }
        if rng.random() < 0.2:
            environment["DFLASH_SKIP_WHT"] = rng.choice(("1", "0", "x", choose(rng)))
        if rng.random() < 0.1:
            environment = choose(rng)
        return {"settings": settings, "environment": environment}

    def run(self, recipe: dict[str, Any]) -> None:
        config = EngineConfig.resolve(revive(recipe["environment"]), **revive(recipe["settings"]))
        table(config.settings())
        EngineConfig(**{name: value for name, value in revive(recipe["settings"]).items() if value is not None})


def _value(rng: random.Random) -> Any:
    return (
        choose(rng) if rng.random() < 0.3 else rng.choice((*INTEGERS, *REALS, *WORDS, 64, 128, 256, 512, True, False))
    )
