"""Everything that a model's layers remember of one sequence or several, on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pydflash.native import Arena, Backend, Tensor
from pydflash.state.layer import LayerSpec, LayerState, Room

__all__ = ["SequenceState"]

State = TypeVar("State", bound=LayerState, covariant=True)


class SequenceState(Generic[State]):
    """The states of all layers, in ``layers``, a list parallel to those of the model. ``close()`` frees them."""

    def __init__(self, backend: Backend, specs: Sequence[LayerSpec], room: Room) -> None:
        """Raises ConfigError, OutOfMemory."""
        self._backend, self.specs = backend, tuple(specs)
        self.layers: list[State] = [spec.state(room) for spec in specs]  # type: ignore[misc]
        parts = {f"{name}.{i}": part for i, state in enumerate(self.layers) for name, part in state.parts().items()}
        self._arenas: dict[str, Arena] = {}
        try:
            for what in dict.fromkeys(part.what for part in parts.values()):
                own = {name: (part.shape, part.dtype) for name, part in parts.items() if part.what == what}
                self._arenas[what] = Arena(backend, own, f"the {what}, for {room.positions:,} positions")
        except BaseException:
            self.close()
            raise
        self._slots, self._cleared = room.slots, [(part.what, name) for name, part in parts.items() if part.cleared]
        for i, state in enumerate(self.layers):
            state.tensors = {name: self._arenas[part.what][f"{name}.{i}"] for name, part in state.parts().items()}
            state.fill(backend.write)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``part.layer``, as layouts name it."""
        part, _, layer = name.partition(".")
        return self.layers[int(layer)].tensors[part]

    def sizes(self) -> dict[str, int]:
        """Bytes on the device, by what they are for."""
        return {what: arena.nbytes for what, arena in self._arenas.items()}

    def pieces(
        self, arrays: Mapping[str, npt.NDArray[Any]], length: int, slot: int = 0, pages: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, int, npt.NDArray[np.uint8]]]:
        """Where ``arrays``, of a layout of ``length`` positions, lie for the sequence in ``slot`` with these ``pages``:
        a tensor, a byte offset, and the part of an array, as bytes."""
        for name, values in arrays.items():
            part, _, layer = name.partition(".")
            left = values.reshape(-1).view(np.uint8)
            for offset, size in self.layers[int(layer)].extents(part, values.nbytes, length, slot, pages):
                yield self.tensor(name), offset, left[:size]
                left = left[size:]

    def clear(self, slot: int = 0) -> None:
        """Forget the sequence in ``slot``."""
        if self._slots == 1:  # at once, instead of layer by layer
            for what in {what for what, _ in self._cleared}:
                self._arenas[what].clear()
            return
        for what, name in self._cleared:
            tensor = self._arenas[what][name]
            size = tensor.nbytes // self._slots
            self._backend.clear(tensor, slot * size, size)

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        for arena in self._arenas.values():
            arena.close()
