"""Prefix index: which replica is believed to hold how much of a prompt. Pure.

    _holders   block hash -> bitmask of holders      (one dict for the whole fleet)
    _lru       holder -> {block hash: stamp}, oldest first; `capacity` blocks after `trim`

A *holder* is one epoch of one replica: when a replica restarts, its holder is retired and it
gets a new one, so that old knowledge disappears in O(1); the retired blocks are swept later, a
few with each `add`. A *stamp* is the sequence number of the placement that touched the block
last.

Invariants
- Residency is prefix-closed: whoever holds block i of a chain holds blocks 0..i-1. `add`
  touches a chain from its tail to its head, so a parent is always younger than its children
  and the oldest block is always a tail; every removal here takes oldest blocks, or a tail
  that nobody touched since. `lookup` relies on it: holders only disappear along a chain.
- A bit is in `_holders[h]` exactly when `h` is in that holder's LRU (retired ones included).

Not here: what a block means (text_chain.py), whether the belief is right (placement.py).
"""

from collections import OrderedDict
from collections.abc import Sequence

#: Retired blocks removed with each added block: any number above 1 keeps up with restarts.
_SWEEP_PER_BLOCK = 4


class PrefixIndex:
    """Longest-prefix lookup over all replicas at once."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._lru: dict[int, OrderedDict[int, int]] = {}
        self._capacity: dict[int, int] = {}
        self._retired: dict[int, OrderedDict[int, int]] = {}

    def __len__(self) -> int:
        """Distinct blocks known, blocks of retired holders included until they are swept."""
        return len(self._holders)

    def __repr__(self) -> str:
        held = ", ".join(f"{holder}: {len(lru)}" for holder, lru in sorted(self._lru.items()))
        return f"<PrefixIndex {len(self._holders)} blocks | holders {held or 'none'}>"

    def open_holder(self, capacity_blocks: int) -> int:
        """A new, empty holder (its number is its bit). O(holders)."""
        holder = 0
        while holder in self._lru or holder in self._retired:
            holder += 1
        self._lru[holder] = OrderedDict()
        self._capacity[holder] = max(1, capacity_blocks)
        return holder

    def retire(self, holder: int) -> None:
        """Forget everything `holder` held. O(1); the memory returns with later adds."""
        lru = self._lru.pop(holder)
        del self._capacity[holder]
        if lru:
            self._retired[holder] = lru

    def set_capacity(self, holder: int, capacity_blocks: int) -> None:
        """Change how many blocks `holder` is believed to keep; the oldest beyond it go."""
        self._capacity[holder] = max(1, capacity_blocks)
        self.trim(holder)

    def trim(self, holder: int) -> None:
        """Evict the oldest blocks beyond the capacity. O(evicted)."""
        lru, capacity = self._lru[holder], self._capacity[holder]
        while len(lru) > capacity:
            self._drop(lru.popitem(last=False)[0], holder)

    def capacity_blocks(self, holder: int) -> int:
        """How many blocks `holder` is believed to keep."""
        return self._capacity[holder]

    def num_blocks(self, holder: int) -> int:
        """Blocks that `holder` is believed to hold."""
        return len(self._lru[holder])

    def lookup(self, chain: Sequence[int], holders: int) -> dict[int, int]:
        """Matched blocks from the start of `chain` for each holder in the bitmask `holders`.

        Holders that match nothing are left out. Because residency is prefix-closed the
        deepest holder is found by bisection, then the next deepest below it, and so on:
        O(distinct depths * log(len(chain))), independent of the number of holders.
        """
        depths: dict[int, int] = {}
        if not chain:
            return depths
        get = self._holders.get
        alive = get(chain[0], 0) & holders
        end = len(chain)
        while alive:
            low, high = 0, end  # somebody in `alive` holds chain[low]; nobody chain[high]
            while high - low > 1:
                middle = (low + high) >> 1
                if get(chain[middle], 0) & alive:
                    low = middle
                else:
                    high = middle
            deepest = get(chain[low], 0) & alive
            alive &= ~deepest
            while deepest:
                bit = deepest & -deepest
                depths[bit.bit_length() - 1] = high
                deepest ^= bit
            end = low
            if not end:
                break
        return depths

    def stamps(self, holder: int, chain: Sequence[int]) -> list[int]:
        """Stamps of the blocks of `chain`, all of which `holder` must hold."""
        lru = self._lru[holder]
        return [lru[block] for block in chain]

    def add(self, holder: int, chain: Sequence[int], stamp: int) -> None:
        """Note that `holder` holds all of `chain` from now on, and touch it. O(len(chain)).

        Nothing is evicted yet, see `trim`: the replica may still refuse the prompt.
        """
        lru, bit, holders = self._lru[holder], 1 << holder, self._holders
        for block in reversed(chain):  # heads last: they are the youngest, evicted last
            if block in lru:
                lru.move_to_end(block)
            else:
                holders[block] = holders.get(block, 0) | bit
            lru[block] = stamp
        if self._retired:
            self._sweep(_SWEEP_PER_BLOCK * len(chain))

    def undo(self, holder: int, blocks: Sequence[int], stamp: int) -> None:
        """Take back blocks that only the placement `stamp` added.

        `blocks` is the part of its chain that was unmatched. Blocks which a later placement
        touched stay, and with them (heads are younger than tails) everything before them.
        """
        lru = self._lru[holder]
        for block in reversed(blocks):
            if lru.get(block) == stamp:
                del lru[block]
                self._drop(block, holder)

    def forget_older(self, holder: int, stamp: int) -> int:
        """Drop all blocks last touched at or before `stamp`; returns how many. O(dropped)."""
        lru, dropped = self._lru[holder], 0
        while lru:
            block, touched = next(iter(lru.items()))
            if touched > stamp:
                break
            del lru[block]
            self._drop(block, holder)
            dropped += 1
        return dropped

    def _sweep(self, num_blocks: int) -> None:
        holder, lru = next(iter(self._retired.items()))
        for _ in range(min(num_blocks, len(lru))):
            self._drop(lru.popitem(last=False)[0], holder)
        if not lru:
            del self._retired[holder]

    def _drop(self, block: int, holder: int) -> None:
        left = self._holders[block] & ~(1 << holder)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
