"""Series about the store and the routers that are heard through it, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from roost_router.series import counter, gauge

if TYPE_CHECKING:
    from roost_router.store.link import Link


class StoreCollector(Collector):
    """What is shared, and how well."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        """Yield the current values; called by prometheus_client."""
        link = self._link
        hearing = link.hearing
        text = "1 while the store answers and other routers are heard."
        yield gauge("store_up", text, (), {(): link.is_sharing})
        text = "Calls of the store that failed, by why."
        errors: dict[tuple[str, ...], int] = {
            (fault.value,): count
            for fault, count in (link.num_errors + link.feeder.num_errors).items()
        }
        yield counter("store_errors", text, ("reason",), errors)
        text = "From telling to hearing: seconds, of this router's last batch of news."
        yield gauge("news_lag_seconds", text, (), {(): link.lag_s})
        text = "Batches of news, told and heard; missed: of others, that never came."
        batches: dict[tuple[str, ...], int] = {
            ("told",): link.num_sent,
            ("heard",): hearing.num_batches,
            ("missed",): hearing.num_missed,
        }
        yield counter("news_batches", text, ("direction",), batches)
        text = "News that were not taken in, by why."
        void: dict[tuple[str, ...], int] = {
            (why,): count for why, count in (hearing.num_void + link.num_void).items()
        }
        yield counter("news_void", text, ("reason",), void)
        feeder = link.feeder
        text = "Blocks written to the index in Redis: new, gone, evicted to make room."
        written: dict[tuple[str, ...], int] = {
            ("added",): feeder.num_added,
            ("removed",): feeder.num_removed,
            ("evicted",): feeder.num_evicted,
        }
        yield counter("index_written_blocks", text, ("change",), written)
        text = "Replicas, and streams of KV events, that this router writes to the index."
        yield gauge("index_holders", text, (), {(): feeder.num_holders})
        text = "Times that all of one of them was written, the last epoch's blocks being dead."
        yield counter("index_begun", text, (), {(): feeder.num_begun})
        text = "Other routers that are heard."
        yield gauge("peers", text, (), {(): hearing.num_peers})
