"""What every architecture offers: a configuration read from a file, and a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from pydflash.files import GGUFFile
from pydflash.models.weights import Linear
from pydflash.native import Shape, Tensor
from pydflash.state import Batch, CacheFormat, LayerSpec, LayerState

__all__ = ["Architecture", "ModelConfig", "Network"]


class ModelConfig(Protocol):
    """What the engine needs to know of any model. ``context``: positions it was trained for, 0 if the file is silent.
    ``attention_layers``: those with a K/V cache."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def attention_layers(self) -> Sequence[int]: ...
    def tensors(self) -> Mapping[str, Shape]:
        """Every tensor that the forward pass reads: GGUF name to row-major shape."""


class Network(Protocol):
    """A forward pass. It holds weights only; everything that changes is handed in."""

    @property
    def token_embd(self) -> Tensor:
        """(vocab, hidden), which a draft reads as well."""

    @property
    def output(self) -> Linear:
        """The head without its norm, which a draft uses as well."""

    def remembers(self, cache: CacheFormat) -> tuple[LayerSpec, ...]:
        """What each layer keeps of a sequence."""

    def forward(
        self, tokens: Tensor, batch: Batch, states: Sequence[LayerState], capture: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """(T,) int32 to the residual stream after the last layer, (T, hidden), and after each layer in ``capture``."""

    def head(self, x: Tensor) -> Tensor:
        """(T, hidden) residual stream to (T, vocab) logits."""


class Architecture(NamedTuple):
    """How a file of one ``general.architecture`` becomes a model."""

    read: Callable[[GGUFFile], ModelConfig]
    network: Callable[..., Network]
    """(configuration, Weights) to the forward pass."""
