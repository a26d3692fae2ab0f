"""What leaves as plain data is made of JSON's types only; everything else is refused by its place."""

from __future__ import annotations

import json
from collections import UserDict, deque
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from pydflash.errors import ConfigError
from pydflash.text import plain
from pydflash.text.plain import plain_copy


class Colour(str, Enum):
    RED = "red"


class Model:
    """As pydantic's."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self) -> dict[str, Any]:
        return self.fields


def types_of(value: Any) -> set[type]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {type(value)}.union(*map(types_of, inner))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, "x", True, None]}, {"a": [1, 2.5, "x", True, None]}),
        ([np.int64(3), np.float32(0.5), np.bool_(True), np.str_("x")], [3, 0.5, True, "x"]),
        (np.array([[1, 2]], np.uint8), [[1, 2]]),
        (Colour.RED, "red"),
        (IntEnum("N", "ONE").ONE, 1),  # type: ignore[attr-defined]
        ((1, (2,), range(2), deque([3])), [1, [2], [0, 1], [3]]),
        (UserDict(a=MappingProxyType({"b": 1})), {"a": {"b": 1}}),
        (Model(a=Model(b=(1,))), {"a": {"b": [1]}}),
        ({Colour.RED: 1}, {"red": 1}),
    ],
)
def test_values_become_plain(value: Any, expected: Any) -> None:
    copy = plain_copy(value, "x")
    assert copy == expected
    assert types_of(copy) <= {dict, list, str, int, float, bool, type(None)}
    assert json.loads(json.dumps(copy)) == expected


def test_a_copy_shares_nothing_that_can_change() -> None:
    given = {"a": [{"b": [1]}]}
    copy = plain_copy(given, "x")
    given["a"][0]["b"].append(2)
    assert copy == {"a": [{"b": [1]}]}


def cyclic(kind: type) -> Any:
    value: Any = kind()
    value.update(a=value) if kind is dict else value.append(value)
    return value


def self_holding_array() -> Any:
    array = np.empty((), object)
    array[()] = array
    return array


def doubled() -> Any:
    value: Any = [0]
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [0, {"b": object()}]}, r"x\.a\[1\]\.b is a object"),
        ({"a": b"y"}, r"x\.a is a bytes; decode it"),
        ({"a": {1, 2}}, r"x\.a is a set"),
        ({"a": lambda: 1}, r"x\.a is a function"),
        ({"a": 1j}, r"x\.a is a complex"),
        ({"a": (i for i in ())}, r"x\.a is a generator"),
        ({"a": Model}, r"x\.a is a type"),
        ({"a": np.datetime64("2020-01-01")}, r"x\.a is a date"),
        ({"a": np.longdouble(1)}, r"x\.a is a longdouble"),
        ([{3: "y"}], r"x\[0\] has a key that is a int"),
        ({"a": "\udc80"}, r"x\.a has the lone surrogate U\+DC80 as character 0"),
        ({"\ud800": 1}, "x has the lone surrogate"),
        ({"a": 1 << 5000}, r"x\.a is an integer of 5,001 bits"),
        (cyclic(dict), r"x\.a\.a\.a\.a\.\.\.\.a\.a\.a is nested deeper"),
        (cyclic(list), r"x\[0\].* is nested deeper than 64 levels, or holds itself"),
        (json.loads("[" * 900 + "]" * 900), "is nested deeper"),
        (self_holding_array(), "x is a ndarray"),
    ],
)
def test_anything_else_is_refused_by_its_place(value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plain_copy(value, "x")


def test_the_number_of_values_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "MAX_VALUES", 10_000)
    with pytest.raises(ConfigError, match="x holds more than 10,000 values"):
        plain_copy(doubled(), "x")


def test_an_object_whose_dump_is_no_mapping_is_refused() -> None:
    class Odd:
        def model_dump(self) -> Any:
            return self

    with pytest.raises(ConfigError, match="model_dump that returns a Odd"):
        plain_copy(Odd(), "x")
