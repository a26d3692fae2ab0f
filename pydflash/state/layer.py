"""What one layer remembers of a sequence: declared by the layer, as a value; kept on a device, as a state.

A step writes the rows it is given and leaves them pending; how many of them become part of the sequence is told by the
next step's inputs. A state knows how to follow that: K/V rows beyond the committed length are never seen and are
overwritten, a delta-net layer replays the rows that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from pydflash.ggml_types import GGMLType
from pydflash.native import Graph, Shape, Tensor

__all__ = ["Batch", "Extent", "LayerSpec", "LayerState", "Layout", "Part", "Room"]

Layout: TypeAlias = "dict[str, tuple[Shape, str]]"
"""Arrays by name: shape and dtype, 'F32' or 'U8' (rows of packed bytes)."""


@dataclass
class Batch:
    """The rows of a step, as the tensors of one graph: T rows of S sequences, of which some may be padding.

    positions (T,) int32: absolute positions, -1 for padding. rows (T,) int32: cache rows to write. counts (S, 2) int32:
    rows to replay, real rows of each sequence. state_slots (S,) int32: which of a delta-net layer's states is whose.
    keep: the rows stay pending until a commit.

    Where tables are paged: pages (slots, N) int32, the page table of each slot; sequences (T,) int32, each row's slot.
    Elsewhere span: cache rows that this graph's attention spans; mask: (T, span) f16 for steps wider than 16 rows.
    """

    graph: Graph
    positions: Tensor
    rows: Tensor
    counts: Tensor
    state_slots: Tensor
    keep: bool
    pages: Tensor | None = None
    sequences: Tensor | None = None
    span: int = 0
    mask: Tensor | None = None


class Room(NamedTuple):
    """What a session, or a pool of them, gives its layers. ``positions``: those that a cache must hold, of all
    sequences. ``fused``: take Q, K and V to attention in one kernel each. ``slots``: sequences that have a state."""

    positions: int
    fused: bool
    slots: int = 1


class Extent(NamedTuple):
    """Bytes that lie together in a tensor."""

    offset: int
    size: int


class Part(NamedTuple):
    """A tensor of a state. ``what``: what it is part of, for people. ``cleared``: it has a slot for each sequence,
    which is zero before the first row."""

    shape: Shape
    dtype: GGMLType
    what: str
    cleared: bool = False


class LayerSpec(Protocol):
    """A layer's declaration: a frozen dataclass of everything that decides what the bytes of its state mean."""

    def layout(self, length: int, replay: int) -> Layout:
        """The arrays that a snapshot keeps of ``length`` positions, of which the last ``replay`` are to be replayed.

        Each holds bytes of the state's tensor of that name, those that its ``extents`` say.
        """

    def state(self, room: Room) -> LayerState:
        """A state, yet without memory. Raises ConfigError where the declaration cannot be kept."""


class LayerState(Protocol):
    """A layer's memory. ``tensors`` is set when it has some; the layer's forward pass reads and writes them."""

    tensors: Mapping[str, Tensor]

    def parts(self) -> Mapping[str, Part]:
        """What to allocate, by name."""

    def fill(self, write: Any) -> None:
        """Write what never changes, with ``write(tensor, array)``."""

    def extents(self, name: str, size: int, length: int, slot: int, pages: Sequence[int]) -> list[Extent]:
        """Where the ``size`` bytes of the array ``name`` of a layout lie, in their order, for ``length`` positions of
        the sequence in ``slot`` with these ``pages``."""
