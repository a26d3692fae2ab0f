"""Drivers: one module a kind of input."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tests.fuzz.drivers.arguments import Arguments
from tests.fuzz.drivers.configs import Configs
from tests.fuzz.drivers.conversions import Conversions
from tests.fuzz.drivers.models import Models
from tests.fuzz.drivers.prompts import Prompts
from tests.fuzz.drivers.samplers import Samplers
from tests.fuzz.drivers.selftest import SelfTest
from tests.fuzz.drivers.snapshots import Snapshots
from tests.fuzz.drivers.templates import Templates

__all__ = ["DRIVERS", "KINDS", "Driver"]


class Driver(Protocol):
    """Makes and runs trials of one kind of input."""

    def recipe(self, rng: random.Random) -> Any:
        """What to try, in JSON's types."""

    def run(self, recipe: Any) -> None:
        """Try it; raises whatever comes out of the package."""


KINDS: dict[str, Callable[[Path], Driver]] = {
    "gguf": Models,
    "snapshots": Snapshots,
    "drafts": Conversions,
    "templates": Templates,
    "prompts": Prompts,
    "samplers": Samplers,
    "configs": Configs,
    "arguments": Arguments,
}
"""By name; each is made with the folder of good files."""

DRIVERS: dict[str, Callable[[Path], Driver]] = {**KINDS, "selftest": SelfTest}
"""Those, and one whose trials are the faults that the harness has to see."""
