"""The last minutes, in bounded memory: slots of time, and counts in logarithmic buckets. Pure.

    Sliding        |  slot  |  slot  | ... |  slot  |      the oldest leaves when time goes on
    LogHistogram   0 1 2 .. 15 | 16-17 | 18-19 | .. | 32-35 | ..     8 buckets a doubling

A window is cut at slots: it covers between `num_slots - 1` and `num_slots` of them. A quantile is
known to one bucket, 1/8 of its value at worst. Nothing stores samples: a histogram of all 63-bit
numbers has at most 488 buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Slot = TypeVar("Slot")


class Sliding(Generic[Slot]):
    """What was counted lately, each slot of time by itself."""

    def __init__(self, make: Callable[[], Slot], slot_s: float, num_slots: int) -> None:
        """`make`: an empty slot."""
        self._make = make
        self._slot_s = slot_s
        self._num_slots = num_slots
        self._slots: dict[int, Slot] = {}  # by number, oldest first
        self._first_at: float | None = None
        self._number = -1  # of the newest slot
        self._newest = make()

    def at(self, now: float) -> Slot:
        """The slot to count in at `now`, in seconds of a clock that never goes back. O(1)."""
        number = int(now / self._slot_s)
        if number > self._number:
            if self._first_at is None:
                self._first_at = now
            self._number, self._newest = number, self._make()
            self._slots[number] = self._newest
            for old in [n for n in self._slots if n <= number - self._num_slots]:
                del self._slots[old]
        return self._newest

    def recent(self, now: float, num_slots: int | None = None) -> list[Slot]:
        """The slots of the window that ends at `now`, or of its last `num_slots`.

        Those in which nothing was counted lack.
        """
        oldest = self._oldest(now, num_slots)
        return [slot for number, slot in self._slots.items() if number >= oldest]

    def span_s(self, now: float, num_slots: int | None = None) -> float:
        """How much time `recent` covers: at least a slot, so that no rate is blown up."""
        if self._first_at is None:
            return self._slot_s
        start = max(self._oldest(now, num_slots) * self._slot_s, self._first_at)
        return max(self._slot_s, now - start)

    def _oldest(self, now: float, num_slots: int | None) -> int:
        return int(now / self._slot_s) - (num_slots or self._num_slots) + 1


class LogHistogram:
    """Weights by size of a non-negative integer."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}  # by bucket

    def add(self, value: int, weight: float = 1.0) -> None:
        """Count `value`. O(1)."""
        bucket = value
        if value > 15:  # the four leading bits, and how many follow
            shift = value.bit_length() - 4
            bucket = (shift << 3) + (value >> shift)
        self._weights[bucket] = self._weights.get(bucket, 0.0) + weight

    def merge(self, other: LogHistogram) -> None:
        """Count what `other` has counted. O(buckets)."""
        for bucket, weight in other._weights.items():
            self._weights[bucket] = self._weights.get(bucket, 0.0) + weight

    @property
    def total(self) -> float:
        """All weights together."""
        return sum(self._weights.values())

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the weight does not exceed, None if nothing was counted.

        Interpolated inside its bucket. O(buckets log buckets).
        """
        left = share * self.total
        end = None
        for bucket in sorted(self._weights):
            weight = self._weights[bucket]
            start, end = _floor(bucket), float(_floor(bucket + 1))
            if left <= weight:
                return start + (end - start) * left / weight
            left -= weight
        return end

    def above(self, limit: float) -> float:
        """Weight of values larger than `limit`, interpolated in the bucket that holds it."""
        weight_above = 0.0
        for bucket, weight in self._weights.items():
            start, end = _floor(bucket), _floor(bucket + 1)
            share = (end - 1 - limit) / (end - start)  # of its whole numbers start..end-1
            weight_above += weight * min(1.0, max(0.0, share))
        return weight_above


def _floor(bucket: int) -> int:
    """The least value of a bucket."""
    if bucket < 16:
        return bucket
    shift = (bucket >> 3) - 1
    return (bucket - (shift << 3)) << shift
