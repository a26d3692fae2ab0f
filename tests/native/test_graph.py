"""A graph is built once and run with other inputs; it is itself, and holds nothing that its device cannot run."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash._ffi import build_info, ffi, lib
from pydflash.errors import DeviceError
from pydflash.ggml_types import GGMLType
from pydflash.native import Backend, Graph


def test_a_graph_replays_with_new_inputs() -> None:
    with Backend("cpu", threads=1) as backend:
        graph = Graph(backend, 64)
        x = graph.input((2, 32), GGMLType.F32)
        y = graph.output(x + x)
        graph.finish()
        out = np.empty((2, 32), np.float32)
        for value in (1.0, -3.0):
            backend.write(x, np.full((2, 32), value, np.float32))
            graph.run()
            backend.read(y, out)
            assert (out == 2 * value).all()
        graph.close()


def test_no_graph_can_be_taken_for_another() -> None:
    """ggml-cuda tells graphs apart by their first nodes, and those by address and contents, names included."""
    names = set()
    with Backend("cpu", threads=1) as backend:
        for _ in range(3):
            graph = Graph(backend, 64)
            x = graph.input((2, 32), GGMLType.F32)
            graph.output(x + x)
            graph.finish()
            names.add(ffi.string(lib.ggml_graph_node(graph.c, 0).name))
            graph.close()
    assert len(names) == 3


def test_an_operation_that_the_device_lacks_is_named_before_the_run() -> None:
    with Backend("cpu", threads=1) as backend:
        graph = Graph(backend, 64)
        # ggml writes rows of a table from f32 or f16, and of this type it has no writer at all.
        table, rows = graph.input((4, 256), GGMLType.IQ2_XXS), graph.input((2,), GGMLType.I32)
        node = lib.ggml_set_rows(graph.context, table.c, graph.input((2, 256), GGMLType.F32).c, rows.c)
        graph.effect(table.derive(node, table.shape))
        with pytest.raises(DeviceError, match=r"cpu cannot run SET_ROWS"):
            graph.finish()
        graph.close()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("weight", "rows"), [(GGMLType.F32, 2), (GGMLType.Q8_0, 1), (GGMLType.Q8_0, 16), (GGMLType.Q3_K, 32)]
)
def test_a_product_whose_kernel_was_not_built_is_refused(cuda: Backend, weight: GGMLType, rows: int) -> None:
    if build_info()["kernels"] == "all":
        pytest.skip("this build has all of ggml's kernels")
    graph = Graph(cuda, 64)
    x, matrix = graph.input((rows, 256), GGMLType.F32), graph.input((8, 256), weight)
    graph.effect(x.derive(lib.ggml_mul_mat(graph.context, matrix.c, x.c), (rows, 8)))
    with pytest.raises(DeviceError, match="cannot run MUL_MAT"):
        graph.finish()
    graph.close()


def test_a_graph_grows_with_its_operations() -> None:
    with Backend("cpu", threads=1) as backend:
        graph = Graph(backend, piece=8)
        x = total = graph.input((1, 32), GGMLType.F32)
        for _ in range(1000):
            total = total + x
        graph.output(total)
        graph.finish()
        backend.write(x, np.ones((1, 32), np.float32))
        graph.run()
        out = np.empty((1, 32), np.float32)
        backend.read(total, out)
        assert (out == 1001).all()
        graph.close()
