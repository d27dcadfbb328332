"""A ring of names: which of them a key belongs to, and who comes next. Pure.

Each name has VIRTUAL_NODES points on a circle of 64 bits; a key belongs to the first point at or
after it. When a name comes or goes, only the keys next to its points move (Karger et al. 1997).

Names are added when they are first seen and stay while their replicas do: one that is down for a
while gets its own keys back. So does one that was removed and comes back under its name.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from collections.abc import Collection

#: KubeAI's number; the shares of 8 names differ by some 6 % then.
VIRTUAL_NODES = 256


class HashRing:
    """Names in an order that each key decides."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._points: list[tuple[int, str]] = []

    def order(self, names: Collection[str], key: int) -> list[str]:
        """All of `names`: the owner of `key` (64 bits), then whoever comes next on the circle.

        O(points walked); sorts all points where a name is new.
        """
        self._add(names)
        found: dict[str, None] = {}
        num, start = len(self._points), bisect_left(self._points, (key, ""))
        for place in range(start, start + num):
            name = self._points[place % num][1]
            if name in names and name not in found:
                found[name] = None
                if len(found) == len(names):
                    break
        return list(found)

    def retain(self, names: Collection[str]) -> None:
        """Keep only those of `names`. O(points)."""
        if not self._names.issubset(names):
            self._names.intersection_update(names)
            self._points = [point for point in self._points if point[1] in self._names]

    def _add(self, names: Collection[str]) -> None:
        new = [name for name in names if name not in self._names]
        for name in new:
            self._names.add(name)
            for number in range(VIRTUAL_NODES):
                self._points.append((xxh3_64_intdigest(f"{name}{number}".encode()), name))
        if new:
            self._points.sort()
