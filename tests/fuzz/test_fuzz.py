"""No damaged, forged or nonsensical input ends the process, keeps it busy, or raises anything but a PydflashError.

Each driver has a share of FUZZ_SECONDS [32]; every input that once was a fault is tried again.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.bases import write_bases
from tests.fuzz.drivers import KINDS
from tests.fuzz.outcomes import FAULTS
from tests.fuzz.processes import Worker

SECONDS = float(os.environ.get("FUZZ_SECONDS", "32"))
SEEDS = sorted((Path(__file__).parent / "seeds").glob("*.json"))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(write_bases(tmp_path_factory.mktemp("bases"))) as worker:
        yield worker


@pytest.mark.parametrize("driver", KINDS)
def test_no_input_gets_through(worker: Worker, driver: str) -> None:
    end = time.monotonic() + SECONDS / len(KINDS)
    found: Counter[str] = Counter()
    for seed, outcome in worker.run(driver, 0, 1_000_000):
        found[outcome.kind] += 1
        assert outcome.kind not in FAULTS, f"{driver} {seed}: {outcome.kind}, {outcome.place}"
        if time.monotonic() > end:
            break
    worker.close()
    assert found["ok"] + found["clean"] == found.total() > 0


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_an_input_that_once_got_through_does_no_more(worker: Worker, path: Path) -> None:
    outcome = worker.replay(path.stem.partition("-")[0], json.loads(path.read_text(encoding="utf-8")))
    assert outcome.kind not in FAULTS, outcome.place
