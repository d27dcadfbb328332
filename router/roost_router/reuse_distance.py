"""How much else is asked for before a block is asked for again, estimated from a sample. Pure.

The *stack distance* of a block is the bytes of distinct blocks touched since it was touched last,
itself included: a least-recently-used cache of C bytes still holds it exactly if that is at most C
(Mattson et al., 1970). One pass so tells the hits of caches of every size.

Sampled as in SHARDS (Waldspurger et al., FAST 2015): a block is looked at if its hash is below a
limit; as hashes are uniform, one in 2^n blocks is, each time it comes, and distances among those,
times 2^n, estimate the distances among all. The limit is halved when the sample is full or costs
too much time; what it holds then stays a sample of the smaller rate. Estimates count misses only,
and all else as hits (their SHARDS-adj): a prefix that everybody shares is a hit whether it is in
the sample or not, so it cannot distort what is estimated.

    _touch     block -> touch << 9 | place in its chain      a *touch* is one sampled request
    _at        bytes of the blocks touched last by each touch
    _pages     the same, 128 touches a page: what came after a touch is two short sums

Inside a chain, the stack keeps the root above the tail, as engines evict the tail first; a prefix
was touched no earlier than what follows it, so a chain meets ever older touches.

Bounded: `max_blocks` blocks, about 200 bytes each. Not here: what a distance means (hit_ladder.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import inf

from roost_router.index.text_chain import BLOCK_BYTES

#: Distance of a block that was never seen before, or not for HORIZON_S.
NEVER = -1
#: What nobody touched for so long is forgotten before the rate falls: a sample that remembers a
#: week has nothing left for the last ten minutes.
HORIZON_S = 3600.0
#: Sampled blocks a second above which the rate is halved: a thousandth of a core.
_MAX_RATE = 256.0
#: Sampled blocks between two looks at the clock: a burst, and less while there is too much of it.
_BURST = 2048
_NEXT_BURST = 512
_PLACE_BITS = 9
_PLACES = (1 << _PLACE_BITS) - 1
_PAGE_BITS = 7
assert len(BLOCK_BYTES) <= _PLACES


class ReuseSample:
    """Stack distances of the blocks of all prompts, in order of coming."""

    def __init__(self, max_blocks: int) -> None:
        self.num_halvings = 0  # one in 2^this blocks is looked at
        self._max_blocks = max_blocks
        self._limit = 1 << 64
        self._touch: dict[int, int] = {}
        self._num_touched = 0  # since the check, blocks
        self._burst = _BURST  # until the next
        self._checked_at = -inf
        self._next = 0  # number of the next touch
        self._make_tables()

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._touch)

    def resize(self, max_blocks: int) -> None:
        """Hold no more than `max_blocks` from the next touch on."""
        self._max_blocks = max_blocks

    def touch(self, chain: Sequence[int], now: float) -> list[tuple[int, int]]:
        """A prompt came: bytes and distance of each of its blocks that is sampled.

        Both are estimates of all blocks that it stands for; the distance may be NEVER.

        `chain`: hashes below 2^64 as text_chain.py makes them. O(chain) to pick the sampled, then
        O(sampled + 128 + max_blocks / 64) at worst.
        """
        if self._num_touched > self._burst:
            self._check_time(now)
        limit = self._limit
        if not chain or min(chain) >= limit:  # a third of what the next line costs, mostly enough
            return []
        sampled = [(block, place) for place, block in enumerate(chain) if block < limit]
        if len(self._touch) + len(sampled) > self._max_blocks:
            sampled = self._make_room(sampled, now)
        elif self._next == len(self._at):
            self._renumber()
        self._num_touched += len(sampled)
        return self._distances(sampled, now)

    def _distances(self, sampled: list[tuple[int, int]], now: float) -> list[tuple[int, int]]:
        last, at, pages, scale = self._touch, self._at, self._pages, self.num_halvings
        this = self._next
        found = []
        left: dict[int, int] = {}  # bytes that leave each touch; after all distances are known
        total = distance = 0
        for block, place in sampled:
            num_bytes = BLOCK_BYTES[place]
            total += num_bytes
            packed = last.get(block)
            last[block] = this << _PLACE_BITS | place
            if packed is None:
                found.append((num_bytes << scale, NEVER))
                continue
            touched = packed >> _PLACE_BITS
            if touched not in left:
                left[touched] = 0
                distance = self._bytes_after(touched)
            left[touched] += num_bytes
            distance += num_bytes
            found.append((num_bytes << scale, distance << scale))
        for touched, num_bytes in left.items():
            at[touched] -= num_bytes
            pages[touched >> _PAGE_BITS] -= num_bytes
        at[this] += total
        pages[this >> _PAGE_BITS] += total
        self._times[this] = now
        self._next = this + 1
        return found

    def _bytes_after(self, touch: int) -> int:
        page = (touch >> _PAGE_BITS) + 1
        end = (self._next >> _PAGE_BITS) + 1
        return sum(self._at[touch + 1 : page << _PAGE_BITS]) + sum(self._pages[page:end])

    def _make_room(self, sampled: list[tuple[int, int]], now: float) -> list[tuple[int, int]]:
        """Forget until there is room for `sampled`; those of it that are sampled still."""
        since, times = now - HORIZON_S, self._times
        self._touch = {
            block: packed
            for block, packed in self._touch.items()
            if times[packed >> _PLACE_BITS] >= since
        }
        while len(self._touch) + len(sampled) > self._max_blocks * 3 // 4:
            self._halve()
            sampled = [(block, place) for block, place in sampled if block < self._limit]
        self._renumber()
        return sampled

    def _check_time(self, now: float) -> None:
        """Halve the rate if the last blocks came too fast."""
        is_too_fast = now - self._checked_at < self._burst / _MAX_RATE
        self._burst = _NEXT_BURST if is_too_fast else _BURST
        if is_too_fast:
            self._halve()
            self._renumber()
        self._checked_at, self._num_touched = now, 0

    def _halve(self) -> None:
        self._limit >>= 1
        self.num_halvings += 1
        limit = self._limit
        self._touch = {block: packed for block, packed in self._touch.items() if block < limit}

    def _renumber(self) -> None:
        """Give the touches that still count the first numbers, in the same order."""
        order = sorted({packed >> _PLACE_BITS for packed in self._touch.values()})
        number_of = {touch: number for number, touch in enumerate(order)}
        times = self._times
        self._make_tables()
        for number, touch in enumerate(order):
            self._times[number] = times[touch]
        for block, packed in self._touch.items():
            number, place = number_of[packed >> _PLACE_BITS], packed & _PLACES
            self._touch[block] = number << _PLACE_BITS | place
            self._at[number] += BLOCK_BYTES[place]
            self._pages[number >> _PAGE_BITS] += BLOCK_BYTES[place]
        self._next = len(order)

    def _make_tables(self) -> None:
        """Twice as many touches as blocks: renumbering is rare, and pays for itself."""
        num_touches = max(2 * self._max_blocks, 1 << _PAGE_BITS)
        self._at = array("q", bytes(8 * num_touches))
        self._times = array("d", bytes(8 * num_touches))
        self._pages = array("q", bytes(8 * ((num_touches >> _PAGE_BITS) + 1)))
        self._next = 0
