"""Values cross to another process unchanged, or are refused by their path."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from datetime import date
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydflash.errors import ConfigError
from pydflash.text import json_values
from pydflash.text.json_values import to_json

LEAVES = st.none() | st.booleans() | st.integers(-(2**2000), 2**2000) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), VALUES))
def test_plain_values_come_back_as_they_were(values: dict[str, Any]) -> None:
    back = json.loads(to_json(values))
    assert back == values
    assert repr(back) == repr(values)  # types too: True is no 1, 1.0 no 1


def test_odd_numbers_and_texts_survive() -> None:
    values = {"inf": math.inf, "low": -math.inf, "zero": -0.0, "half": "\ud800x", "nul": "\0", "": "<>&'\u2028"}
    assert repr(json.loads(to_json(values))) == repr(values)
    assert math.isnan(json.loads(to_json({"nan": math.nan}))["nan"])


def test_other_mappings_become_dicts_and_tuples_lists() -> None:
    values = {"a": MappingProxyType({"b": (1, (2,))}), "c": OrderedDict(z=1, y=2)}
    assert json.loads(to_json(values)) == {"a": {"b": [1, [2]]}, "c": {"z": 1, "y": 2}}
    assert to_json({"x": np.float64(0.5), "y": np.str_("t"), "z": Enum("E", {"A": "t"}, type=str).A}) == (  # type: ignore[attr-defined]
        '{"x":0.5,"y":"t","z":"t"}'
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.int64(1), "int64"), (np.bool_(True), "bool"), (np.zeros(2), "ndarray"), (b"x", "bytes"), ({1}, "set"),
        (date(2026, 1, 1), "date"), (Decimal(1), "Decimal"), (1j, "complex"), (len, "builtin_function_or_method"),
        (lambda: 1, "function"), (object(), "object"), (iter([]), "list_iterator"), (range(10**12), "range"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_its_path(value: object, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^messages\[1\]\.x is a {kind}"):
        to_json({"messages": [{}, {"x": value}]})


@pytest.mark.parametrize("key", [1, None, True, b"x", ("a",), 0.5])
def test_keys_that_would_become_texts_are_refused(key: object) -> None:
    with pytest.raises(ConfigError, match=r"^tools\[0\]\.a has the key .*; keys are texts"):
        to_json({"tools": [{"a": {key: 1}}]})


def test_a_number_that_cannot_be_printed_is_refused() -> None:
    with pytest.raises(ConfigError, match="x is an integer of 20,001 bits"):
        to_json({"x": 1 << 20_000})


def test_endless_values_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match=r"x\[0\].* nested more than 100 levels deep, or holds itself"):
        to_json({"x": loop})
    shared: list[Any] = [1]
    for _ in range(60):
        shared = [shared, shared]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "MAX_SIZE", 10_000)
        for large in (shared, "x" * 10_000, {"x" * 10_000: 1}, ["x" * 5000] * 2):
            with pytest.raises(ConfigError, match="more than 10,000 characters"):
                to_json({"x": large})
