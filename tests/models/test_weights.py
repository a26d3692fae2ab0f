"""Weights come from a file as it is: found by name, shape and type, mapped on the CPU, gone when closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pydflash.errors import LoadError, MissingTensor, SessionClosed, UnsupportedModel
from pydflash.files import GGUFFile, TensorInfo, TensorSource, write_gguf
from pydflash.ggml_types import GGMLType
from pydflash.models import Weights, find_tensors
from pydflash.models.weights import check_types
from pydflash.native import Backend
from pydflash.native.traits import CPU, CUDA

SHAPES = {"token_embd.weight": (6, 32), "norm.weight": (32,), "conv1d.weight": (8, 4)}
Open = Callable[..., GGUFFile]


def source(name: str, shape: tuple[int, ...], dtype: GGMLType) -> TensorSource:
    nbytes = dtype.nbytes(int(np.prod(shape)))
    data = np.random.default_rng(len(name)).integers(0, 60, nbytes, np.uint8)  # small floats whatever the type
    return TensorSource(name, shape, dtype, lambda: iter([data]))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """**types by tensor name, f32 unless given, to a file of SHAPES."""
    files: list[GGUFFile] = []

    def open_(**types: GGMLType) -> GGUFFile:
        sources = [source(name, shape, types.get(name, GGMLType.F32)) for name, shape in SHAPES.items()]
        write_gguf(tmp_path / "some.gguf", {"general.architecture": "some"}, sources)
        files.append(GGUFFile.open(tmp_path / "some.gguf"))
        return files[-1]

    yield open_
    for file in files:
        file.close()


def test_what_is_expected_is_found_and_nothing_else(opened: Open) -> None:
    file = opened()
    found = find_tensors(file, {"norm.weight": (32,)})
    assert found == {"norm.weight": file.tensors["norm.weight"]}


def test_a_tensor_that_is_missing_is_named_with_its_shape(opened: Open) -> None:
    with pytest.raises(MissingTensor, match=r"some\.gguf: tensor 'output.weight' of shape \(6, 32\) is missing"):
        find_tensors(opened(), {"output.weight": (6, 32)})


@pytest.mark.parametrize("shape", [(32, 6), (6, 31), (6, 32, 1), (192,)], ids=str)
def test_a_tensor_of_another_shape_is_named_with_both(opened: Open, shape: tuple[int, ...]) -> None:
    with pytest.raises(LoadError, match=r"'token_embd.weight' has shape \(6, 32\); its metadata asks for \("):
        find_tensors(opened(), {"token_embd.weight": shape})


@pytest.mark.parametrize("name", ["norm.weight", "conv1d.weight"])
def test_what_is_computed_with_as_f32_must_be_f32(opened: Open, name: str) -> None:
    file = opened(**{name: GGMLType.F16})
    with pytest.raises(LoadError, match=f"'{name}' is F16; norms, biases and convolutions must be F32"):
        find_tensors(file, SHAPES)


@pytest.mark.parametrize("dtype", [GGMLType.I32, GGMLType.I8])
def test_a_type_that_no_weight_can_have_is_refused(opened: Open, dtype: GGMLType) -> None:
    file = opened(**{"token_embd.weight": dtype})
    with pytest.raises(LoadError, match=f"'token_embd.weight' is {dtype.name}, not a type of weights"):
        find_tensors(file, SHAPES)


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("blk.0.ffn_down.weight", GGMLType.IQ4_XS, True), ("blk.0.ffn_down.weight", GGMLType.Q3_K, True),
        ("blk.0.ffn_down.weight", GGMLType.Q5_0, True), ("blk.0.ffn_down.weight", GGMLType.MXFP4, True),
        ("blk.0.ffn_down.weight", GGMLType.Q4_K, False), ("blk.0.ffn_down.weight", GGMLType.BF16, False),
        ("token_embd.weight", GGMLType.IQ4_XS, False), ("token_embd.weight", GGMLType.Q3_K, False),
        ("token_embd.weight", GGMLType.TQ1_0, True), ("output.weight", GGMLType.Q5_1, True),
    ],
)  # fmt: skip
def test_types_that_a_device_has_no_product_with_are_refused_by_name(name: str, dtype: GGMLType, refused: bool) -> None:
    infos = {n: TensorInfo(n, GGMLType.Q8_0, (256, 256), 0, 0) for n in ("token_embd.weight", "output.weight")}
    infos[name] = TensorInfo(name, dtype, (256, 256), 0, 0)
    check_types("m.gguf", infos, CPU)
    with pytest.raises(UnsupportedModel) if refused else nullcontext() as caught:
        check_types("m.gguf", infos, CUDA)
    if caught is not None:
        assert f"m.gguf: tensor {name!r} is {dtype.name}; this device computes with F32, F16, " in str(caught.value)


def test_an_embedding_that_is_the_head_too_has_to_be_multiplied_with() -> None:
    tied = {"token_embd.weight": TensorInfo("token_embd.weight", GGMLType.Q3_K, (256, 256), 0, 0)}
    check_types("m.gguf", tied, CPU)
    with pytest.raises(UnsupportedModel, match=r"'token_embd\.weight' is Q3_K"):
        check_types("m.gguf", tied, CUDA)


@pytest.mark.parametrize("dtype", [GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_loaded_tensors_hold_the_bytes_of_the_file(opened: Open, backend: Backend, dtype: GGMLType) -> None:
    file = opened(**{"token_embd.weight": dtype})
    weights = Weights(file, find_tensors(file, SHAPES), backend)
    for name, shape in SHAPES.items():
        out = np.empty(weights[name].nbytes, np.uint8)
        backend.read(weights[name], out)
        assert weights[name].shape == shape
        assert np.array_equal(out, np.frombuffer(file.data(name), np.uint8))
    weights.close()


def test_progress_ends_with_everything(opened: Open, backend: Backend) -> None:
    file, seen = opened(), list[tuple[int, int]]()
    weights = Weights(file, find_tensors(file, SHAPES), backend, lambda done, total: seen.append((done, total)))
    assert weights.nbytes == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    assert {total for _, total in seen} == {weights.nbytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (weights.nbytes, weights.nbytes)
    weights.close()


def test_closed_weights_are_gone_and_say_so(opened: Open, backend: Backend) -> None:
    file = opened()
    weights = Weights(file, find_tensors(file, SHAPES), backend)
    assert not weights.closed
    weights.close()
    weights.close()
    assert weights.closed
    with pytest.raises(SessionClosed, match="were freed; load it again"):
        weights["norm.weight"]


def test_a_projection_is_found_without_its_suffix(opened: Open, cpu: Backend) -> None:
    file = opened()
    weights = Weights(file, find_tensors(file, SHAPES), cpu)
    assert weights.linear("token_embd").weight is weights["token_embd.weight"]
    weights.close()
