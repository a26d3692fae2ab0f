"""What several test folders share: single-operation graphs, packed leaves, kernel rounding, measures of agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pydflash.drafts import Draft, DraftSession
from pydflash.errors import ShapeError
from pydflash.ggml_types import GGMLType
from pydflash.limits import EXACT_ROWS
from pydflash.models import Model, load_model
from pydflash.native import Backend, Graph, Tensor
from pydflash.runtime import Session
from tests.reference.qwen35 import Array, Reference, Weights
from tests.reference.qwen35moe import MoEReference
from tools.synth.blocks import as_bytes, random_blocks

__all__ = [
    "Packed",
    "Pair",
    "RoundedMoEReference",
    "RoundedReference",
    "compute",
    "cosine",
    "dequantised",
    "nmse",
    "packed",
    "relative",
    "rounded",
    "run_chunks",
    "state_of",
]

_NUMPY = {np.dtype(np.float32): GGMLType.F32, np.dtype(np.float16): GGMLType.F16, np.dtype(np.int32): GGMLType.I32}


# --- graphs of one operation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A matrix as ggml stores it: ``data`` bytes of ``dtype`` for row-major ``shape``."""

    data: npt.NDArray[np.uint8]
    shape: tuple[int, ...]
    dtype: GGMLType

    @property
    def values(self) -> Array:
        """The numbers that the bytes stand for, float64."""
        flat = gguf.dequantize(self.data, gguf.GGMLQuantizationType(int(self.dtype)))
        return flat.reshape(self.shape).astype(np.float64)

    def rows(self, start: int, stop: int) -> Packed:
        return Packed(self.data[start:stop], (stop - start, *self.shape[1:]), self.dtype)


def packed(values: npt.NDArray[np.float32], name: str) -> Packed:
    """``values`` (rows, columns) in type ``name``. K-quants hold random blocks of the same spread instead."""
    rows, columns = values.shape
    dtype = GGMLType[name.upper() if name[-2:] != "_k" else name[:-2].upper() + "_K"]
    if name in ("q4_k", "q5_k", "q6_k"):
        count = rows * columns // dtype.block_size
        data = random_blocks(name, count, float(values.std()), np.random.default_rng(rows + columns))
    elif name in ("f32", "f16", "bf16"):
        data = as_bytes(values, name)
    else:
        data = gguf.quantize(values, gguf.GGMLQuantizationType(int(dtype)))
    return Packed(np.ascontiguousarray(data).reshape(rows, -1).view(np.uint8), values.shape, dtype)


Leaf = npt.NDArray[Any] | Packed


def compute(
    backend: Backend, build: Callable[..., Tensor | Sequence[Tensor]], *leaves: Leaf, exact_rows: int = EXACT_ROWS
) -> list[npt.NDArray[Any]]:
    """Run ``build(*tensors)`` on ``backend`` and return its results, in their own shapes; packed types come as bytes.

    A leaf that is returned is read after the run, so an operation's effect on state can be seen. ``exact_rows``: those
    of the graph.
    """
    graph = Graph(backend, 512, exact_rows)
    try:
        tensors = [_leaf(graph, leaf) for leaf in leaves]
        built = build(*tensors)
        outputs = [graph.output(t) for t in ([built] if isinstance(built, Tensor) else built)]
        graph.finish()
        for tensor, leaf in zip(tensors, leaves):
            backend.write(tensor, np.ascontiguousarray(leaf.data if isinstance(leaf, Packed) else leaf))
        graph.run()
        return [_read(backend, tensor) for tensor in outputs]
    finally:
        graph.close()


Shapes = Sequence[tuple[tuple[int, ...], GGMLType]]


def check_refused(backend: Backend, build: Callable[..., Tensor], shapes: Shapes) -> None:
    """``build`` of inputs of these shapes and types raises a ShapeError."""
    graph = Graph(backend, 64)
    tensors = [graph.input(shape, dtype) for shape, dtype in shapes]
    with pytest.raises(ShapeError):
        build(*tensors)
    graph.close()


def _leaf(graph: Graph, leaf: Leaf) -> Tensor:
    dtype = leaf.dtype if isinstance(leaf, Packed) else _NUMPY[leaf.dtype]
    return graph.effect(graph.input(leaf.shape, dtype))  # an unused leaf is allocated too


def _read(backend: Backend, tensor: Tensor) -> npt.NDArray[Any]:
    kinds = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.I32: np.int32}
    if tensor.dtype in kinds:
        out: npt.NDArray[Any] = np.empty(tensor.shape, kinds[tensor.dtype])
    else:
        rows = tensor.dtype.nbytes(tensor.shape[-1])
        out = np.empty((*tensor.shape[:-1], rows), np.uint8)
    backend.read(tensor, out)
    return out


# --- agreement --------------------------------------------------------------------------------------------------------


def cosine(a: Array, b: Array) -> float:
    """The smallest cosine of corresponding rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float((np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1))).min())


def nmse(got: Array, want: Array) -> float:
    """Mean squared difference over the mean square of ``want``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.mean((got - want) ** 2) / np.mean(want**2))


def relative(got: Array, want: Array) -> float:
    """The largest difference over the root mean square of ``want``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.sqrt(np.mean(want**2)))


# --- what the CPU's products do to an activation row ------------------------------------------------------------------


def rounded(x: Array, weight: GGMLType) -> Array:
    """Rows of ``x`` (..., K) as the CPU's dot product with ``weight`` sees them, in x's dtype.

    f16 and bf16 weights round to their own type; types of blocks of 32, such as Q8_0, to blocks of 32 with scale
    max|x|/127 kept as f16; K-quants to blocks of 256 with an f32 scale that sends the largest magnitude to -127.
    """
    values = np.asarray(x, np.float32)
    if weight == GGMLType.F32:
        return x
    if weight == GGMLType.F16:
        return values.astype(np.float16).astype(x.dtype)
    if weight == GGMLType.BF16:
        bits = as_bytes(values, "bf16").view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(x.shape).astype(x.dtype)
    small = weight.block_size == 32
    blocks = values.reshape(-1, 32 if small else 256)
    return (_q8_0 if small else _q8_k)(blocks).reshape(x.shape).astype(x.dtype)


def _q8_0(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    return np.rint(blocks * inverse) * (peak / np.float32(127)).astype(np.float16).astype(np.float32)


def _q8_k(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = np.divide(np.float32(-127), peak, out=np.zeros_like(peak), where=peak != 0)
    quants = np.minimum(np.rint(scale * blocks), np.float32(127))
    return quants * np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


class _Matrix:
    """A weight matrix whose products round the other operand first. Stands where the oracle writes ``x @ weight.T``."""

    __array_ufunc__ = None  # numpy then leaves the product to __rmatmul__

    def __init__(self, values: Array, dtype: GGMLType) -> None:
        self._values, self._dtype = values, dtype

    @property
    def T(self) -> _Matrix:
        return self

    def __rmatmul__(self, x: Array) -> Array:
        return rounded(x, self._dtype) @ self._values.T

    def __getitem__(self, index: Any) -> Any:
        """Rows of an embedding, or one matrix of a stack of experts'."""
        part = self._values[index]
        return part if self._values.ndim == 2 else _Matrix(part, self._dtype)


class _RoundingWeights(Weights):
    def __init__(self, path: Path | str, dtype: npt.DTypeLike) -> None:
        super().__init__(path, dtype)
        self._types = {t.name: GGMLType(int(t.tensor_type)) for t in gguf.GGUFReader(str(path)).tensors}

    def __getitem__(self, name: str) -> Any:
        values, dtype = super().__getitem__(name), self._types[name]
        return values if values.ndim < 2 or dtype == GGMLType.F32 else _Matrix(values, dtype)


class RoundedReference(Reference):
    """The oracle with activations rounded as the CPU's products round them; the rest stays in double precision."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        super().__init__(path, **options)
        self.weights = _RoundingWeights(path, self.dtype)


class RoundedMoEReference(RoundedReference, MoEReference):
    """The same of a `qwen35moe` model."""


# --- sessions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A loaded target and its draft, and the files they came from."""

    model: Model
    draft: Draft
    target_path: Path
    draft_path: Path

    def open(self, context: int = 256, k: str = "f32", v: str = "f32", **options: Any) -> tuple[Session, DraftSession]:
        session = Session(self.model, context, k, v, capture=self.draft.taps, **options)
        return session, DraftSession(self.draft, session)


def run_chunks(session: Session, tokens: Sequence[int], width: int) -> npt.NDArray[np.float32]:
    """Logits (len(tokens), vocab) of ``tokens`` forwarded and committed ``width`` at a time."""
    rows = [np.empty((0, session.model.config.vocab), np.float32)]
    for start in range(0, len(tokens), width):
        piece = list(tokens[start : start + width])
        rows.append(session.forward(piece, "all").logits)
        session.commit(len(piece))
    return np.concatenate(rows)


def engine_rows(path: Path, tokens: Sequence[int], width: int = 8) -> npt.NDArray[np.float32]:
    """:func:`run_chunks` of the model in a file, on one thread of the CPU with an f32 cache."""
    with load_model(path, "cpu", threads=1) as model, Session(model, 256, "f32", "f32") as session:
        return run_chunks(session, tokens, width)


def captured(path: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Residual stream (len(tokens), layers, hidden) of one forward of the model in a file, on the CPU."""
    with load_model(path, "cpu", threads=1) as model:
        layers = tuple(range(model.config.layers))
        with Session(model, 256, "f32", "f32", capture=layers) as session:
            session.forward(tokens, "none")
            out = np.empty(session.features.shape, np.float32)
            model.backend.read(session.features, out)
    return out[: len(tokens)]


def state_of(session: Session, model: Model) -> dict[str, npt.NDArray[Any]]:
    """What a session remembers, by tensor name: K/V rows of committed positions as bytes, delta state and history.

    The delta state is that before the pending or last-committed rows: compare sessions at the same point of the
    protocol.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for i, layer in enumerate(session.state.layers):
        for part, tensor in layer.tensors.items():
            if part in ("k", "v"):
                out = np.empty((tensor.shape[0], tensor.dtype.nbytes(tensor.shape[1])), np.uint8)
                model.backend.read(tensor, out)
                found[f"{part}.{i}"] = out[: session.length]
            elif part in ("state", "window"):
                values = np.empty(tensor.shape, np.float32)
                model.backend.read(tensor, values)
                found[f"{part}.{i}"] = values[0][: layer.spec.conv_kernel - 1] if part == "window" else values[0]
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def dequantised(source: Path, path: Path, flags: dict[str, bool] | None = None) -> Path:
    """Write the model in ``source`` to ``path`` with every tensor as f32, metadata unchanged but for new ``flags``."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for key, value in (flags or {}).items():
        writer.add_bool(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
