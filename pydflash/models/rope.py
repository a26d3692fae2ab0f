"""The rotary embedding that a file asks for: its base and dimensions, and the scaling that stretches its context.

Sources: linear scaling, Chen et al. 2023 (arXiv:2306.15595); YaRN, Peng et al. 2023 (arXiv:2309.00071). Where the
metadata leave a choice, it is llama.cpp's: a factor without a type is that of linear scaling, and YaRN's original
context is ``context_length`` if nothing else is said.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np

from pydflash.errors import BadMetadata
from pydflash.files import GGUFFile
from pydflash.limits import MOST_POSITIONS
from pydflash.ops import Rope

__all__ = ["read_rope"]

_TYPES = ("none", "linear", "yarn")
_ONLY = {"scaling.alpha": (0.0,), "scaling.yarn_log_multiplier": (0.0,), "scaling.yarn_ext_factor": (1.0, -1.0)}
"""Values that change nothing, of keys whose other values belong to models that do not exist here."""


def read_rope(file: GGUFFile, prefix: str, dims: int, head_size: int) -> Rope:
    """From the metadata ``<prefix>rope.*``, for the first ``dims`` of the ``head_size`` values of a head.

    Raises BadMetadata, also for a scaling that is not supported.
    """
    keys = _RopeKeys(file, prefix)
    if dims > head_size or dims % 2:
        keys.refuse("dimension_count", f"{dims} for heads of {head_size}")
    for key, neutral in _ONLY.items():
        if (value := keys.real(key, neutral[0], -math.inf)) not in neutral:
            keys.refuse(key, f"{value:g}; only {neutral[0]:g} is supported")
    base = keys.real("freq_base", None, 1.0, 1e12)
    kind = file.get(f"{prefix}rope.scaling.type", str, default="linear")
    if kind not in _TYPES:
        keys.refuse("scaling.type", f"{kind!r}; supported are {', '.join(map(repr, _TYPES))}")
    magnitude = keys.real("scaling.attn_factor", 1.0, 1e-3, 1e3)
    if kind == "none":
        return Rope(dims, base, magnitude=magnitude)
    if kind == "linear":
        factor = keys.real("scaling.factor", keys.real("scale_linear", 1.0, 1.0, 1e6), 1.0, 1e6)
        return Rope(dims, base, factor, magnitude=magnitude)
    return _yarn(keys, dims, base, magnitude)


def _yarn(keys: _RopeKeys, dims: int, base: float, magnitude: float) -> Rope:
    """YaRN mixes by how often a pair turns in the original context: ``yarn_beta_fast`` times and more is kept as it is,
    ``yarn_beta_slow`` times and less is slowed down by the whole factor."""
    factor = keys.real("scaling.factor", None, 1.0, 1e6)
    fast = keys.real("scaling.yarn_beta_fast", 32.0, 1e-3, 1e6)
    slow = keys.real("scaling.yarn_beta_slow", 1.0, 1e-3, fast)
    if base == 1:
        keys.refuse("freq_base", "1, with which all pairs turn alike; YaRN needs more")

    def pair(turns: float) -> float:
        """Which pair, counted in fractions, turns so often."""
        return dims * math.log(keys.original_context() / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = min(max(math.floor(pair(fast)), 0), dims // 2)
    high = max(min(math.ceil(pair(slow)), dims - 1), low + 1)
    # The paper's temperature, sqrt(1/t); a file's own value replaces it, as in Hugging Face's attention_factor.
    magnitude *= keys.real("scaling.yarn_attn_factor", 0.1 * math.log(factor) + 1, 1e-3, 1e3)
    # In float32, as the kernels have it: a logarithm's last bit must not tell the snapshots of two machines apart.
    return Rope(dims, base, factor, low, high, float(np.float32(magnitude)))


class _RopeKeys:
    """The metadata ``<prefix>rope.<key>`` of a file."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self.prefix = file, prefix

    def real(self, key: str, default: float | None, low: float, high: float = math.inf) -> float:
        """A number; BadMetadata when it is missing, without a ``default``, or out of range."""
        name = f"{self.prefix}rope.{key}"
        value = float(self.file.require(name, float) if default is None else self.file.get(name, float, default))
        if not low <= value <= high:
            self.refuse(key, f"{value:g}; it must lie in {low:g}..{high:g}")
        return value

    def original_context(self) -> int:
        """Positions that the model was trained for before its context was stretched."""
        trained = int(self.file.get(f"{self.prefix}context_length", int, default=0))
        key = f"{self.prefix}rope.scaling.original_context_length"
        return self.file.require_within(key, 1, MOST_POSITIONS, default=trained or None)

    def refuse(self, key: str, found: str) -> NoReturn:
        raise BadMetadata(f"{self.file.path}: {self.prefix}rope.{key}: {found}")
