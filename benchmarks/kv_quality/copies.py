"""Copies of a model that are the same function: with f32 weights, and with outlier channels in K.

    python -m benchmarks.kv_quality.copies MODEL.gguf OUT.gguf --f32 --outliers 12x16

'12x16' scales 12 channels of every K head by 16 and the same channels of Q by 1/16, through the weights of the q and k
norms. Scores are sums of the same products, so the function does not change, but a block-quantised K cache now has a
few large channels among small ones, as in many large models. RoPE turns channels i and i + dims/2 into each other, so
such a pair gets one factor. A power of two changes no rounding in f32.

f32 weights take the rounding of activations out of the products, which otherwise hides small effects of a cache.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pydflash import ops
from pydflash.errors import ConfigError
from pydflash.files import GGUFFile, TensorSource, check_output, replacing, write_gguf
from pydflash.ggml_types import GGMLType
from pydflash.models.qwen35 import Config
from pydflash.native import Arena, Backend, Graph

__all__ = ["Outliers", "copy_model", "inject", "write_f32"]


@dataclass(frozen=True)
class Outliers:
    """``count`` channels of each K head, scaled by ``factor``; which ones depends on the layer and ``seed``."""

    count: int
    factor: float
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Outliers:
        """'12x16': 12 channels, 16 times as large. Raises ConfigError for anything else."""
        match = re.fullmatch(r"(\d{1,3})x(\d{1,6}(?:\.\d+)?)", text)
        if match is None or int(match[1]) < 1 or float(match[2]) <= 0:
            raise ConfigError(f"outliers {text!r} are not CHANNELSxFACTOR such as 12x16")
        return cls(int(match[1]), float(match[2]))

    def channels(self, layer: int, head_size: int, rope_dims: int) -> npt.NDArray[np.int64]:
        """The channels of ``layer``, sorted: strewn evenly over the head, those that RoPE turns in whole pairs.

        Raises ConfigError when the head has too few of either kind.
        """
        pairs = round(self.count * rope_dims / head_size / 2)
        alone = self.count - 2 * pairs
        if pairs > rope_dims // 2 or not 0 <= alone <= head_size - rope_dims:
            raise ConfigError(f"{self.count} outlier channels do not fit heads of {head_size}, {rope_dims} with RoPE")
        rng = np.random.default_rng([self.seed, layer])
        first = _strewn(rng, 0, rope_dims // 2, pairs)
        return np.sort(np.concatenate([first, first + rope_dims // 2, _strewn(rng, rope_dims, head_size, alone)]))


def _strewn(rng: np.random.Generator, low: int, high: int, count: int) -> npt.NDArray[np.int64]:
    """One number from each of ``count`` equal parts of low..high - 1."""
    bounds = low + np.arange(count + 1) * (high - low) // max(count, 1)
    return rng.integers(bounds[:-1], bounds[1:])


def inject(source: Path, target: Path, outliers: Outliers) -> None:
    """Copy the qwen35 model ``source`` to ``target`` with outlier channels in every attention layer.

    Only norm weights differ. Raises ConfigError for a split model, LoadError for a file that is not such a model, and
    WriteError if ``target`` cannot be written or is ``source``.
    """
    with GGUFFile.open(source) as file:
        _require_one_part(file)
        config = Config.read(file)
        with _copying(source, target) as copy:
            for layer in config.attention_layers:
                channels = outliers.channels(layer, config.head_size, config.rope.dims)
                for norm, factor in (("q", 1 / outliers.factor), ("k", outliers.factor)):
                    name = f"blk.{layer}.attn_{norm}_norm.weight"
                    weight = file.data(name).view(np.float32).copy()
                    weight[channels] *= np.float32(factor)
                    copy.seek(file.tensors[name].offset)
                    copy.write(weight.tobytes())


@contextmanager
def _copying(source: Path, target: Path) -> Iterator[BinaryIO]:
    """A copy of ``source``, open for changes, that takes the place of ``target`` when the block ends."""
    with replacing(target, [source]) as copy, source.open("rb") as original:
        shutil.copyfileobj(original, copy, 16 << 20)
        yield copy


def write_f32(source: Path, target: Path) -> None:
    """Copy the model ``source`` to ``target`` with every tensor as f32. Raises ConfigError for a split model."""
    with GGUFFile.open(source) as file, Backend("cpu", 1) as backend:
        _require_one_part(file)
        tensors = [
            TensorSource(name, info.shape, GGMLType.F32, partial(_as_f32, file, name, backend))
            for name, info in file.tensors.items()
        ]
        write_gguf(target, file.metadata, tensors, file.paths)


def _as_f32(file: GGUFFile, name: str, backend: Backend) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's values as ggml reads them, in the form of ``TensorSource.chunks``."""
    info = file.tensors[name]
    if info.type == GGMLType.F32:
        yield file.data(name)
        return
    rows = info.shape[0]
    arena, graph = Arena(backend, {name: (info.shape, info.type)}, name), Graph(backend, 16)
    try:
        every = graph.input((rows,), GGMLType.I32)
        values = graph.output(ops.get_rows(arena[name].within(graph), every))
        graph.finish()
        backend.write(arena[name], file.data(name))
        backend.write(every, np.arange(rows, dtype=np.int32))
        graph.run()
        out = np.empty(info.shape, np.float32)
        backend.read(values, out)
    finally:
        graph.close()
        arena.close()
    yield out.reshape(-1).view(np.uint8)


def _require_one_part(file: GGUFFile) -> None:
    if len(file.paths) > 1:
        raise ConfigError(f"{file.path}: is one of {len(file.paths)} parts; merge them into one file first")


def copy_model(source: Path, target: Path, *, f32: bool, outliers: Outliers | None) -> None:
    """Copy ``source`` to ``target``, with f32 weights if ``f32`` and with ``outliers`` unless None."""
    check_output(target, [source])
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if f32:
            plain = Path(folder) / "f32.gguf"
            write_f32(source, plain)
            source = plain
        if outliers is not None:
            inject(source, target, outliers)
        else:
            with _copying(source, target):
                pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_quality.copies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--f32", action="store_true", help="write every tensor as f32")
    parser.add_argument("--outliers", type=Outliers.parse, metavar="CHANNELSxFACTOR")
    options = parser.parse_args(arguments)
    copy_model(options.source, options.target, f32=options.f32, outliers=options.outliers)


if __name__ == "__main__":
    main()
