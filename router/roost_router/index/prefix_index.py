"""Prefix index: which replica is believed to hold how much of a prompt. Pure.

    _holders          block hash -> bitmask of holders      (one dict for the whole fleet)
    _Held.stamps      block hash -> stamp, one dict for each holder
    _Held.touches     (stamp, blocks, place of the first), one for each placement, oldest first

A *holder* is one epoch of one replica: when a replica restarts, its holder is retired and it
gets a new one, so that old knowledge disappears in O(1); the retired blocks are swept later, a
few with each `add`. A *stamp* is the sequence number of the placement that touched the block
last; stamps never decrease.

Least recently used without moving anything: touching a chain sets its stamps and appends one
entry to `touches`. A block of an entry whose stamp is another by now was touched later and is not
this entry's any more. Entries are thinned out when they hold more than twice as many blocks as
there are, so memory and time stay proportional to what is held.

Invariants
- Residency is prefix-closed: whoever holds block i of a chain holds blocks 0..i-1. A placement
  stamps a whole chain, so no block is younger than its parent; entries lose their last blocks
  first; so every removal here takes a tail that nobody touched since. `lookup` relies on it:
  holders only disappear along a chain.
- A bit is in `_holders[h]` exactly when `h` is in that holder's stamps (retired ones included).
- Each held block is in exactly one entry that has its stamp.

Not here: what a block means (text_chain.py), whether the belief is right (placement.py).
"""

from collections import deque
from collections.abc import Callable, Sequence

from roost_router.index.text_chain import BLOCK_BYTES

#: Retired blocks removed with each added block: any number above 1 keeps up with restarts.
_SWEEP_PER_BLOCK = 4
#: Outdated blocks that entries may hold besides as many as are held.
_SLACK_BLOCKS = 1024


class _Held:
    """What one holder holds."""

    __slots__ = ("capacity_bytes", "num_bytes", "num_touched", "stamps", "touches")

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.stamps: dict[int, int] = {}
        self.touches: deque[tuple[int, list[int], int]] = deque()
        self.num_touched = 0  # blocks in `touches`


class PrefixIndex:
    """Longest-prefix lookup over all replicas at once."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._retired: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        """Distinct blocks known, blocks of retired holders included until they are swept."""
        return len(self._holders)

    def __repr__(self) -> str:
        held = ", ".join(f"{holder}: {len(h.stamps)}" for holder, h in sorted(self._held.items()))
        return f"<PrefixIndex {len(self._holders)} blocks | holders {held or 'none'}>"

    def open_holder(self, capacity_bytes: int) -> int:
        """A new, empty holder (its number is its bit). O(holders)."""
        holder = 0
        while holder in self._held or holder in self._retired:
            holder += 1
        self._held[holder] = _Held(capacity_bytes)
        return holder

    def retire(self, holder: int) -> None:
        """Forget everything `holder` held. O(1); the memory returns with later adds."""
        held = self._held.pop(holder)
        if held.stamps:
            self._retired[holder] = held.stamps

    def set_capacity(self, holder: int, capacity_bytes: int) -> None:
        """Change how much `holder` is believed to keep; the oldest blocks beyond it go."""
        self._held[holder].capacity_bytes = capacity_bytes
        self.trim(holder)

    def trim(self, holder: int) -> None:
        """Evict the oldest blocks beyond the capacity. O(evicted), amortised."""
        held = self._held[holder]
        while held.num_bytes > held.capacity_bytes:
            self._drop_last(holder, held)

    def capacity_bytes(self, holder: int) -> int:
        """How many bytes of prompts `holder` is believed to keep."""
        return self._held[holder].capacity_bytes

    def num_blocks(self, holder: int) -> int:
        """Blocks that `holder` is believed to hold."""
        return len(self._held[holder].stamps)

    def num_bytes(self, holder: int) -> int:
        """Bytes of prompts that `holder` is believed to hold."""
        return self._held[holder].num_bytes

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
        return list(map(self._held[holder].stamps.__getitem__, chain))

    def num_since(self, holder: int, chain: Sequence[int], num_held: int, stamp: int) -> int:
        """Of the first `num_held` blocks of `chain`, all held, those touched at or after `stamp`.

        They come first, since no block is younger than its parent. O(log(num_held)).
        """
        stamps = self._held[holder].stamps
        low, high = 0, num_held  # chain[low - 1] was touched since, chain[high] was not
        while low < high:
            middle = (low + high) >> 1
            if stamps[chain[middle]] >= stamp:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, holder: int, chain: Sequence[int], stamp: int) -> None:
        """Note that `holder` holds all of `chain` from now on, and touch it.

        Nothing is evicted yet, see `trim`: the replica may still refuse the prompt. O(len(chain)).
        """
        if not chain:
            return
        held, holders, bit = self._held[holder], self._holders, 1 << holder
        stamps, get = held.stamps, holders.get
        place = len(chain)
        while place and chain[place - 1] not in stamps:  # prefix-closed: what is new is a tail
            place -= 1
            block = chain[place]
            holders[block] = get(block, 0) | bit
            held.num_bytes += BLOCK_BYTES[place]
        for block in chain:
            stamps[block] = stamp
        held.touches.append((stamp, list(chain), 0))
        held.num_touched += len(chain)
        if held.num_touched > 2 * len(stamps) + _SLACK_BLOCKS:
            _thin_out(held)
        if self._retired:
            self._sweep(_SWEEP_PER_BLOCK * len(chain))

    def undo(self, holder: int, chain: Sequence[int], num_kept: int, stamp: int) -> None:
        """Take back the blocks of `chain` after the first `num_kept` that only `stamp` added.

        Blocks which a later placement touched stay, and with them everything before them.
        """
        held = self._held[holder]
        for place in range(len(chain) - 1, num_kept - 1, -1):
            if held.stamps.get(chain[place]) == stamp:
                self._forget(holder, held, chain[place], place)

    def forget_older(self, holder: int, stamp: int) -> int:
        """Drop all blocks last touched at or before `stamp`; returns how many. O(dropped)."""
        held = self._held[holder]
        before = len(held.stamps)
        while held.touches and held.touches[0][0] <= stamp:
            self._drop_last(holder, held)
        return before - len(held.stamps)

    def _drop_last(self, holder: int, held: _Held) -> None:
        """Drop the last block of the oldest entry, if it is still the entry's."""
        stamp, blocks, first = held.touches[0]
        block = blocks.pop()
        held.num_touched -= 1
        if not blocks:
            held.touches.popleft()
        if held.stamps.get(block) == stamp:
            self._forget(holder, held, block, first + len(blocks))

    def _forget(self, holder: int, held: _Held, block: int, place: int) -> None:
        del held.stamps[block]
        held.num_bytes -= BLOCK_BYTES[place]
        self._drop(block, holder)

    def _sweep(self, num_blocks: int) -> None:
        holder, stamps = next(iter(self._retired.items()))
        for _ in range(min(num_blocks, len(stamps))):
            self._drop(stamps.popitem()[0], holder)
        if not stamps:
            del self._retired[holder]

    def _drop(self, block: int, holder: int) -> None:
        left = self._holders[block] & ~(1 << holder)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


def _thin_out(held: _Held) -> None:
    """Keep of each entry what is still its own. O(entries), bisecting those cut in two.

    No block is younger than its parent, so blocks touched later come first in an entry, and blocks
    that are gone come last.
    """
    touches: deque[tuple[int, list[int], int]] = deque()
    get, num_touched = held.stamps.get, 0
    for stamp, blocks, first in held.touches:
        end = len(blocks)
        while end and get(blocks[end - 1]) is None:
            end -= 1
        start = _first_own(get, blocks, end, stamp)
        if start < end:
            own = blocks[start:end] if end - start < len(blocks) else blocks
            touches.append((stamp, own, first + start))
            num_touched += end - start
    held.touches = touches
    held.num_touched = num_touched


def _first_own(get: Callable[[int], int | None], blocks: list[int], end: int, stamp: int) -> int:
    """Place of the first of `blocks[:end]`, all held, that was not touched after `stamp`."""
    if not end or get(blocks[end - 1]) != stamp:
        return end
    if get(blocks[0]) == stamp:
        return 0
    low, high = 0, end - 1  # blocks[low] was touched later, blocks[high] was not
    while high - low > 1:
        middle = (low + high) >> 1
        if get(blocks[middle]) == stamp:
            high = middle
        else:
            low = middle
    return high
