"""Devices are opened by name or refused with the reason, and say what they are like."""

from __future__ import annotations

import pytest

from pydflash._ffi import cuda_library
from pydflash.errors import ConfigError, NoDevice
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.native import Arena, Backend, Graph, cuda_device_count
from pydflash.native.traits import CPU, CUDA


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:99999", "vulkan"])
def test_an_unknown_device_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'auto', 'cpu', 'cuda', 'cuda:0'"):
        Backend(name)


@pytest.mark.parametrize("threads", [0, -1, 513])
def test_threads_outside_the_range_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match="1 to 512"):
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


def test_traits_are_those_of_the_kind_of_device(backend: Backend) -> None:
    assert backend.traits == (CUDA if backend.is_cuda else CPU)
    assert set(backend.traits.cache_types) <= set(CACHE_TYPES.values())


def test_the_kinds_of_device_differ_in_every_trait() -> None:
    """One that all share would be no trait."""
    assert all(here != there for here, there in zip(CPU, CUDA, strict=True))
