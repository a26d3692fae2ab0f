"""NaN and infinities are found in every type of tensor, where they are, and nothing else is called damaged."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pydflash.files import GGUFFile, TensorSource, gguf_check, write_gguf
from pydflash.files.gguf_check import Damage, damaged_tensors
from pydflash.files.gguf_writer import encode
from pydflash.ggml_types import GGMLType

INTEGERS = {GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64}
BLOCKS = 6
# Where ggml's block structs have floats: byte offset of each, by type. Written out once more, as the oracle.
HALVES = {
    "Q1_0": [0], "Q2_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q8_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ1_S": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ4_NL": [0],
    "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64], "F16": [0],
}  # fmt: skip
PLACES = [(name, offset, "<f2") for name, offsets in HALVES.items() for offset in offsets]
PLACES += [("F32", 0, "<f4"), ("F64", 0, "<f8"), ("Q8_K", 0, "<f4")]
RAW = [
    ("BF16", 0, b"\x80\x7f"), ("BF16", 0, b"\x80\xff"), ("BF16", 0, b"\x81\x7f"),
    ("MXFP4", 0, b"\xff"), ("NVFP4", 0, b"\x7f"), ("NVFP4", 3, b"\x7f"),
]  # fmt: skip


def write(path: Path, name: str, data: npt.NDArray[np.uint8]) -> Path:
    kind = GGMLType[name]
    shape = (2, data.nbytes // kind.type_size // 2 * kind.block_size)
    write_gguf(path, {"general.architecture": "test"}, [TensorSource("t", shape, kind, lambda: [data])])
    return path


def found(path: Path) -> list[Damage]:
    with GGUFFile.open(path) as file:
        return list(damaged_tensors(file))


def blocks(name: str) -> npt.NDArray[np.uint8]:
    """(BLOCKS, bytes) whose bytes are all 0x3c: finite as any float, and something in every other field."""
    return np.full((BLOCKS, GGMLType[name].type_size), 0x3C, np.uint8)


@pytest.mark.parametrize("name", [kind.name for kind in GGMLType])
def test_whole_tensors_of_every_type_pass(tmp_path: Path, name: str) -> None:
    assert found(write(tmp_path / "t.gguf", name, blocks(name))) == []


def test_every_type_that_holds_floats_has_a_place_in_these_tests() -> None:
    named = {GGMLType[name] for name, *_ in (*PLACES, *RAW)} | {GGMLType.IQ1_M}
    assert named == set(GGMLType) - INTEGERS


@pytest.mark.parametrize(("name", "offset", "dtype"), PLACES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [0, 4])
def test_a_damaged_float_is_found(tmp_path: Path, name: str, offset: int, dtype: str, value: float, block: int) -> None:
    data = blocks(name)
    raw = np.array([value], dtype).view(np.uint8)
    data[block, offset : offset + len(raw)] = raw
    check_one(write(tmp_path / "t.gguf", name, data), name, block)


@pytest.mark.parametrize(("name", "offset", "raw"), RAW)
def test_a_damaged_small_float_is_found(tmp_path: Path, name: str, offset: int, raw: bytes) -> None:
    data = blocks(name)
    data[3, offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
    check_one(write(tmp_path / "t.gguf", name, data), name, 3)


def check_one(path: Path, name: str, block: int) -> None:
    """One block is damaged, the ``block``-th."""
    size = GGMLType[name].block_size
    row, column = divmod(block * size, BLOCKS // 2 * size)
    assert found(path) == [Damage("t", GGMLType[name], size, (row, column))]


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7BFF, 0x3C00, 0x8001])
def test_the_scattered_scale_of_iq1_m_is_put_together(tmp_path: Path, bits: int) -> None:
    data = blocks("IQ1_M")
    scales = data[2, 48:].copy().view("<u2")
    for i in range(4):  # d is the top nibbles, the lowest first
        scales[i] = (int(scales[i]) & 0x0FFF) | (bits >> 4 * i & 15) << 12
    data[2, 48:] = scales.view(np.uint8)
    finite = np.isfinite(np.array([bits], np.uint16).view(np.float16)[0])
    assert len(found(write(tmp_path / "t.gguf", "IQ1_M", data))) == (0 if finite else 1)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_1", "IQ4_XS", "TQ1_0", "IQ1_M"])
def test_the_gguf_package_agrees_about_random_blocks(tmp_path: Path, name: str) -> None:
    """Random bytes, so that quants and scales hold every pattern: damaged is what its values say."""
    kind = GGMLType[name]
    data = np.random.default_rng(len(name)).integers(0, 256, (4000, kind.type_size), np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(data, gguf.GGMLQuantizationType(int(kind)))
    expected = ~np.isfinite(values).all(axis=1)
    assert 0 < expected.sum() < 4000
    (damage,) = found(write(tmp_path / "t.gguf", name, data))
    assert damage.values == expected.sum() * kind.block_size
    row, column = damage.first
    assert row * 2000 + column // kind.block_size == expected.argmax()


def test_tensors_larger_than_a_piece_are_counted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_check, "_CHUNK_BYTES", 100)  # no multiple of the blocks
    values = np.ones((8, 64), np.float32)
    values[2, 33] = np.inf  # q8_0 rounds it to a scale that is no number
    values[7, 63] = np.nan
    with np.errstate(all="ignore"):
        tensors = [
            TensorSource("plain", (8, 64), GGMLType.F32, lambda: [encode(values, GGMLType.F32)]),
            TensorSource("whole", (8, 64), GGMLType.F32, lambda: [encode(np.ones_like(values), GGMLType.F32)]),
            TensorSource("blocks", (8, 64), GGMLType.Q8_0, lambda: [encode(values, GGMLType.Q8_0)]),
        ]
        write_gguf(tmp_path / "t.gguf", {"general.architecture": "test"}, tensors)
    steps: list[tuple[int, int]] = []
    with GGUFFile.open(tmp_path / "t.gguf") as file:
        damages = list(damaged_tensors(file, lambda done, total: steps.append((done, total))))
    assert damages == [
        Damage("plain", GGMLType.F32, 2, (2, 33)),
        Damage("blocks", GGMLType.Q8_0, 64, (2, 32)),
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Pages that were looked at are let go: of a file of 256 MiB a tenth stays, at most."""
    piece = np.full(16 << 20, 0x3C, np.uint8)
    tensor = TensorSource("t", (128 << 10, 1024), GGMLType.F16, lambda: (piece for _ in range(16)))
    path = tmp_path / "large.gguf"
    write_gguf(path, {"general.architecture": "test"}, [tensor])
    sizes: list[int] = []
    with GGUFFile.open(path) as file:
        before = resident()
        assert list(damaged_tensors(file, lambda done, total: sizes.append(resident()))) == []
    assert max(sizes) - before < 25 << 20


def resident() -> int:
    """Bytes of this process that lie in memory, mapped files included."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
