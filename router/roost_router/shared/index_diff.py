"""What the index in Redis does not know yet of what is known here. Pure.

A *view* is what one holder of ours has: text blocks that a replica is believed to hold, or token
blocks that a stream of it tells. Both note which blocks change; what has to be written is read when
it is written, so it is the state of then, whatever came and went before. A view that begins tells
all its blocks, a few at a time, after those that changed meanwhile.

Steps may be written twice, and late: put back what may not be written, and it is taken again.

Not here: who writes, how fast, for which replicas (store/feeder.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple, Protocol

from roost_router.index.packed_table import PackedTable
from roost_router.index.prefix_index import PrefixIndex, Touch
from roost_router.index.token_index import DEVICE_TIER, HOST_TIER, TokenIndex
from roost_wire.kv_events import Tier

#: Changes that may wait. More, after the store was away for long: begin anew.
MAX_WAITING: Final = 200_000
_DEPTH_BYTES: Final = 1
#: Deeper ones count as of this depth: it is enough to know who goes first where room is short.
MAX_DEPTH: Final = 255
_TIERS: Final = ((Tier.DEVICE, DEVICE_TIER), (Tier.HOST, HOST_TIER))


class Step(NamedTuple):
    """Where one block is now."""

    key: int  # by which the view knows it
    block: int  # its hash
    depth: int  # of its chain, from 0
    tiers: int  # DEVICE_TIER, HOST_TIER, both; 0: nowhere


class Batch(NamedTuple):
    """Of one tier: what became resident, parents before children; what is gone, the reverse."""

    added: list[int]
    depths: list[int]
    removed: list[int]


class View(Protocol):
    """What one holder of ours has, as far as it is not written yet."""

    @property
    def is_over(self) -> bool:
        """Whether it can tell no more: the holder is another, or too much waits."""
        ...

    def take(self, most: int) -> list[Step]:
        """Up to so many steps; none: all is written. O(steps)."""
        ...

    def put_back(self, steps: Iterable[Step]) -> None:
        """They may not be written."""
        ...

    def close(self) -> None:
        """Note no more."""
        ...


class TextView:
    """What a replica is believed to hold of texts."""

    def __init__(self, index: PrefixIndex, holder: int) -> None:
        """O(blocks) for a copy of what it holds now."""
        self._index: Final = index
        self._holder: Final = holder
        self._changed: Final[dict[int, int]] = {}
        self._rest = _text_blocks(index.touches(holder))
        index.watch(holder, self._changed)

    @property
    def is_over(self) -> bool:
        """See View."""
        is_watched = self._index.is_watched(self._holder, self._changed)
        return not is_watched or len(self._changed) > MAX_WAITING

    def take(self, most: int) -> list[Step]:
        """See View."""
        is_held, holder = self._index.is_held, self._holder
        noted = _take(self._changed, most)
        noted += islice(self._rest, most - len(noted))
        return [
            Step(block, block, depth, DEVICE_TIER if is_held(holder, block) else 0)
            for block, depth in noted
        ]

    def put_back(self, steps: Iterable[Step]) -> None:
        """See View."""
        for step in steps:
            self._changed.setdefault(step.block, step.depth)

    def close(self) -> None:
        """See View."""
        if self._index.is_watched(self._holder, self._changed):
            self._index.watch(self._holder, None)


class TokenView:
    """What a stream of KV events tells of token blocks.

    Blocks that came before their parents did are at the depth that they have by then. Memory: 8
    bytes a block, for its depth.
    """

    def __init__(self, index: TokenIndex, holder: int) -> None:
        self._index: Final = index
        self._holder: Final = holder
        self._changed: Final[dict[int, int]] = {}
        self._place = 0  # of the next bucket to read of those that were there before
        self._depths = PackedTable(_DEPTH_BYTES)
        self._num_walked = 0  # further blocks that the last call of `take` looked at for depths
        index.watch(holder, self._changed)

    @property
    def is_over(self) -> bool:
        """See View."""
        is_watched = self._index.is_watched(self._holder, self._changed)
        return not is_watched or len(self._changed) > MAX_WAITING

    def take(self, most: int) -> list[Step]:
        """See View. Up to a bucket more than `most`, some 32; fewer where depths are not known."""
        index, holder = self._index, self._holder
        noted = _take(self._changed, most)
        while len(noted) < most and self._place < index.num_buckets(holder):
            noted += index.bucket(holder, self._place)
            self._place += 1
        steps: list[Step] = []
        self._num_walked = 0
        for place, (key, block) in enumerate(noted):
            if self._num_walked > most // 4:  # to look for depths takes longer than the rest
                for later in noted[place:]:
                    self._changed.setdefault(*later)
                break
            tiers = index.tiers(holder, key, block)
            if tiers is None:
                continue
            if tiers:
                steps.append(Step(key, block, self._depth(key), tiers))
            else:
                known = self._depths.pop(key)
                steps.append(Step(key, block, 0 if known is None else _unpack(known), 0))
        return steps

    def put_back(self, steps: Iterable[Step]) -> None:
        """See View."""
        for step in steps:
            self._changed.setdefault(step.key, step.block)

    def close(self) -> None:
        """See View."""
        if self._index.is_watched(self._holder, self._changed):
            self._index.watch(self._holder, None)

    def _depth(self, key: int) -> int:
        """How many blocks come before this one, up to MAX_DEPTH. O(1) where its parent's is known.

        Else it is looked for, and noted for all on the way, up to MAX_DEPTH blocks before.
        """
        path: list[int] = []
        at, get = key, self._depths.get
        known = get(at)
        while known is None and len(path) < MAX_DEPTH:
            path.append(at)
            parent = self._index.parent(self._holder, at)
            if parent == at:
                break
            at = parent
            known = get(at)
        else:
            if known is None:
                path = [key]
                known = MAX_DEPTH.to_bytes(_DEPTH_BYTES, "little")
        self._num_walked += max(0, len(path) - 1)
        depth = -1 if known is None else _unpack(known)
        for one in reversed(path):
            depth = min(depth + 1, MAX_DEPTH)
            self._depths.try_add(one, depth.to_bytes(_DEPTH_BYTES, "little"))
        return depth


def by_tier(steps: Sequence[Step]) -> dict[Tier, Batch]:
    """What to write for each tier."""
    batches = {}
    deeper_later = sorted(steps, key=_depth_of)
    for tier, bit in _TIERS:
        added = [step for step in deeper_later if step.tiers & bit]
        removed = [step.block for step in reversed(deeper_later) if not step.tiers & bit]
        batches[tier] = Batch([s.block for s in added], [s.depth for s in added], removed)
    return batches


def _depth_of(step: Step) -> int:
    return step.depth


def _take(changed: dict[int, int], most: int) -> list[tuple[int, int]]:
    noted = list(islice(changed.items(), most))
    for key, _ in noted:
        del changed[key]
    return noted


def _text_blocks(touches: list[Touch]) -> Iterator[tuple[int, int]]:
    """(block hash, place in its chain). What was touched last first."""
    for touch in reversed(touches):
        yield from zip(
            touch.blocks, range(touch.first, touch.first + len(touch.blocks)), strict=True
        )


def _unpack(depth: bytes) -> int:
    return int.from_bytes(depth, "little")
