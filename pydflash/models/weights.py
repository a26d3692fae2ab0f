"""Weights: a GGUF file's tensors on a device, mapped without a copy on the CPU and uploaded on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pydflash import ops
from pydflash.arguments import shown
from pydflash.errors import LoadError, MissingTensor, SessionClosed, UnsupportedModel
from pydflash.files import GGUFFile, TensorInfo
from pydflash.ggml_types import GGMLType
from pydflash.native import Arena, Backend, MappedArena, Shape, Staging, Tensor, Traits

__all__ = ["Linear", "Progress", "Weights", "check_types", "find_tensors"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while a file is loaded."""


class Linear:
    """A projection: ``y = x @ weight.T + bias``, the last where there is one."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def find_tensors(file: GGUFFile, expected: Mapping[str, Shape]) -> dict[str, TensorInfo]:
    """The file's entries for ``expected`` (name to row-major shape), in these shapes.

    ggml does not tell (1, C) from (C,), and files have either for the other. Raises MissingTensor, or LoadError when a
    shape differs, a vector is not f32 or ggml has no product with a type.
    """
    found: dict[str, TensorInfo] = {}
    for name, shape in expected.items():
        info = file.tensors.get(name) or file.tensors.get(_other_name(name))
        if info is None:
            raise MissingTensor(
                f"{file.path}: tensor {name!r} of shape {shape} is missing; the file is incomplete or of another model"
            )
        if _without_leading_ones(info.shape) != _without_leading_ones(shape):
            raise LoadError(f"{file.path}: tensor {name!r} has shape {info.shape}; its metadata asks for {shape}")
        if (len(shape) == 1 or "conv1d" in name) and info.type != GGMLType.F32:
            raise LoadError(
                f"{file.path}: tensor {name!r} is {info.type.name}; norms, biases and convolutions must be F32"
            )
        if not info.type.is_weight:
            raise LoadError(
                f"{file.path}: tensor {name!r} is {info.type.name}, not a type of weights; convert the file again"
            )
        found[name] = replace(info, shape=shape)
    return found


def check_types(path: object, infos: Mapping[str, TensorInfo], traits: Traits) -> None:
    """UnsupportedModel, naming the tensor and its type, unless a device of these ``traits`` computes with all."""
    for name, info in infos.items():
        looked_up = name == "token_embd.weight" and "output.weight" in infos  # else it is the head as well
        types = traits.table_types if looked_up else traits.weight_types
        if info.type not in types:
            listed = ", ".join(kind.name for kind in types)
            raise UnsupportedModel(
                f"{path}: tensor {info.name!r} is {info.type.name}; this device computes with {listed}; take a file "
                "that holds no others, such as a plain Q4_K_M, Q6_K or Q8_0, or device='cpu'"
            )


def _other_name(name: str) -> str:
    return name.removesuffix(".bias") if name.endswith(".ssm_dt.bias") else name  # Ollama's converter


def _without_leading_ones(shape: Shape) -> Shape:
    return shape[next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) :]


class Weights:
    """Tensors by their GGUF names. They never change after loading. ``close()`` frees them."""

    def __init__(
        self, file: GGUFFile, infos: Mapping[str, TensorInfo], backend: Backend, progress: Progress | None = None
    ) -> None:
        """Load ``infos`` of ``file``. Raises UnsupportedModel or OutOfMemory before anything is read."""
        check_types(file.path, infos, backend.traits)
        self.backend = backend
        self.nbytes = sum(info.nbytes for info in infos.values())
        self._file = file  # CPU tensors lie in its mapping
        self._arenas: list[Any] = []
        self._tensors: dict[str, Tensor] = {}
        load = self._map if backend.traits.host_memory else self._upload
        load(infos, progress or (lambda done, total: None))

    def _map(self, infos: Mapping[str, TensorInfo], progress: Progress) -> None:
        for part in sorted({info.part for info in infos.values()}):
            specs = {n: (i.shape, i.type, i.offset) for n, i in infos.items() if i.part == part}
            arena = MappedArena(self.backend, np.frombuffer(self._file.mapping(part), np.uint8), specs)
            self._arenas.append(arena)
            self._tensors.update({name: arena[name] for name in arena})
        progress(self.nbytes, self.nbytes)

    def _upload(self, infos: Mapping[str, TensorInfo], progress: Progress) -> None:
        arena = Arena(self.backend, {n: (i.shape, i.type) for n, i in infos.items()}, f"weights of {self._file.path}")
        arena.set_weights_usage()
        self._arenas.append(arena)
        staging = Staging(self.backend)
        done = 0
        for name, info in infos.items():
            staging.upload(arena[name], self._file.data(info.name))
            done += info.nbytes
            progress(done, self.nbytes)
        staging.close()
        self._tensors.update({name: arena[name] for name in arena})

    def __getitem__(self, name: str) -> Tensor:
        if self.closed:
            raise SessionClosed(f"the weights of {self._file.path} were freed; load it again")
        if name not in self._tensors:
            raise MissingTensor(f"{self._file.path}: the model has no weights {shown(name)}")
        return self._tensors[name]

    def linear(self, name: str) -> Linear:
        """The projection ``name.weight``, with ``name.bias`` where that was loaded."""
        return Linear(self[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    @property
    def closed(self) -> bool:
        return not self._tensors

    def close(self) -> None:
        """Free the tensors. Safe to call twice."""
        for arena in self._arenas:
            arena.close()
        self._arenas, self._tensors = [], {}
