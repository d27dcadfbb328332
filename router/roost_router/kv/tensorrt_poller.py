"""Follows a TensorRT-LLM server, which hands out its KV events to whoever asks. Decides nothing.

`GET /kv_cache_events` empties the server's queue: whatever answer is lost is lost, and two routers
that ask one server take each other's events; both see gaps and know that they know a part. Ranks
of attention data parallelism come in one answer and have a feed each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool
from roost_router.kv.feed import Apply, DropAll, Effect, Feed, TrustChanged
from roost_router.kv.sink import KvSink
from roost_router.kv.source import KvSource
from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut
from roost_wire.kv_dialects.tensorrt_llm import TensorRtLlmDecoder

_log = logging.getLogger(__name__)

POLL_S: Final = 0.5
_TIMEOUT_S: Final = 5.0


class TensorRtPoller:
    """One server polled. Used on the event loop only; to be closed."""

    def __init__(
        self,
        source: KvSource,
        make_sink: Callable[[int], KvSink],
        authorization: Callable[[], str | None],
        clock: Callable[[], float],
    ) -> None:
        """`make_sink` is asked once for each rank, when it first has events."""
        assert source.block_size is not None
        self.source = source
        self.num_batches = 0
        self.num_undecodable = 0
        self._make_sink = make_sink
        self._authorization = authorization
        self._clock = clock
        self._decoder = TensorRtLlmDecoder(source.block_size)
        self._ranks: dict[int, tuple[Feed, KvSink]] = {}
        self._pool = UpstreamPool(source.endpoint, asyncio.get_running_loop(), _TIMEOUT_S)
        self._poll_after = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def left_out(self) -> Counter[LeftOut]:
        """Events that were not told on."""
        return self._decoder.left_out

    @property
    def feeds(self) -> dict[int, Feed]:
        """By rank."""
        return {rank: feed for rank, (feed, _) in self._ranks.items()}

    def tick(self) -> None:
        """Time has passed; to be called a few times a second."""
        now = self._clock()
        is_polling = self._task is not None and not self._task.done()
        if not is_polling and now >= self._poll_after:
            self._poll_after = now + POLL_S
            self._task = asyncio.ensure_future(self._poll())

    def restarted(self) -> None:
        """The server is known to be a new process."""
        for feed, sink in self._ranks.values():
            _carry_out(feed.restarted(self._clock()), sink)

    def close(self) -> None:
        """Stop at once."""
        if self._task is not None:
            self._task.cancel()
        self._pool.close()

    async def _poll(self) -> None:
        with contextlib.suppress(OSError, PageError):  # it may be down; gaps will show
            page = await get_page(
                self._pool, b"/kv_cache_events", self._authorization(), _TIMEOUT_S
            )
            if page.status == 200:
                self._take(page.body)

    def _take(self, body: bytes) -> None:
        now = self._clock()
        try:
            batches = self._decoder.decode(body, sent_at=now)
        except KvDecodeError as error:
            self.num_undecodable += 1
            _log.debug("events of %s: %s", self.source.endpoint, error)
            return
        self.num_batches += len(batches)
        for batch in batches:
            rank = batch.rank or 0
            if rank not in self._ranks:
                self._ranks[rank] = (Feed(can_replay=False), self._make_sink(rank))
            feed, sink = self._ranks[rank]
            _carry_out(feed.receive(batch, now), sink)


def _carry_out(effects: list[Effect], sink: KvSink) -> None:
    for effect in effects:
        match effect:
            case Apply(events):
                sink.apply(events)
            case DropAll():
                sink.drop_all()
            case TrustChanged(trust, reason):
                sink.trust_changed(trust, reason)
            case _:
                raise AssertionError("there is no replay to ask for")
