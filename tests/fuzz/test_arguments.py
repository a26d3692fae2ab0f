"""Whatever a public call is given, it raises a PydflashError or works, and refuses at the call what it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pydflash
from pydflash.arguments import a_function, a_path, an_instance, an_integer, shown
from pydflash.errors import ConfigError
from tests.fuzz.bases import write_bases
from tests.fuzz.calls import (
    CALLS,
    MADE_BY_CALLS,
    Parts,
    good_arguments,
    parameters,
    public_calls,
    read,
)
from tests.fuzz.drivers.arguments import Arguments
from tests.fuzz.junk import JUNK
from tests.fuzz.outcomes import outcome_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def arguments(folder: Path) -> Arguments:
    return Arguments(folder)


def test_every_public_call_is_tried_or_made_by_one_that_is() -> None:
    public = set(public_calls())
    assert public - set(CALLS) - set(MADE_BY_CALLS) == set()
    assert set(MADE_BY_CALLS) <= public
    assert {source for source in MADE_BY_CALLS.values() if source in CALLS} != set()


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_a_public_call_is_tried(name: str) -> None:
    assert parameters(name) <= CALLS[name].good.keys()


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_good(folder: Path, name: str) -> None:
    parts = Parts(folder)
    parts.begin()
    read(CALLS[name].run(parts, **good_arguments(CALLS[name], parts)))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(CALLS)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.dictionaries(
                st.sampled_from(sorted(CALLS[name].good)),
                st.sampled_from(sorted(JUNK)).map(lambda junk: {"$": junk}) | st.integers() | st.floats() | st.text(),
                min_size=1,
                max_size=2,
            ),
        )
    )
)
def test_arguments_of_wrong_types_and_values_are_refused_by_the_call(
    arguments: Arguments, call: tuple[str, dict[str, object]]
) -> None:
    name, changed = call
    outcome = outcome_of(lambda: arguments.run({"call": name, "arguments": changed}))
    assert outcome.kind in ("ok", "clean"), outcome.place


# --- the checks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JUNK)
def test_every_value_can_be_quoted_in_a_message(name: str) -> None:
    text = shown(JUNK[name]())
    assert 0 < len(text) < 300


def test_a_refusal_names_the_argument_and_quotes_the_value() -> None:
    for check in (
        lambda: an_instance("text", int, "count"),
        lambda: an_integer("text", "count", 0, 5),
        lambda: a_function("text", "count"),
    ):
        with pytest.raises(ConfigError, match="count is 'text'"):
            check()
    with pytest.raises(ConfigError, match=r"count is 6; allowed: an integer, 0 to 5"):
        an_integer(6, "count", 0, 5)
    with pytest.raises(ConfigError, match="count is True"):
        an_integer(True, "count", 0, 5)
    with pytest.raises(ConfigError, match=r"file is 'a\\x00b'; expected the path"):
        a_path("a\0b", "file")


def test_the_property_is_checked_by_a_test_that_can_fail(arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydflash.Session, "commit", lambda session, n: session.length + n)
    found = {outcome_of(lambda seed=seed: arguments.run(_commit(seed))).kind for seed in range(60)}  # type: ignore[misc]
    assert "foreign" in found


def _commit(seed: int) -> dict[str, object]:
    return {"call": "Session.commit", "arguments": {"n": {"$": random.Random(seed).choice(sorted(JUNK))}}}
