"""Writes what replicas hold into the index in Redis, for those that this router is the feeder of.

    <url>              what all routers believe of it, in text blocks
    <url> #<rank>      what a stream of its KV events tells, in token blocks; by tier

are the names of holders in the index. An epoch is the start of the replica's process. Where
anything is not certain, a holder is opened anew: what the index says of it is dead at once, and
everything is written again. That is so when this router becomes the feeder (blocks that went before
are known to nobody), when the replica begins anew, when the index lost it, when too much waited.

It writes up to SLICES slices a beat, of SLICE_BLOCKS, and one of each holder at least: the event
loop is held for a millisecond or so each time. Nothing waits for it. A call that fails is made
again at the next beat.

Not here: what has to be written (shared/index_diff.py), who feeds (leases.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from roost_router.shared.index_diff import Step, TextView, TokenView, View, by_tier
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.index import FencedError, HolderGoneError, IndexFullError
from roost_router.store.leases import BEAT_S
from roost_wire.kv_events import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from roost_router.fleet.fleet import Fleet
    from roost_router.index.prefix_index import PrefixIndex
    from roost_router.store.index import Holder, RedisIndex
    from roost_router.store.secret import ClusterSecret
    from roost_router.told_residency import ToldResidency

#: The most blocks that the index holds: 46 MB of Redis, see docs/redis.md.
MAX_BLOCKS: Final = 3_000_000
#: About 1 ms of this router's CPU; up to three where depths of token blocks are looked for.
SLICE_BLOCKS: Final = 256
SLICES: Final = 64
#: Calls of the sweep in a beat, while there is something to clean.
SWEEPS: Final = 8
#: A holder that changes nothing is looked at so often: the index may have lost it. So is one that
#: was refused.
LOOK_S: Final = 5.0
_BUDGET_S: Final = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Source:
    """Something to feed. Another one is another epoch, or another feeder's."""

    url: str
    fence: int
    epoch: int
    holder: int  # of ours
    rank: int | None  # of a stream of KV events


@dataclass(slots=True)
class _Fed:
    """What is written of it."""

    source: _Source
    view: View
    looked_at: float | None = None  # when its holders were opened last, or refused
    is_refused: bool = False
    holders: dict[Tier, Holder] = field(default_factory=dict)


class Feeder:
    """One router's."""

    def __init__(  # noqa: PLR0917
        self,
        index: RedisIndex,
        secret: ClusterSecret,
        fleet: Fleet,
        texts: PrefixIndex,
        told: ToldResidency | None,
        clock: Callable[[], float],
    ) -> None:
        self._index: Final = index
        self._secret: Final = secret
        self._fleet: Final = fleet
        self._texts: Final = texts
        self._told: Final = told
        self._clock: Final = clock
        self._fed: Final[dict[bytes, _Fed]] = {}  # by name in the index
        self._dead: Final[list[Holder]] = []  # to be retired
        #: Fences of the replicas that this router feeds, by URL; the link's to set.
        self.fences: Mapping[str, int] = {}
        self.num_added = 0  # blocks that were new there
        self.num_removed = 0
        self.num_evicted = 0  # to make room
        self.num_begun = 0  # times that everything of a holder was written
        self.num_errors: Final[Counter[StoreFault]] = Counter()

    @property
    def num_holders(self) -> int:
        """Replicas and streams that are written."""
        return sum(not fed.is_refused for fed in self._fed.values())

    async def run(self) -> None:
        """Write, beat by beat, until cancelled."""
        while True:
            try:
                await self.beat()
            except StoreError as error:
                self.num_errors[error.fault] += 1
            except Exception:  # noqa: BLE001
                # A defect of ours must not end the feeding for good, and never the routing.
                _log.exception("writing the index failed")
            await asyncio.sleep(BEAT_S)

    async def beat(self) -> None:
        """Write what changed, sweep a little. Raises StoreError; call it again then."""
        sources = dict(self._sources())
        for name in [name for name in self._fed if name not in sources]:
            self._let_go(name)
        while self._dead:
            with contextlib.suppress(HolderGoneError, FencedError):  # another one's by now
                await self._index.retire_holder(self._dead[-1], _BUDGET_S)
            self._dead.pop()
        num_slices = SLICES
        for name, source in sources.items():
            fed = self._fed.get(name)
            if fed is None or fed.source != source or fed.view.is_over:
                fed = self._begin(name, source)
            try:
                num_slices -= await self._feed(name, fed, max(1, num_slices))
            except HolderGoneError:
                self._forget(name)  # and begin at the next beat
            except (FencedError, IndexFullError) as error:
                fed.is_refused, fed.looked_at = True, self._clock()
                _log.info("the index refuses %s: %s", name.decode(), type(error).__name__)
        if sources:
            await self._sweep()

    async def _sweep(self) -> None:
        for _ in range(SWEEPS):
            swept = await self._index.sweep(_BUDGET_S)
            if swept.is_round_over or not swept.removed:
                return

    def _sources(self) -> Iterator[tuple[bytes, _Source]]:
        """What this router is to feed, by its name in the index."""
        epochs = {}
        for replica in self._fleet.replicas:
            fence = self.fences.get(replica.url)
            if fence is not None and replica.is_up:
                epoch = max(0, round((replica.started_at or 0.0) * 1e3))
                epochs[replica.name] = replica.url, fence, epoch
                source = _Source(replica.url, fence, epoch, replica.holder, None)
                yield replica.url.encode(), source
        for name, rank, sink in self._told.streams() if self._told is not None else ():
            if name in epochs:
                url, fence, epoch = epochs[name]
                yield f"{url} #{rank}".encode(), _Source(url, fence, epoch, sink.holder, rank)

    def _begin(self, name: bytes, source: _Source) -> _Fed:
        self._forget(name)
        if source.rank is None:
            view: View = TextView(self._texts, source.holder)
        else:
            assert self._told is not None
            view = TokenView(self._told.knowledge.index, source.holder)
        fed = self._fed[name] = _Fed(source, view)
        return fed

    def _forget(self, name: bytes) -> None:
        fed = self._fed.pop(name, None)
        if fed is not None:
            fed.view.close()

    def _let_go(self, name: bytes) -> None:
        """Another router feeds it; or it left, is down, is silent: then nothing holds."""
        fed, url = self._fed[name], self._fed[name].source.url
        self._forget(name)
        is_member = any(replica.url == url for replica in self._fleet.replicas)
        if url in self.fences or not is_member:
            self._dead.extend(fed.holders.values())

    async def _feed(self, name: bytes, fed: _Fed, most: int) -> int:
        """Write up to so many slices; returns how many there were."""
        now = self._clock()
        if fed.looked_at is None or now - fed.looked_at >= LOOK_S:
            if fed.source.rank is not None and not fed.holders:
                await self._end_host_tier(name, fed.source)
            for tier in list(fed.holders) or [Tier.DEVICE]:
                await self._open(name, fed, tier)
            fed.is_refused, fed.looked_at = False, now
        if fed.is_refused:
            return 0
        for number in range(most):
            if fed.view.is_over:
                return number
            steps = fed.view.take(SLICE_BLOCKS)
            if not steps:
                return number
            try:
                await self._write(name, fed, steps)
            except BaseException:
                fed.view.put_back(steps)
                raise
        return most

    async def _end_host_tier(self, name: bytes, source: _Source) -> None:
        """What another feeder, or epoch, wrote of it; it is opened where there is a block of it."""
        there = {(holder.replica, holder.tier) for holder in (await self._index.holders()).values()}
        if (name, Tier.HOST) in there:
            args = (name, Tier.HOST, source.epoch, source.fence)
            holder = await self._index.open_holder(*args, budget_s=_BUDGET_S)
            await self._index.retire_holder(holder, _BUDGET_S)

    async def _open(self, name: bytes, fed: _Fed, tier: Tier) -> None:
        before = fed.holders.get(tier)
        source = fed.source
        holder = await self._index.open_holder(
            name, tier, source.epoch, source.fence, anew=before is None, budget_s=_BUDGET_S
        )
        if before is None:
            self.num_begun += 1
        elif before.serial != holder.serial:
            raise HolderGoneError
        fed.holders[tier] = holder

    async def _write(self, name: bytes, fed: _Fed, steps: list[Step]) -> None:
        ids_of = self._secret.block_ids
        for tier, batch in by_tier(steps).items():
            if batch.added and tier not in fed.holders:
                # Who lost the lease finds it out here: of this tier nobody else may have written.
                for one in (*fed.holders, tier):
                    await self._open(name, fed, one)
            holder = fed.holders.get(tier)
            if holder is None:
                continue
            if batch.removed:
                removed = await self._index.remove(holder, ids_of(batch.removed), _BUDGET_S)
                self.num_removed += removed.changed
            if batch.added:
                ids = ids_of(batch.added)
                added = await self._index.add_each(holder, ids, batch.depths, _BUDGET_S)
                self.num_added += added.changed
                self.num_evicted += added.evicted
