"""Host tier, the deciding half: which evicted blocks live on in host memory, and in which slot.

A block evicted from the device is offloaded to a free slot, or to that of the block that was
offloaded longest ago. A hit takes it back to the device and frees its slot, so a block lies in
one tier only: both capacities add up, and order of offload is order of last use.

A chain leaves the device tail first, so it is forgotten here tail first as well: what a slot
holds has its parent on the device or in a slot that was filled later.

Not here: copying (host_tier.py, or the native runner), the device's blocks (blocks.py).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roost_engine.prefix_cache import CachedBlock


class HostSlots:
    """Slots of host memory, each a block long. Every operation is O(1)."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: OrderedDict[int, CachedBlock] = OrderedDict()  # oldest offload first

    def __len__(self) -> int:
        return len(self._held)

    def try_reserve(self) -> tuple[int, CachedBlock | None] | None:
        """A slot to offload to, and the block that must leave it; None if all are being read."""
        if self._free:
            return self._free.pop(), None
        if self._held:
            return self._held.popitem(last=False)
        return None

    def hold(self, slot: int, cached: CachedBlock) -> None:
        """Fill a reserved slot."""
        self._held[slot] = cached

    def take(self, slot: int) -> None:
        """Let nobody overwrite this slot until it is given to `free`."""
        del self._held[slot]

    def free(self, slot: int) -> None:
        """The content of a slot that was taken is not needed any more."""
        self._free.append(slot)

    def check(self) -> None:
        """Verify that no slot is lost, and that children leave before their parents. O(slots)."""
        slots = sorted([*self._free, *self._held])
        assert slots == list(range(self.num_slots)), "a slot is lost or counted twice"
        seen: set[int] = set()
        for slot, cached in self._held.items():
            assert cached.block_id == slot, f"{cached!r} is not in slot {slot}"
            assert cached.parent is None or cached.parent.hash not in seen, (
                f"{cached!r} was offloaded after its parent"
            )
            seen.add(cached.hash)
