"""A process that runs trials: requests come as lines of JSON on stdin, answers go back as lines on stdout.

    python -m tests.fuzz.worker FOLDER MEMORY

FOLDER holds the good files (tests.fuzz.bases), MEMORY is the limit of the address space in bytes, 0 for none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.drivers import DRIVERS, Driver
from tests.fuzz.outcomes import outcome_of

__all__ = ["main"]


def main() -> None:
    folder, memory = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not come between the answers
    faulthandler.enable()
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    drivers: dict[str, Driver] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["driver"]
        if name not in drivers:
            drivers[name] = DRIVERS[name](folder)
        for answer in _answers(drivers[name], request):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answers(driver: Driver, request: dict[str, Any]) -> Any:
    """The recipe of a seed, the outcome of a recipe, or those of a range of seeds."""
    if "describe" in request:
        yield _recipe(driver, request, request["describe"])
    elif "recipe" in request:
        yield outcome_of(partial(driver.run, request["recipe"]))
    else:
        for seed in range(request["first"], request["first"] + request["count"]):
            recipe = _recipe(driver, request, seed)
            yield outcome_of(partial(driver.run, recipe))


def _recipe(driver: Driver, request: dict[str, Any], seed: int) -> Any:
    """Through JSON, so that a recipe that was kept is the one that was tried."""
    return json.loads(json.dumps(driver.recipe(random.Random(f"{request['driver']} {seed}"))))


if __name__ == "__main__":
    main()
