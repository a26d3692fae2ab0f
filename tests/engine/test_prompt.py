"""A prompt is text, messages or token ids in any shape that holds them; everything else is refused by what it is."""

from __future__ import annotations

import array
from collections import UserDict, UserList, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydflash.engine import Engine
from pydflash.engine.prompt import ids_of
from pydflash.errors import ConfigError, PydflashError, ShapeError

VOCAB = 512
USER = {"role": "user", "content": "hi"}


class Tensor:
    """An array of another library, which gives numpy's or fails."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if self.data is None:
            raise TypeError("it lies on a GPU")
        return np.asarray(self.data)


@pytest.mark.parametrize(
    "prompt",
    [
        [65, 66, 67],
        (65, 66, 67),
        range(65, 68),
        np.array([65, 66, 67]),
        np.array([65, 66, 67], np.uint8),
        np.array([65, 0, 66, 0, 67], np.int32)[::2],
        [np.int64(65), np.uint16(66), 67],
        [np.array(65), 66, 67],
        UserList([65, 66, 67]),
        deque([65, 66, 67]),
        array.array("q", [65, 66, 67]),
        Tensor([65, 66, 67]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_integers_in_any_sequence_or_array_are_ids_of(prompt: Any) -> None:
    ids = ids_of(prompt, VOCAB)
    assert ids == [65, 66, 67]
    assert {type(token) for token in ids} == {int}


@pytest.mark.parametrize("prompt", ["", "abc", np.str_("abc"), [USER], (USER,), [UserDict(USER)]])
def test_text_and_messages_are_no_ids_of(prompt: Any) -> None:
    assert ids_of(prompt, VOCAB) is None


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (np.array([[65, 66]]), r"ndarray of shape \(1, 2\)"),
        (np.array(65), r"ndarray of shape \(\)"),
        (np.int64(65), r"int64 of shape \(\)"),
        (np.array([1.0, 2.0]), "ndarray of float64"),
        (np.array([True, False]), "ndarray of bool"),
        (np.array(["a"]), "ndarray of <U1"),
        (np.array([USER], object), "ndarray of object"),
        (Tensor([0.5]), "Tensor of float64"),
        (Tensor([[1]]), r"Tensor of shape \(1, 1\)"),
        ([65, "a"], r"prompt\[1\] is a str"),
        ([65, USER], r"prompt\[1\] is a dict"),
        ([65, None], r"prompt\[1\] is a NoneType"),
        ([65, 66.0], r"prompt\[1\] is a float"),
        ([1.5], r"prompt\[0\] is a float"),
        ([True, 65], r"prompt\[0\] is a bool"),
        ([65, np.bool_(True)], r"prompt\[1\] is a bool"),
        ([np.array([65, 66])], r"prompt\[0\] is a ndarray"),
        ([65, -1], r"prompt\[1\]: token id -1 is outside the vocabulary of 512 tokens"),
        ([65, 512], r"prompt\[1\]: token id 512 is outside"),
        ([10**5000], r"cannot be written out"),
        (np.array([65, 512]), r"prompt\[1\]: token id 512 is outside"),
        (np.array([65, 66, -2]), r"prompt\[2\]: token id -2 is outside"),
        (np.array([2**64 - 1], np.uint64), r"prompt\[0\]: token id 18446744073709551615 is outside"),
    ],
)
def test_ids_of_the_wrong_kind_are_refused_by_their_place(prompt: Any, problem: str) -> None:
    with pytest.raises(ShapeError, match=problem):
        ids_of(prompt, VOCAB)


NO_PROMPTS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"),
    "memoryview": lambda: memoryview(b"abc"),
    "NoneType": lambda: None,
    "dict": lambda: dict(USER),
    "generator": lambda: (i for i in (65, 66)),
    "set": lambda: {65, 66},
    "int": lambda: 65,
    "float": lambda: 1.5,
    "object": object,
    "type": lambda: Tensor,
    "Tensor that gives no numpy array: it lies on a GPU": lambda: Tensor(None),
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_by_its_type(engine: Engine, name: str) -> None:
    for call in (engine.encode, engine.stream, engine.generate):
        with pytest.raises(ConfigError, match=f"prompt is a {name}"):
            call(NO_PROMPTS[name]())


def test_bytes_are_to_be_decoded(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="neither text nor token ids: decode them first"):
        engine.encode(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["", [], (), range(0), np.array([]), np.array([], np.int64)], ids=repr)
def test_an_empty_prompt_is_refused(engine: Engine, prompt: Any) -> None:
    for call in (engine.encode, engine.stream, engine.generate):
        with pytest.raises(ShapeError, match="empty"):
            call(prompt)


def test_an_array_generates_what_its_list_does(engine: Engine) -> None:
    ids = engine.encode("the cat sat on")
    assert engine.generate(np.array(ids, np.int32)).tokens == engine.generate(ids).tokens


@pytest.mark.parametrize("prompt", ["raw", [65, 66], np.array([65, 66])], ids=["text", "ids", "array"])
@pytest.mark.parametrize("option", [{"tools": [{}]}, {"variables": {"enable_thinking": False}}], ids=str)
def test_template_options_need_messages(engine: Engine, prompt: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give messages"):
        engine.stream(prompt, **option)
    assert engine.encode(prompt, tools=[], variables={}) == engine.encode(prompt)
    with pytest.raises(ConfigError, match="give messages"):
        engine.encode(prompt, tools=np.array(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"messages": []}, "'messages', which is taken"),
        ({"tools": []}, "'tools', which is taken"),
        ({"self": 1}, "'self', which is taken"),
        ({3: 1}, "key that is a int"),
        ([("a", 1)], "variables is a list"),
        ("a", "variables is a str"),
        ({"now": Path}, r"variables\.now is a"),
    ],
)
def test_variables_that_a_template_cannot_have_are_refused(engine: Engine, variables: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        engine.encode([USER], variables=variables)
    with pytest.raises(PydflashError):
        engine.stream([USER], tools=variables, variables=variables)


def test_variables_reach_the_template(engine: Engine) -> None:
    whole = engine.encode([USER])
    opened = engine.encode("<|im_start|>assistant\n")
    assert engine.encode([USER], variables={"add_generation_prompt": False}) + opened == whole
