"""The harness sees what it is for: a foreign exception, a crash, a hang and memory without end, each as an outcome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.processes import Worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(Path(tmp_path_factory.mktemp("nothing")), seconds=2.0) as worker:
        yield worker


@pytest.mark.parametrize(
    ("recipe", "kind", "place"),
    [
        ("ok", "ok", ""),
        ("clean", "clean", "LoadError"),
        ("foreign", "foreign", "selftest.py"),
        ("memory", "foreign", "MemoryError"),
        ("crash", "crash", "Segmentation fault"),
        ("hang", "hang", "selftest.py"),
    ],
)
def test_each_end_of_a_trial_is_an_outcome(worker: Worker, recipe: str, kind: str, place: str) -> None:
    worker.replay("selftest", "ok")  # so that the process is up, and the limit is that of a trial
    outcome = worker.replay("selftest", recipe)
    assert outcome.kind == kind
    assert place in outcome.place


def test_a_range_of_seeds_is_run_to_its_end_and_gives_the_same_again(worker: Worker) -> None:
    found = list(worker.run("selftest", 5, 20))
    assert [seed for seed, _ in found] == list(range(5, 25))
    assert {outcome.kind for _, outcome in found} == {"ok", "clean"}
    assert list(worker.run("selftest", 5, 20)) == found
    assert worker.recipe("selftest", 5) == found[0][1].kind
