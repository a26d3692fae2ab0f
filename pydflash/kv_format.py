"""The formats in which K and V are stored: tensor types, and the bases into which heads are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydflash.errors import ConfigError
from pydflash.ggml_types import GGMLType

__all__ = ["CACHE_TYPES", "K_BASES", "V_BASES", "Basis", "k_basis", "v_basis"]

CACHE_TYPES = {t.name.lower(): t for t in (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0)}
"""Types of a K or V cache, by the names that settings use."""


@dataclass(frozen=True)
class Basis:
    """An orthonormal rotation of every head. Q is rotated like K, so scores do not change; the output of attention is
    rotated back from V's basis. What changes is the quantisation error."""

    name: str
    group: int = 0
    signed: bool = False


K_BASES = {
    basis.name: basis
    for basis in (
        Basis("none"),
        Basis("hadamard-256", 256),
        Basis("hadamard-128", 128),
        Basis("hadamard-64", 64),
        Basis("signed-128", 128, signed=True),
    )
}
"""The bases of K by name. 'hadamard-256' is llama.cpp's for heads of 256."""

V_BASES = {name: basis for name, basis in K_BASES.items() if not basis.signed}
"""The bases of V by name: those that undo themselves. 'hadamard-64' is llama.cpp's."""


def k_basis(k_type: GGMLType, head_size: int, requested: str = "auto") -> Basis:
    """The basis in which a K cache is stored.

    'auto' rotates the types that pack blocks, which lose to outlier channels (docs/kv-cache.md), by the largest group
    that divides the head, and no float type. Raises ConfigError for an unknown name or a group that does not divide
    ``head_size``.
    """
    if requested == "auto":
        group = next((g for g in (256, 128, 64) if head_size % g == 0), 0)
        requested = f"hadamard-{group}" if group and k_type.block_size > 1 else "none"
    return _named("k_rotation", requested, K_BASES, head_size, ("auto",))


def v_basis(head_size: int, requested: str = "none") -> Basis:
    """The basis of V called ``requested``. Raises ConfigError for an unknown name or one that does not fit."""
    return _named("v_rotation", requested, V_BASES, head_size)


def _named(
    setting: str, requested: str, bases: Mapping[str, Basis], head_size: int, also: tuple[str, ...] = ()
) -> Basis:
    if requested not in bases:
        raise ConfigError(f"{setting} is {requested!r}; valid values are {', '.join((*also, *bases))}")
    basis = bases[requested]
    if basis.group and head_size % basis.group:
        fitting = [*also, *(b.name for b in bases.values() if not b.group or head_size % b.group == 0)]
        raise ConfigError(
            f"{setting} {requested!r} does not divide heads of {head_size}; valid values are {', '.join(fitting)}"
        )
    return basis
