"""A tensor's arithmetic and movement refuse what does not fit before ggml sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph, Tensor
from tests.helpers import Shapes, check_refused

F = GGMLType.F32
REFUSED: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "add": (lambda x, y: x + y, [((8, 4), F), ((8, 3), F)]),
    "mul with more axes": (lambda x, y: x * y, [((4,), F), ((8, 4), F)]),
    "reshape": (lambda x: x.reshape(5, 7), [((8, 4), F)]),
    "reshape to five axes": (lambda x: x.reshape(2, 2, 2, 2, 2), [((8, 4), F)]),
    "slice": (lambda x: x.slice(0, 3, 9), [((8, 4), F)]),
    "empty slice": (lambda x: x.slice(0, 3, 3), [((8, 4), F)]),
    "slice inside a block": (lambda x: x.slice(1, 16, 64), [((8, 64), GGMLType.Q8_0)]),
    "split": (lambda x: x.split([1, 2])[0], [((8, 4), F)]),
    "permute": (lambda x: x.permute(0, 0), [((8, 4), F)]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_ggml(cpu: Backend, name: str) -> None:
    check_refused(cpu, *REFUSED[name])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), F), ((0,), F), ((2, -1), F), ((1, 1, 1, 1, 1), F), ((4, 33), GGMLType.Q8_0), ((2**41,), F)],
)
def test_a_tensor_that_ggml_cannot_hold_is_refused(cpu: Backend, shape: tuple[int, ...], dtype: GGMLType) -> None:
    graph = Graph(cpu, 64)
    with pytest.raises(ShapeError, match="1 to 4 axes"):
        graph.input(shape, dtype)
    graph.close()


def test_a_weight_enters_an_expression_only_within_a_graph(cpu: Backend) -> None:
    graph = Graph(cpu, 64)
    x = graph.input((2, 4), F)
    loose = Tensor(x.c, x.shape, x.dtype, None)
    with pytest.raises(ShapeError, match="within"):
        loose + x
    graph.close()
