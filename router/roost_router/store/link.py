"""Carries news between this router and the others, through the store. Chooses nothing.

    tell      a batch of the journal, FLUSH_S after there is something to tell, and every BEAT_S
    hear      what others appended, as it comes
    feed      which replicas this router is the feeder of (leases.py); snapshots of those, and
              what they hold, into the index (feeder.py)

A router that starts reads the snapshots, then the news since. Whenever the store is away, or what
was sent may not have arrived, the journal is closed: the router goes on alone, with what it knows,
and the others void its reservations, as it does theirs. Back again, it reads snapshots anew, for it
may have missed news, and tells whole views. Keys that hold what no router wrote are removed.

Not here: what news mean (shared/), how Redis is reached (client.py). The store is started and
closed by whoever made it (app.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from hashlib import blake2b
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from roost_router.shared import news
from roost_router.shared.hearing import BEAT_S
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.seal import Seal, SealError

if TYPE_CHECKING:
    from collections.abc import Callable

    from roost_router.fleet.fleet import Fleet
    from roost_router.fleet.replica import Replica
    from roost_router.index.prefix_index import PrefixIndex
    from roost_router.shared.hearing import Hearing
    from roost_router.shared.journal import Journal
    from roost_router.store.client import Store
    from roost_router.store.feeder import Feeder
    from roost_router.store.leases import Leases
    from roost_router.store.secret import ClusterSecret

#: Seconds from the first thing to tell to the batch that tells it, and between two reads: each
#: costs 0.2 ms of CPU, whatever is in it.
FLUSH_S: Final = 0.005
#: News are kept so long: more than enough between two snapshots.
KEPT_S: Final = 60.0
#: Between two snapshots of a replica, if anything changed.
SNAPSHOT_S: Final = 5.0
#: Snapshots outlive a cluster that is restarted as a whole.
_SNAPSHOT_TTL_S: Final = 3600.0
_TELL_BUDGET_S: Final = 0.5
_READ_BUDGET_S: Final = 2.0
#: A read waits so long for something to come.
_WAIT_S: Final = 1.0
_MOST_ENTRIES: Final = 256
_FIRST: Final = b"0-0"
#: Milliseconds by which what was told may be older than what was heard: replies that overtake.
_OVERTAKEN_MS: Final = 1000
#: What Redis says of keys that it will never let us use.
_HOPELESS: Final = ("WRONGTYPE", "exhausted the last possible ID")
_log = logging.getLogger(__name__)


class _Written(NamedTuple):
    """A snapshot."""

    state: tuple[int, int, int]  # holder, newest stamp, blocks
    at: float


class Link:
    """One router's."""

    def __init__(  # noqa: PLR0917
        self,
        store: Store,
        leases: Leases,
        secret: ClusterSecret,
        fleet: Fleet,
        index: PrefixIndex,
        journal: Journal,
        hearing: Hearing,
        feeder: Feeder,
        clock: Callable[[], float],
    ) -> None:
        self.store: Final = store
        self.feeder: Final = feeder
        self._leases: Final = leases
        self._fleet: Final = fleet
        self._index: Final = index
        self._journal: Final = journal
        self.hearing: Final = hearing
        self._clock: Final = clock
        self._prefix: Final = secret.prefix
        self._news_key: Final = secret.prefix + b"news"
        self._seal: Final = Seal(secret.seal_key)
        self._position = _FIRST  # of the last entry that was heard
        self._end = _FIRST  # of the last that was told
        self._grew_at = clock()  # when that had a later time than the one before
        self._tasks: list[asyncio.Task[None]] = []
        self._has_news = asyncio.Event()
        self._is_caught_up = asyncio.Event()
        self._sent: dict[int, float] = {}  # own batches that did not come back yet, and when
        self._written: dict[str, _Written] = {}  # by URL
        self._num_missed = 0
        self._reread_at = inf
        self.lag_s = 0.0  # of the last own batch: from its sending until it was heard
        self.num_sent = 0
        self.num_errors: Final[Counter[StoreFault]] = Counter()
        self.num_void: Final[Counter[str]] = Counter()  # entries that could not be read, by why

    async def start(self, wait_s: float) -> None:
        """Begin; return when what others know is known here, or after `wait_s`."""
        self._fleet.watch(self)
        self._journal.call(self._has_news.set)
        for work in (self._tell, self._hear, self._feed):
            self._tasks.append(asyncio.create_task(self._ever(work)))
        self._tasks.append(asyncio.create_task(self.feeder.run()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._is_caught_up.wait()

    def joined(self, replica: Replica) -> None:  # noqa: ARG002
        """A replica was added to the fleet: what others know of it is in its snapshot."""
        if self._is_caught_up.is_set():
            self._reread_at = self._clock() + BEAT_S

    def gone(self, replica: Replica) -> None:
        """It was removed."""
        self._written.pop(replica.url, None)

    @property
    def is_sharing(self) -> bool:
        """Whether others are told, and heard."""
        return self._journal.is_open

    async def close(self) -> None:
        """Tell what is left, let the others feed, stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(StoreError):
            if self._journal.is_open:
                await self._send(beat=True)
                await self._write_snapshots(inf)
            await self._leases.release()
        self._journal.close()

    async def _ever(self, work: Callable[[], object]) -> None:
        """Do it again and again; a store that is away is waited for."""
        while True:
            try:
                await work()  # type: ignore[misc]
            except StoreError as error:
                self._lost(error)
                if any(words in str(error) for words in _HOPELESS):
                    await self._remove()
                await asyncio.sleep(FLUSH_S if self.store.is_up else BEAT_S / 2)
            except Exception:  # noqa: BLE001
                # A defect of ours must not end the sharing for good, and never the routing.
                _log.exception("telling and hearing failed")
                self._lost(None)
                await asyncio.sleep(BEAT_S)

    def _lost(self, error: StoreError | None) -> None:
        if error is not None:
            self.num_errors[error.fault] += 1
        if self._journal.is_open:
            _log.info("on its own: %s", error)
        self._is_caught_up.clear()
        self._journal.close()
        self.hearing.forget()
        self._sent.clear()

    async def _remove(self) -> None:
        """Whatever is there instead of news and leases: no call would ever do away with it.

        Good news that go with it are missed, which those who hear make up for.
        """
        with contextlib.suppress(StoreError):
            await self.store.delete([self._news_key, self._prefix + b"leases"])

    async def _tell(self) -> None:
        await self._is_caught_up.wait()
        try:
            async with asyncio.timeout(BEAT_S):
                await self._has_news.wait()
            await asyncio.sleep(FLUSH_S)
            beat = False
        except TimeoutError:
            beat = True
        self._has_news.clear()
        if self._journal.is_open:
            await self._send(beat=beat)

    async def _send(self, *, beat: bool) -> None:
        now = self._clock()
        self.hearing.expire(now)
        batch = self._journal.take(self._fleet.replicas, self._index, beat=beat)
        if batch is None:
            return
        self._sent[batch.number] = now
        sealed = self._seal.close(news.pack(batch), self._news_key)
        milliseconds = max(0, _order(self._end)[0] - int(KEPT_S * 1e3))  # by the server's clock
        oldest = b"%d-0" % milliseconds
        end = await self.store.append(self._news_key, sealed, oldest, _TELL_BUDGET_S)
        self.num_sent += 1
        await self._judge(end, now)
        self._end = end

    async def _judge(self, end: bytes, now: float) -> None:
        """See whether ids are times still: an entry of the future ends hearing, and trimming.

        Raises StoreError where the stream is not the one that was heard.
        """
        if _order(end)[0] > _order(self._end)[0]:
            self._grew_at = now
        elif now - self._grew_at > KEPT_S:
            self._grew_at = now
            await self._remove()
        if _order(end)[0] + _OVERTAKEN_MS < _order(self._position)[0]:
            self._end = end
            raise StoreError(StoreFault.NONSENSE, "the news have begun anew")

    async def _hear(self) -> None:
        if not self._is_caught_up.is_set():
            await self._catch_up()
            self._journal.open()
            self._is_caught_up.set()
            _log.info("shares with %d other routers", self.hearing.num_peers)
        entries = await self.store.read_after(
            self._news_key, self._position, _WAIT_S, _MOST_ENTRIES
        )
        self._take_in(entries)
        if self._clock() > self._reread_at:
            self._reread_at = inf
            await self._read_snapshots()
        await asyncio.sleep(FLUSH_S)

    async def _catch_up(self) -> None:
        """Read the snapshots, then all news since the oldest of them."""
        end = await self.store.last_id(self._news_key, _READ_BUDGET_S)
        position = await self._read_snapshots()
        if _order(position) > _order(end):  # of a stream that is no more
            position = _FIRST
        while _order(position) < _order(end):
            entries = await self.store.read_range(
                self._news_key, b"(" + position, _MOST_ENTRIES, _READ_BUDGET_S
            )
            if not entries:
                break
            self._take_in(entries, end)
            position = self._position
            await asyncio.sleep(0)
        self._num_missed = self.hearing.num_missed
        self._position = max(position, end, key=_order)

    async def _read_snapshots(self) -> bytes:
        """Take in snapshots of all replicas; returns from where on news are needed."""
        keys = [self._snapshot_key(replica.url) for replica in self._fleet.replicas]
        position: bytes | None = None
        for key, value in zip(keys, await self._get(keys), strict=True):
            as_of = _FIRST
            if value is not None:
                as_of, _, sealed = value.partition(b" ")
                batch = self._open(sealed, key)
                if batch is None or not _is_id(as_of):
                    as_of = _FIRST
                else:
                    self.hearing.read_snapshot(batch)
            if position is None or _order(as_of) < _order(position):
                position = as_of
            await asyncio.sleep(0)
        return position or _FIRST

    async def _get(self, keys: list[bytes]) -> list[bytes | None]:
        return await self.store.get_many(keys, _READ_BUDGET_S) if keys else []

    def _take_in(self, entries: list[tuple[bytes, bytes]], end: bytes | None = None) -> None:
        """`end`: the last entry, where these are old: who told no more since lives no more."""
        now = self._clock()
        for position, sealed in entries:
            self._position = position
            at = now if end is None else now - (_order(end)[0] - _order(position)[0]) / 1e3
            batch = self._open(sealed, self._news_key)
            if batch is None:
                continue
            if batch.router == self._journal.router:
                self.lag_s = now - self._sent.pop(batch.number, now)
                continue
            try:
                self.hearing.hear(batch, at)
            except news.NewsError as error:
                self._void("nonsense", error)
        if self.hearing.num_missed != self._num_missed:  # what they said is in snapshots to come
            self._num_missed = self.hearing.num_missed
            self._reread_at = now + 2 * SNAPSHOT_S

    def _open(self, sealed: bytes, about: bytes) -> news.Batch | None:
        try:
            return news.unpack(self._seal.open(sealed, about))
        except SealError as error:
            self._void("not sealed", error)
        except news.NewsError as error:
            self._void("nonsense", error)
        return None

    def _void(self, why: str, error: Exception) -> None:
        if not self.num_void[why]:
            _log.warning("news that cannot be read are left out: %s", error)
        self.num_void[why] += 1

    async def _feed(self) -> None:
        await self._is_caught_up.wait()
        names = [replica.url.encode() for replica in self._fleet.replicas]
        fed = await self._leases.beat(names) if names else {}
        self.feeder.fences = {name.decode(): fence for name, fence in fed.items()}
        self._journal.feeding = frozenset(self.feeder.fences)
        await self._write_snapshots(self._clock() - SNAPSHOT_S)
        await asyncio.sleep(BEAT_S)

    async def _write_snapshots(self, written_before: float) -> None:
        for replica in self._fleet.replicas:
            if replica.url in self._journal.feeding:
                await self._write_snapshot(replica, written_before)

    async def _write_snapshot(self, replica: Replica, written_before: float) -> None:
        """Write down what is believed of a replica, if that is not what was written lately."""
        now, index, holder = self._clock(), self._index, replica.holder
        state = holder, index.newest(holder), index.num_blocks(holder)
        written = self._written.get(replica.url)
        if written is not None and (
            written.at > written_before or (written.state == state and now - written.at < KEPT_S)
        ):
            return  # what is unchanged may have been lost, or expire
        batch, key = self._journal.snapshot(replica, index), self._snapshot_key(replica.url)
        value = self._position + b" " + self._seal.close(news.pack(batch), key)
        await self._send(beat=False)  # nothing is written down that was not told
        await self.store.set(key, value, _SNAPSHOT_TTL_S, _TELL_BUDGET_S)
        self._written[replica.url] = _Written(state, now)

    def _snapshot_key(self, url: str) -> bytes:
        return self._prefix + b"view:" + blake2b(url.encode(), digest_size=8).hexdigest().encode()


def _is_id(position: bytes) -> bool:
    milliseconds, _, number = position.partition(b"-")
    return milliseconds.isdigit() and number.isdigit()


def _order(position: bytes) -> tuple[int, int]:
    """Ids of a stream's entries in their order: milliseconds and a number."""
    milliseconds, _, number = position.partition(b"-")
    return int(milliseconds), int(number)
