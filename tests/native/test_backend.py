"""Devices are opened by name or refused with the reason; memory is zeroed, counted and freed."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash._ffi import cuda_library
from pydflash.errors import ConfigError, NoDevice, OutOfMemory
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena, Backend, Graph, cuda_device_count


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
