"""Models: what a file becomes when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pydflash.arguments import a_function
from pydflash.errors import BadMetadata, UnsupportedArchitecture
from pydflash.files import GGUFFile
from pydflash.models import qwen35, qwen35moe
from pydflash.models.accounting import account
from pydflash.models.base import Architecture, ModelConfig, Network
from pydflash.models.weights import Progress, Weights, find_tensors
from pydflash.native import Backend, DeviceLock, closing
from pydflash.text import Tokenizer

__all__ = ["ARCHITECTURES", "Model", "load_model"]

ARCHITECTURES = {
    "qwen35": Architecture(qwen35.Config.read, qwen35.Qwen35),
    "qwen35moe": Architecture(qwen35moe.Config.read, qwen35moe.Qwen35MoE),
}
"""By a file's ``general.architecture``."""


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises UnsupportedArchitecture."""
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise UnsupportedArchitecture(f"{file.path}: architecture {name!r}; this package runs {known}")
    return ARCHITECTURES[name]


class Model:
    """A loaded target: immutable weights on one device, shared by any number of sessions.

    ``config`` holds the hyperparameters, ``tokenizer`` the vocabulary, ``file`` the GGUF file with its metadata,
    ``backend`` the device, ``ignored`` the names in the file that were to stay unused. ``close()`` (or ``with``) frees
    everything; close the model's sessions first.
    """

    def __init__(
        self,
        file: GGUFFile,
        backend: Backend,
        config: ModelConfig,
        tokenizer: Tokenizer,
        weights: Weights,
        network: Network,
        ignored: tuple[str, ...],
    ) -> None:
        self.file, self.backend, self.config, self.weights, self.network = file, backend, config, weights, network
        self.tokenizer, self.ignored = tokenizer, ignored
        self.path = file.path

    @cached_property
    def digest(self) -> str:
        """:meth:`GGUFFile.fingerprint_digest` of the file: how a snapshot identifies the model."""
        return self.file.fingerprint_digest()

    @property
    def lock(self) -> DeviceLock:
        return self.backend.lock

    @closing
    def close(self) -> None:
        """Free the weights and the device, after the step that runs. Safe to call twice."""
        self.weights.close()
        self.backend.close()
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load_model(
    path: str | Path,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    threads: int | None = None,
    ignore: str | Sequence[str] = (),
) -> Model:
    """Load a GGUF file of one of ``ARCHITECTURES`` (the first part of a split one loads all).

    ``device``: 'auto', 'cpu', 'cuda' or 'cuda:N'. ``progress(bytes_done, bytes_total)`` is called while weights are
    read. ``threads`` is for the CPU. ``ignore``: patterns, such as "blk.*.attn_sinks.weight", of tensors and metadata
    keys that may stay unused; UnsupportedModel for others. Raises ConfigError, also for a pattern that matches nothing,
    LoadError, NoDevice or OutOfMemory; nothing stays allocated then.
    """
    a_function(progress, "progress")
    file = GGUFFile.open(path)
    try:
        architecture = architecture_of(file)
        config = architecture.read(file)
        infos = find_tensors(file, config.tensors())
        used = {info.name for info in infos.values()}
        ignored = account(file, file.require("general.architecture", str), used, config.layers, ignore)
        tokenizer = _read_tokenizer(file, config.vocab)
        backend = Backend(device, threads)
        try:
            weights = Weights(file, infos, backend, progress)
            return Model(file, backend, config, tokenizer, weights, architecture.network(config, weights), ignored)
        except BaseException:
            backend.close()
            raise
    except BaseException:
        file.close()
        raise


def _read_tokenizer(file: GGUFFile, rows: int) -> Tokenizer:
    """The file's tokenizer. BadMetadata unless each token has one of the ``rows`` of the embedding, and none is left
    over: a token without text could be generated."""
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    except BadMetadata as error:
        raise BadMetadata(f"{file.path}: {error}") from error
    if tokenizer.vocab_size != rows:
        raise BadMetadata(
            f"{file.path}: tokenizer.ggml.tokens holds {tokenizer.vocab_size:,} tokens and token_embd.weight "
            f"{rows:,} rows; convert the model again"
        )
    return tokenizer
