"""The meaning of a session's bytes (D9): every choice that changes it, to be compared and written into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydflash.errors import SnapshotMismatch
from pydflash.ops import Rope
from pydflash.state.delta import DeltaSpec
from pydflash.state.kv import KVSpec
from pydflash.state.layer import LayerSpec, Layout
from pydflash.state.rings import RingSpec

__all__ = ["FORMAT", "KINDS", "Fingerprint", "check_fingerprint"]

FORMAT = 3
"""Raised when a version of this package gives the bytes of a snapshot another meaning, or another order."""

KINDS: dict[str, type[Any]] = {
    "attention": KVSpec,
    "delta": DeltaSpec,
    "ring": RingSpec,
}
"""What a layer can remember, by the names that files use."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides what the bytes of a session, or of the draft session beside one, mean.

    ``model`` and ``draft`` are digests of the files (:meth:`GGUFFile.fingerprint_digest`); ``draft`` is empty and
    ``taps`` are none in that of a target session. ``layers``: what each layer remembers. The device does not matter,
    since all keep rows and states alike, nor do ``max_context``, ``chunk`` and ``capture``.
    """

    format: int
    model: str
    draft: str
    taps: tuple[int, ...]
    layers: tuple[LayerSpec, ...]

    @property
    def kind(self) -> str:
        return "draft session" if self.draft else "session"

    def layout(self, length: int, replay: int) -> Layout:
        """The arrays of ``length`` positions, the last ``replay`` of them to be replayed: ``part.layer`` by name."""
        return {
            f"{name}.{i}": array
            for i, layer in enumerate(self.layers)
            for name, array in layer.layout(length, replay).items()
        }

    def as_json(self) -> dict[str, Any]:
        """The fingerprint in JSON's types."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        names = {kind: name for name, kind in KINDS.items()}
        return plain | {"layers": [{"kind": names[type(layer)], **asdict(layer)} for layer in self.layers]}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Fingerprint:
        """What ``as_json`` gave. Raises ValueError, KeyError or TypeError for anything else."""
        plain = {f.name: checked(str(f.type), found[f.name]) for f in fields(cls) if f.name != "layers"}
        return cls(**plain, layers=tuple(_made(KINDS[entry["kind"]], entry) for entry in found["layers"]))


def check_fingerprint(found: Fingerprint, wanted: Fingerprint) -> None:
    """SnapshotMismatch unless a snapshot's fingerprint is the session's: the first field that differs, both values."""
    if found.kind != wanted.kind:
        raise SnapshotMismatch(f"restore: the snapshot is that of a {found.kind}, this is a {wanted.kind}")
    pairs = [(found, wanted, ("format", "model", "draft", "taps"))]
    kinds = [[type(layer).__name__ for layer in side.layers] for side in (found, wanted)]
    if kinds[0] == kinds[1]:
        pairs += [(a, b, tuple(f.name for f in fields(b))) for a, b in zip(found.layers, wanted.layers)]  # type: ignore[arg-type, misc]
    for a, b, names in pairs:
        for name in names:
            _compare(name, getattr(a, name), getattr(b, name), wanted.kind)
    _compare("the kind of each layer", kinds[0], kinds[1], wanted.kind)


def _compare(name: str, theirs: object, ours: object, kind: str) -> None:
    if theirs != ours:
        raise SnapshotMismatch(
            f"restore: {name} of the snapshot is {theirs!r}, that of this {kind} is {ours!r}; open the "
            "session as it was when the snapshot was taken, or take another one"
        )


def _made(kind: type[Any], found: Mapping[str, Any]) -> Any:
    return kind(**{f.name: checked(str(f.type), found[f.name]) for f in fields(kind)})


def checked(kind: str, value: Any) -> Any:
    """``value`` from JSON for a field declared as ``kind``; ValueError for another type or a number out of range."""
    if kind == "Rope":
        return _made(Rope, value)
    if kind.startswith("tuple["):
        if type(value) is not list:
            raise ValueError(f"{value!r:.20} is not a list")
        return tuple(checked(kind[6:].partition(",")[0], item) for item in value)
    wanted = {"int": int, "float": float, "str": str, "bool": bool}[kind]
    if type(value) is not wanted:
        raise ValueError(f"{value!r:.20} is not of type {kind}")
    if isinstance(value, int) and not 0 <= value < 1 << 31:
        raise ValueError(f"{value} is out of range")
    return value
