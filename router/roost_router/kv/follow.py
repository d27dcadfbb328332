"""Follows the KV events of all replicas: finds their streams, opens them, lets time pass.

A replica is asked where its events are when it comes up, and again when its process is another one
(`started_at` of its report). Its streams outlive its being down: ZeroMQ reconnects by itself.

What is known of a stream's trust, and what was left out and why, is in `status`.

Not here: what the streams say (feed.py), who takes the blocks in (sink.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Replica
from roost_router.http.upstream import UpstreamPool
from roost_router.kv.discovery import discover
from roost_router.kv.feed import Feed
from roost_router.kv.sink import KvSink
from roost_router.kv.source import Dialect, KvSource
from roost_router.kv.tensorrt_poller import TensorRtPoller
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_dialects.dialect import LeftOut
from roost_wire.kv_dialects.sglang import SglangDecoder
from roost_wire.kv_dialects.vllm import VllmDecoder
from roost_wire.told_load import ToldLoad

if TYPE_CHECKING:
    import zmq

_log = logging.getLogger(__name__)

TICK_S: Final = 0.25
#: Until a replica that did not answer is asked again.
_RETRY_S: Final = 5.0
_TIMEOUT_S: Final = 5.0


class Stream(Protocol):
    """A Subscriber or a TensorRtPoller."""

    source: KvSource
    num_batches: int
    num_undecodable: int

    @property
    def feeds(self) -> dict[int, Feed]: ...  # noqa: D102
    @property
    def left_out(self) -> Counter[LeftOut]: ...  # noqa: D102
    def tick(self) -> None: ...  # noqa: D102
    def restarted(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class StreamStatus(msgspec.Struct, frozen=True):
    """One stream as metrics and tables show it."""

    replica: str
    rank: int
    dialect: Dialect
    trust: Trust
    reason: Reason
    losses: dict[str, int]  # by reason, since it is followed
    #: The rest is of the whole connection: where it carries several ranks, told with the first.
    num_batches: int
    num_undecodable: int
    left_out: dict[str, int]


class _Followed:
    """What is known of one replica's streams."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.sources: list[KvSource] = []
        self.streams: list[Stream] = []
        self.sinks: list[KvSink] = []
        self.asking: asyncio.Task[None] | None = None
        self.ask_after = float("-inf")
        self.was_found = False  # at least once, and since it last started
        self.started_at: float | None = None

    def must_ask(self) -> bool:
        if self.started_at is None:
            self.started_at = self.replica.started_at
        is_asking = self.asking is not None and not self.asking.done()
        is_new = not self.was_found or self.started_at != self.replica.started_at
        return self.replica.is_up and is_new and not is_asking


class KvFollower:
    """The streams of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        make_sink: Callable[[Replica, int], KvSink],
        authorization: Callable[[], str | None],
        clock: Callable[[], float],
        on_reseeding: Callable[[str, bool], None] = lambda _name, _is_asked: None,
        *,
        on_load: Callable[[Replica, ToldLoad], None] = lambda _replica, _load: None,
    ) -> None:
        """`make_sink` is asked for each stream of a replica, by its data-parallel rank.

        `on_reseeding`: a replica enters, or leaves, `reseeding`. `on_load`: one told its load.
        """
        self._on_load = on_load
        self._on_reseeding = on_reseeding
        self._reseeding: frozenset[str] = frozenset()
        self._make_sink = make_sink
        self._authorization = authorization
        self._clock = clock
        self._followed: dict[str, _Followed] = {}
        self._context: zmq.Context[Any] | None = None
        fleet.watch(self)

    def joined(self, replica: Replica) -> None:
        """Ask it for its streams once it is up."""
        self._followed[replica.name] = _Followed(replica)

    def gone(self, replica: Replica) -> None:
        """Close its streams."""
        followed = self._followed.pop(replica.name)
        if followed.asking is not None:
            followed.asking.cancel()
        self._leave(followed)
        self._reseeding -= {replica.name}

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                self._tick()
                await asyncio.sleep(TICK_S)
        finally:
            await self._close()

    @property
    def reseeding(self) -> frozenset[str]:
        """Replicas whose requests should have them report what they reuse (report_mode.py)."""
        return self._reseeding

    def _find_reseeding(self, now: float) -> frozenset[str]:
        return frozenset(
            name
            for name, followed in self._followed.items()
            for stream in followed.streams
            if stream.source.dialect is Dialect.VLLM
            if any(feed.should_reseed(now) for feed in stream.feeds.values())
        )

    def status(self) -> list[StreamStatus]:
        """All streams, by replica and rank."""
        return [
            StreamStatus(
                followed.replica.name,
                rank,
                stream.source.dialect,
                feed.trust,
                feed.reason,
                {why.value: count for why, count in feed.losses.items()},
                0 if place else stream.num_batches,
                0 if place else stream.num_undecodable,
                {} if place else {why.value: count for why, count in stream.left_out.items()},
            )
            for followed in self._followed.values()
            for stream in followed.streams
            for place, (rank, feed) in enumerate(stream.feeds.items())
        ]

    def _tick(self) -> None:
        now = self._clock()
        for followed in list(self._followed.values()):
            if followed.must_ask() and now >= followed.ask_after:
                followed.ask_after = now + _RETRY_S
                followed.asking = asyncio.ensure_future(self._find(followed))
            for stream in followed.streams:
                try:
                    stream.tick()
                except Exception:  # noqa: BLE001
                    # A defect of ours in one stream must not end the following of the others.
                    _log.exception("a tick of %s failed", stream.source.endpoint)
        reseeding = self._find_reseeding(now)
        for name in reseeding ^ self._reseeding:
            self._on_reseeding(name, name in reseeding)
        self._reseeding = reseeding

    async def _find(self, followed: _Followed) -> None:
        """Learn where the replica's streams are, and follow them."""
        replica, started_at = followed.replica, followed.replica.started_at
        loop = asyncio.get_running_loop()
        with contextlib.closing(UpstreamPool(replica.url, loop, _TIMEOUT_S)) as pool:
            try:
                sources = await discover(
                    pool, replica.url, replica.dialect, self._authorization(), _TIMEOUT_S
                )
                if sources == followed.sources:
                    for stream in followed.streams:
                        stream.restarted()
                else:
                    self._replace(followed, sources)
            except (OSError, ValueError) as error:
                # zmq.ZMQError is an OSError, SourceError and PageError are ValueErrors.
                _log.warning("KV events of %s are not followed: %s", replica.name, error)
                return
        followed.was_found, followed.started_at = True, started_at

    def _replace(self, followed: _Followed, sources: list[KvSource]) -> None:
        self._leave(followed)
        for source in sources:
            followed.streams.append(self._open(followed, source))
            _log.info("KV events of %s: %s", followed.replica.name, source.endpoint)
        followed.sources = sources

    def _open(self, followed: _Followed, source: KvSource) -> Stream:
        def make_sink(rank: int) -> KvSink:
            sink = self._make_sink(followed.replica, rank)
            followed.sinks.append(sink)
            return sink

        if source.dialect is Dialect.TENSORRT_LLM:
            return TensorRtPoller(source, make_sink, self._authorization, self._clock)
        # ZeroMQ takes 50 ms to import: a router without events does not pay.
        import zmq  # noqa: PLC0415

        from roost_router.kv.subscriber import Subscriber  # noqa: PLC0415

        if self._context is None:
            self._context = zmq.Context()
        decoder = SglangDecoder() if source.dialect is Dialect.SGLANG else VllmDecoder()
        sink, on_load = make_sink(source.rank), partial(self._on_load, followed.replica)
        return Subscriber(self._context, source, decoder, sink, self._clock, on_load=on_load)

    def _leave(self, followed: _Followed) -> None:
        """Close its streams: what they told is not known to hold any more."""
        for stream in followed.streams:
            stream.close()
        for sink in followed.sinks:
            sink.drop_all()
            sink.trust_changed(Trust.BLIND, Reason.NOT_HEARD)
        followed.streams, followed.sinks, followed.sources = [], [], []

    async def _close(self) -> None:
        every = self._followed.values()
        asking = [followed.asking for followed in every if followed.asking is not None]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for followed in every:
            self._leave(followed)
        if self._context is not None:
            self._context.destroy(linger=0)
