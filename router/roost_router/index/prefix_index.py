"""Prefix index: which replica is believed to hold how much of a prompt. Pure.

    _holders          block hash -> bitmask of holders      (one dict for the whole fleet)
    _expecting        the same, of blocks that are being computed
    _Held.stamps      block hash -> stamp, one dict for each holder
    _Held.touches     (stamp, blocks, place of the first), one for each prompt, oldest first

A *holder* is one epoch of one replica: when a replica restarts, its holder is retired and it
gets a new one, so that old knowledge disappears in O(1); the retired blocks are swept later, a
few with each `add`. A *stamp* says when a prompt touched the block last.

Blocks are *expected* from the decision to the first byte, so that the siblings of a burst see each
other, and held from then on. A request that is never computed leaves nothing behind.

What several routers know of a holder can be merged, in any order and any number of times, and is
the same everywhere then: a block's stamp is the greatest of those that touched it, and it is held
if it lies above the holder's *floor*, the greatest (stamp, place) below which all was dropped.

Least recently used without moving anything: touching a chain sets its stamps and appends one
entry to `touches`. A block of an entry whose stamp is another by now was touched later and is not
this entry's any more. Entries are thinned out when they hold more than twice as many blocks as
there are, so memory and time stay proportional to what is held.

Invariants
- Residency is prefix-closed: whoever holds block i of a chain holds blocks 0..i-1. A prompt
  stamps a whole chain, so no block is younger than its parent; entries lose their last blocks
  first; so every removal here takes a tail that nobody touched since. `lookup` relies on it:
  holders only disappear along a chain.
- What is expected begins where what was held ended when it was. If that is dropped meanwhile, a
  lookup may find less than there will be, and no more.
- A bit is in `_holders[h]` exactly when `h` is in that holder's stamps (retired ones included).
- Each held block is in exactly one entry that has its stamp.

Not here: what a block means (text_chain.py), whether the belief is right (placement.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from roost_router.index.text_chain import BLOCK_BYTES

#: Retired blocks removed with each added block: any number above 1 keeps up with restarts.
_SWEEP_PER_BLOCK = 4
#: Outdated blocks that entries may hold besides as many as are held.
_SLACK_BLOCKS = 1024


class _Held:
    """What one holder holds."""

    __slots__ = (
        "capacity_bytes",
        "changed",
        "expected",
        "floor",
        "num_bytes",
        "num_touched",
        "stamps",
        "touches",
    )

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.stamps: dict[int, int] = {}
        self.touches: deque[tuple[int, list[int], int]] = deque()
        self.num_touched = 0  # blocks in `touches`
        self.expected: dict[int, int] = {}  # block hash -> requests that compute it
        self.floor = NO_FLOOR
        self.changed: dict[int, int] | None = None


class Touch(NamedTuple):
    """What a prompt touched last: the blocks of its chain from place `first` on."""

    stamp: int
    first: int
    blocks: list[int]


class Floor(NamedTuple):
    """All touched before `stamp` is gone, and of what it touched, the blocks from place `keep`."""

    stamp: int
    keep: int


NO_FLOOR: Final = Floor(-1, 0)


class PrefixIndex:
    """Longest-prefix lookup over all replicas at once."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._expecting: dict[int, int] = {}
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
        """Forget everything `holder` held. O(expected); the memory returns with later adds."""
        held = self._held.pop(holder)
        for block in held.expected:
            self._expect_no_more(block, holder)
        if held.stamps:
            self._retired[holder] = held.stamps

    def set_capacity(self, holder: int, capacity_bytes: int) -> None:
        """Change how much `holder` is believed to keep; the next `trim` goes by it."""
        self._held[holder].capacity_bytes = capacity_bytes

    def trim(self, holder: int) -> bool:
        """Evict the oldest blocks beyond the capacity; whether there were any. O(evicted)."""
        held = self._held[holder]
        if held.num_bytes <= held.capacity_bytes:
            return False
        while held.num_bytes > held.capacity_bytes:
            self._drop_last(holder, held)
        return True

    def floor(self, holder: int) -> Floor:
        """Below which all that `holder` held was dropped."""
        return self._held[holder].floor

    def capacity_bytes(self, holder: int) -> int:
        """How many bytes of prompts `holder` is believed to keep."""
        return self._held[holder].capacity_bytes

    def watch(self, holder: int, changed: dict[int, int] | None) -> None:
        """Note in `changed` from now on which blocks come and go: block hash -> place in its chain.

        None: no more. The caller takes out what it has seen.
        """
        self._held[holder].changed = changed

    def is_watched(self, holder: int, changed: dict[int, int]) -> bool:
        """Whether there is this holder, and its changes are noted there."""
        held = self._held.get(holder)
        return held is not None and held.changed is changed

    def is_held(self, holder: int, block: int) -> bool:
        """Whether `holder` is believed to hold this block."""
        return block in self._held[holder].stamps

    def num_blocks(self, holder: int) -> int:
        """Blocks that `holder` is believed to hold."""
        return len(self._held[holder].stamps)

    def num_bytes(self, holder: int) -> int:
        """Bytes of prompts that `holder` is believed to hold."""
        return self._held[holder].num_bytes

    def lookup(self, chain: Sequence[int], holders: int) -> dict[int, int]:
        """Matched blocks from the start of `chain` for each holder in the bitmask `holders`.

        Expected blocks count. Holders that match nothing are left out. Because residency is
        prefix-closed, and so is what is expected beyond it, the
        deepest holder is found by bisection, then the next deepest below it, and so on:
        O(distinct depths * log(len(chain))), independent of the number of holders.
        """
        depths: dict[int, int] = {}
        if not chain:
            return depths
        get, expecting = self._holders.get, self._expecting.get
        alive = (get(chain[0], 0) | expecting(chain[0], 0)) & holders
        end = len(chain)
        while alive:
            low, high = 0, end  # somebody in `alive` holds chain[low]; nobody chain[high]
            while high - low > 1:
                middle = (low + high) >> 1
                block = chain[middle]
                if (get(block, 0) | expecting(block, 0)) & alive:
                    low = middle
                else:
                    high = middle
            deepest = (get(chain[low], 0) | expecting(chain[low], 0)) & alive
            alive &= ~deepest
            while deepest:
                bit = deepest & -deepest
                depths[bit.bit_length() - 1] = high
                deepest ^= bit
            end = low
            if not end:
                break
        return depths

    def num_held(self, holder: int, chain: Sequence[int], num_matched: int) -> int:
        """Of the first `num_matched` blocks of `chain`, those held, not expected. O(log)."""
        stamps = self._held[holder].stamps
        if num_matched and chain[num_matched - 1] in stamps:
            return num_matched
        low, high = 0, num_matched  # chain[low - 1] is held, chain[high - 1] is not
        while high - low > 1:
            middle = (low + high) >> 1
            if chain[middle - 1] in stamps:
                low = middle
            else:
                high = middle
        return low

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

    def expect(self, holder: int, chain: Sequence[int], num_held: int) -> None:
        """A request begins to compute `chain`, of which so many blocks are there. O(others)."""
        expected, expecting, bit = self._held[holder].expected, self._expecting, 1 << holder
        for block in chain[num_held:]:
            count = expected.get(block, 0)
            expected[block] = count + 1
            if not count:
                expecting[block] = expecting.get(block, 0) | bit

    def unexpect(self, holder: int, chain: Sequence[int], num_held: int) -> None:
        """It has computed them, or never will; the arguments are those of `expect`."""
        expected = self._held[holder].expected
        for block in chain[num_held:]:
            count = expected.get(block, 0)
            if count > 1:
                expected[block] = count - 1
            elif count:
                del expected[block]
                self._expect_no_more(block, holder)

    def add(self, holder: int, chain: Sequence[int], stamp: int) -> None:
        """Note that `holder` holds all of `chain`, and that it was touched at `stamp`.

        Nothing is evicted, see `trim`. Nothing happens below the holder's floor. O(len(chain)),
        and O(later prompts) where later ones are known by now.
        """
        held = self._held[holder]
        own = self._touch(holder, held, Touch(stamp, 0, list(chain)))
        if own is not None:
            touches = held.touches
            place = len(touches)
            while place and touches[place - 1][0] > stamp:
                place -= 1
            touches.insert(place, own)
            self._added(held, len(own[1]), len(chain))

    def merge(self, holder: int, touches: Iterable[Touch], floor: Floor) -> None:
        """Take in what another index knows of a holder: what `touches` and `floor` say of it.

        O(blocks + prompts * log).
        """
        held = self._held[holder]
        self.drop_below(holder, floor)
        found = []
        for touch in sorted(touches, reverse=True):  # no block without those before it
            own = self._touch(holder, held, touch)
            if own is not None:
                found.append(own)
        held.touches = deque(sorted([*held.touches, *found], key=_stamp))
        num_blocks = sum([len(own[1]) for own in found])
        self._added(held, num_blocks, num_blocks)

    def touches(self, holder: int) -> list[Touch]:
        """All that `holder` holds, by who touched it last, for `merge`. O(blocks)."""
        held = self._held[holder]
        _thin_out(held)
        return [Touch(stamp, first, blocks.copy()) for stamp, blocks, first in held.touches]

    def newest(self, holder: int) -> int:
        """The stamp of the last touch; -1: there is none."""
        touches = self._held[holder].touches
        return touches[-1][0] if touches else -1

    def forget_older(self, holder: int, stamp: int) -> int:
        """Drop all blocks last touched at or before `stamp`; returns how many. O(dropped)."""
        return self.drop_below(holder, Floor(stamp, 0))

    def drop_below(self, holder: int, floor: Floor) -> int:
        """Drop what lies below `floor`, and nothing may be added there; returns how many blocks.

        O(dropped).
        """
        held = self._held[holder]
        if not _is_higher(floor, held.floor):
            return 0
        before = len(held.stamps)
        touches = held.touches
        while touches:
            stamp, blocks, first = touches[0]
            is_kept = stamp == floor.stamp and first + len(blocks) <= floor.keep
            if stamp > floor.stamp or is_kept:
                break
            self._drop_last(holder, held)
        held.floor = floor
        return before - len(held.stamps)

    def _touch(self, holder: int, held: _Held, touch: Touch) -> tuple[int, list[int], int] | None:
        """Set the stamps of what nobody touched later; that is an entry for `touches`."""
        stamp, first, blocks = touch
        if stamp <= held.floor.stamp:
            if stamp < held.floor.stamp:
                return None
            blocks = blocks[: max(0, held.floor.keep - first)]
        holders, bit = self._holders, 1 << holder
        stamps, get, changed = held.stamps, holders.get, held.changed
        place = end = len(blocks)
        while place and blocks[place - 1] not in stamps:  # prefix-closed: what is new is a tail
            place -= 1
            block = blocks[place]
            holders[block] = get(block, 0) | bit
            stamps[block] = stamp
            held.num_bytes += BLOCK_BYTES[first + place]
            if changed is not None:
                changed[block] = first + place
        while place and stamps[blocks[place - 1]] < stamp:  # no block is younger than its parent
            place -= 1
            stamps[blocks[place]] = stamp
        if place == end:
            return None
        return stamp, blocks[place:] if place else blocks, first + place

    def _added(self, held: _Held, num_touched: int, num_blocks: int) -> None:
        held.num_touched += num_touched
        if held.num_touched > 2 * len(held.stamps) + _SLACK_BLOCKS:
            _thin_out(held)
        if self._retired:
            self._sweep(_SWEEP_PER_BLOCK * num_blocks)

    def _drop_last(self, holder: int, held: _Held) -> None:
        """Drop the last block of the oldest entry, if it is still the entry's."""
        stamp, blocks, first = held.touches[0]
        block = blocks.pop()
        held.num_touched -= 1
        held.floor = Floor(stamp, first + len(blocks))
        if not blocks:
            held.touches.popleft()
        if held.stamps.get(block) == stamp:
            self._forget(holder, held, block, first + len(blocks))

    def _forget(self, holder: int, held: _Held, block: int, place: int) -> None:
        del held.stamps[block]
        held.num_bytes -= BLOCK_BYTES[place]
        if held.changed is not None:
            held.changed[block] = place
        self._drop(block, holder)

    def _expect_no_more(self, block: int, holder: int) -> None:
        left = self._expecting[block] & ~(1 << holder)
        if left:
            self._expecting[block] = left
        else:
            del self._expecting[block]

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


def _stamp(entry: tuple[int, list[int], int]) -> int:
    return entry[0]


def _is_higher(one: Floor, other: Floor) -> bool:
    return one.stamp > other.stamp or (one.stamp == other.stamp and one.keep < other.keep)


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
