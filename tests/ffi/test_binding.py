"""The binding turns native failures into errors, frees what it owns once, and says what was built."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash._ffi import build_info, check, cuda_library, ffi, last_log_line, lib
from pydflash.errors import ConfigError, DeviceError, NativeError, NoDevice, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena, Backend, Graph, cuda_device_count


@pytest.mark.parametrize("failure", [ffi.NULL, False, 1, -1])
def test_null_false_and_a_status_become_errors(failure: object) -> None:
    last_log_line()
    with pytest.raises(NativeError, match=r"^trying it failed$"):
        check(failure, "trying it")


@pytest.mark.parametrize("success", [True, 0])
def test_success_passes_through(success: object) -> None:
    assert check(success, "trying it") is success


def test_the_build_says_what_it_holds() -> None:
    info = build_info()
    assert {"cuda", "why", "ggml"} <= set(info)
    assert info["cuda"] in ("ON", "OFF")
    assert info["why"]


def test_our_type_numbers_and_sizes_are_those_of_ggml() -> None:
    for dtype in GGMLType:
        assert lib.ggml_blck_size(int(dtype)) == dtype.block_size
        assert lib.ggml_type_size(int(dtype)) == dtype.type_size


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:99999", "vulkan"])
def test_an_unknown_device_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'auto', 'cpu', 'cuda', 'cuda:0'"):
        Backend(name)


@pytest.mark.parametrize("threads", [0, -1, 513])
def test_threads_outside_the_range_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.512"):
        Backend("cpu", threads=threads)


def test_a_missing_cuda_device_is_named_with_what_to_do() -> None:
    missing = f"cuda:{cuda_device_count()}"
    with pytest.raises(NoDevice, match=missing) as caught:
        Backend(missing)
    wanted = (
        "nvidia-smi"
        if cuda_device_count()
        else ("driver|nvidia-smi" if cuda_library().exists() else "PYDFLASH_CUDA=ON")
    )
    assert caught.match(wanted)


def test_auto_takes_cuda_only_where_there_is_some() -> None:
    with Backend("auto") as backend:
        assert backend.is_cuda == (cuda_device_count() > 0)


def test_closing_twice_is_harmless() -> None:
    backend = Backend("cpu", threads=1)
    arena = Arena(backend, {"x": ((4, 32), GGMLType.F32)}, "x")
    graph = Graph(backend, 64)
    for thing in (graph, graph, arena, arena, backend, backend):
        thing.close()


def test_memory_that_nobody_has_is_refused_with_its_size() -> None:
    with Backend("cpu", threads=1) as backend, pytest.raises(OutOfMemory, match=r"a moon needs .* bytes on cpu"):
        Arena(backend, {"x": ((1 << 24, 1 << 20), GGMLType.F32)}, "a moon")


def test_an_arena_starts_as_zeros_and_is_cleared_to_zeros() -> None:
    with Backend("cpu", threads=1) as backend:
        arena = Arena(backend, {"x": ((3, 32), GGMLType.F32)}, "x")
        out = np.empty((3, 32), np.float32)
        backend.read(arena["x"], out)
        assert not out.any()
        backend.write(arena["x"], np.ones((3, 32), np.float32))
        backend.read(arena["x"], out)
        assert out.all()
        arena.clear()
        backend.read(arena["x"], out)
        assert not out.any()
        arena.close()


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
