"""Memory of a device is zeroed, counted and freed; a mapped file is used in place, an upload copies every byte."""

from __future__ import annotations

import numpy as np
import pytest

from pydflash.errors import DeviceError, OutOfMemory, ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena, Backend, MappedArena, Staging


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


def test_tensors_of_an_arena_are_found_by_name(cpu: Backend) -> None:
    specs = {"x": ((3, 32), GGMLType.F32), "y": ((5, 64), GGMLType.Q8_0)}
    arena = Arena(cpu, specs, "some")
    assert {name: (arena[name].shape, arena[name].dtype) for name in arena} == specs
    assert arena.nbytes >= sum(arena[name].nbytes for name in arena)
    assert not arena.closed
    arena.close()
    arena.close()
    assert arena.closed


def test_an_arena_of_nothing_takes_nothing(cpu: Backend) -> None:
    arena = Arena(cpu, {}, "nothing")
    arena.clear()
    assert (list(arena), arena.nbytes) == ([], 0)
    arena.close()


def test_a_tensor_that_ggml_cannot_hold_makes_no_arena(cpu: Backend) -> None:
    with pytest.raises(ShapeError, match="rows of whole blocks of 32"):
        Arena(cpu, {"x": ((3, 33), GGMLType.Q8_0)}, "x")


def test_a_mapped_tensor_is_the_memory_that_it_lies_in(cpu: Backend) -> None:
    memory = np.zeros(4096, np.uint8)
    start = -memory.ctypes.data % 32  # a mapping begins at a page
    memory = memory[start : start + 2048]
    arena = MappedArena(cpu, memory, {"x": ((2, 8), GGMLType.F32, 64)})
    memory.view(np.float32)[16:32] = np.arange(16)
    out = np.empty((2, 8), np.float32)
    cpu.read(arena["x"], out)
    assert np.array_equal(out, np.arange(16).reshape(2, 8))
    assert list(arena) == ["x"]
    arena.close()
    arena.close()


@pytest.mark.cuda
def test_a_mapped_file_needs_a_device_that_reads_the_memory_of_the_host(cuda: Backend) -> None:
    with pytest.raises(DeviceError, match="reads the host's memory, not cuda:0"):
        MappedArena(cuda, np.zeros(4096, np.uint8), {})


@pytest.mark.parametrize("nbytes", [1, 64, 65, 200, 1024])
def test_an_upload_in_pieces_copies_every_byte(backend: Backend, nbytes: int) -> None:
    arena, staging = Arena(backend, {"x": ((nbytes,), GGMLType.I8)}, "x"), Staging(backend, 64)
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    staging.upload(arena["x"], data)
    staging.close()
    out = np.empty(nbytes, np.uint8)
    backend.read(arena["x"], out)
    assert np.array_equal(out, data)
    arena.close()
