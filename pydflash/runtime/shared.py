"""What the sessions of a pool have in common: settings, the memory of their sequences, graphs and captured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pydflash.arguments import an_integer, an_iterable, shown
from pydflash.config import SessionConfig
from pydflash.errors import ConfigError, SessionClosed
from pydflash.kv_format import CACHE_TYPES, k_basis, v_basis
from pydflash.limits import MOST_POSITIONS, PAGE
from pydflash.models import Model
from pydflash.native import DeviceLock, closing
from pydflash.runtime.features import Features
from pydflash.runtime.runner import Runner
from pydflash.state import CacheFormat, Room, SequencePool, bytes_of, check_pair, pages_for

__all__ = ["MOST_SEQUENCES", "Shared", "Size", "size_for"]

MOST_SEQUENCES = 16
"""Sequences of a pool where the program does not say how many."""


class Shared:
    """Memory for some sequences and the graphs that extend them. A session alone has one of its own.

    ``settings``: those of every session; its ``max_context`` is the longest. ``closed``: no session here can go on.
    ``paged``: attention finds K and V through tables of pages, in steps of any width.
    """

    def __init__(
        self, model: Model, settings: SessionConfig, capture: Sequence[int], *, slots: int = 1,
        pages: int | None = None, paged: bool = False,
    ) -> None:  # fmt: skip
        """``pages``: of all sequences, by default those of one. Raises ConfigError, OutOfMemory, DeviceError."""
        config, backend = model.config, model.backend
        self.model, self.settings, self.closed = model, settings, False
        self.capture = _layers(capture, config.layers)
        self.cache_format = cache_format(model, settings)
        longest = pages_for(settings.max_context)
        self.memory = SequencePool(
            backend, model.network.remembers(self.cache_format),
            slots=slots, pages=longest if pages is None else pages, longest=longest, fused=settings.fused,
            paged=paged,
        )  # fmt: skip
        try:
            self.features = (
                Features(backend, len(self.capture), config.hidden, settings.chunk, slots) if self.capture else None
            )
        except BaseException:
            self.memory.close()
            raise
        self.runner = Runner(model, self.memory, self.capture, self.features)

    @property
    def lock(self) -> DeviceLock:
        return self.model.backend.lock

    def check_open(self) -> None:
        """SessionClosed when the memory or the model is gone."""
        if self.closed:
            raise SessionClosed("the pool of this session was closed; open a new one")
        if self.model.weights.closed:
            raise SessionClosed("the model of this session was closed; load it again and open a new session")

    def sizes(self) -> Mapping[str, int]:
        """Bytes on the device, by what they are for."""
        features = {} if self.features is None else {"captured features": self.features.nbytes}
        return {**self.memory.sizes(), **features}

    @closing
    def close(self) -> None:
        """Free memory and graphs, after the step that runs. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self.runner.close()
            self.memory.close()
            if self.features is not None:
                self.features.close()


def _layers(capture: Iterable[int], layers: int) -> tuple[int, ...]:
    """The layers that ``capture`` names, of ``layers``."""
    named = tuple(an_iterable(capture, "capture"))
    if not all(isinstance(layer, int | np.integer) and 0 <= layer < layers for layer in named):
        raise ConfigError(f"capture is {shown(capture)}; the model has layers 0..{layers - 1}")
    return tuple(map(int, named))


def cache_format(model: Model, settings: SessionConfig) -> CacheFormat:
    """How K and V are kept. ConfigError for what does not suit the device or the model's heads."""
    k_type, v_type = CACHE_TYPES[settings.cache_k], CACHE_TYPES[settings.cache_v]
    check_pair(k_type, v_type, model.backend.traits.cache_types)
    head = model.config.head_size
    return CacheFormat(
        settings.cache_k,
        settings.cache_v,
        k_basis(k_type, head, settings.k_rotation).name,
        v_basis(head, settings.v_rotation).name,
    )


class Size(NamedTuple):
    """How many sequences a pool has, and pages of their K/V."""

    sequences: int
    pages: int


def size_for(model: Model, settings: SessionConfig, sequences: int | None, tokens: int | None) -> Size:
    """What is asked for; where nothing is said, what a quarter of the free memory holds, but for one sequence at least.

    Raises ConfigError for what cannot be asked for.
    """
    _check_range("max_sequences", sequences, 1, MOST_POSITIONS)
    _check_range("cache_tokens", tokens, 1, MOST_POSITIONS * MOST_SEQUENCES)
    longest = pages_for(settings.max_context)
    specs = model.network.remembers(cache_format(model, settings))
    least, one_page, one_slot = (
        bytes_of(specs, Room(pages * PAGE, settings.fused, slots)) for pages, slots in ((1, 1), (2, 1), (1, 2))
    )
    page, slot = one_page - least, one_slot - least
    free = model.backend.memory()[0] // 4
    if sequences is None:
        pages = longest if tokens is None else 0
        fitting = (free - (0 if tokens is None else pages_for(tokens) * page)) // max(slot + pages * page, 1)
        sequences = max(1, min(fitting, MOST_SEQUENCES)) if model.backend.traits.paged else 1
    most = sequences * longest
    if tokens is None:
        fitting = (free - sequences * slot) // page if page else most
        return Size(sequences, max(longest, min(fitting, most)))
    return Size(sequences, min(pages_for(tokens), most))


def _check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None:
        an_integer(value, name, least, most)
