"""How configurations read the metadata of their architecture: each value typed, in range, the same for every layer."""

from __future__ import annotations

from collections.abc import Sequence

from pydflash.errors import BadMetadata
from pydflash.files import GGUFFile

__all__ = ["Keys"]

_LIMIT = 1 << 20  # no count or size in a real file comes near; products of two stay far below 2^63


class Keys:
    """The metadata ``<architecture>.<key>`` of a file."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, f"{architecture}."

    def number(self, key: str, at_least: int = 1, *, default: int | None = None) -> int:
        """A count or a size; BadMetadata when it is missing, without a ``default``, or out of range.

        Files may list it, an entry for each layer; all must be equal then.
        """
        if self.is_listed(key):
            return self._common(key, self.listed(key), at_least)
        return self.file.require_within(self.prefix + key, at_least, _LIMIT, default=default)

    def number_of(self, layers: Sequence[int], key: str) -> int:
        """:meth:`number` where a list counts at ``layers`` only: Ollama gives layers without attention no heads."""
        if not self.is_listed(key) or not layers:
            return self.number(key)
        listed = self.listed(key)
        if len(listed) <= layers[-1]:
            raise BadMetadata(f"{self.file.path}: {self.prefix}{key} lists {len(listed)} of {layers[-1] + 1} layers")
        return self._common(key, [listed[layer] for layer in layers], 1)

    def real(self, key: str) -> float:
        return float(self.file.require(self.prefix + key, float))

    def is_listed(self, key: str) -> bool:
        """Whether the file gives ``key`` as a list."""
        return self.file.metadata.count(self.prefix + key) is not None

    def listed(self, key: str) -> list[int]:
        """The list ``key``, which has an entry for each layer; BadMetadata for more entries than tensors."""
        return self.file.integers(self.prefix + key, at_most=len(self.file.tensors))

    def _common(self, key: str, values: Sequence[int], at_least: int) -> int:
        """The one value of a list."""
        found = sorted(set(values))
        if len(found) != 1 or not at_least <= found[0] <= _LIMIT:
            raise BadMetadata(
                f"{self.file.path}: {self.prefix}{key} lists {found[:8]}; "
                f"one value for all layers is supported, {at_least}..{_LIMIT}"
            )
        return found[0]

    def check_sections(self, pairs: int, *, interleaved: bool) -> None:
        """BadMetadata unless ``rope.dimension_sections`` turns each of the ``pairs`` by a token's position.

        Text has one position for time, height and width, and none for the fourth section. ``interleaved``: the first
        three take turns, pair by pair, instead of following one another.
        """
        key = f"{self.prefix}rope.dimension_sections"
        if key not in self.file.metadata:
            return
        sections = self.file.integers(key, at_most=4)
        total = sum(sections)
        turned = len(sections) in (3, 4) and min(sections) >= 0 and 0 < total <= pairs
        if turned and interleaved:  # pair i belongs to section i % 3 while that has pairs left, then to the fourth
            turned = all(pair < 3 * sections[pair % 3] for pair in range(total))
        elif turned:
            turned = sum(sections[:3]) == total
        if not turned:
            raise BadMetadata(f"{self.file.path}: {key} is {sections}, which does not turn {pairs} pairs by positions")
