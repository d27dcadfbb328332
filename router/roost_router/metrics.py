"""Prometheus metrics of a router: counters fed by finished requests, gauges read at scrape time.

Labels come from configuration (replica names) and from what replicas serve (model ids), never
from what a client sends, so that nobody can grow them without bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from roost_router.fleet.replica import Replica
    from roost_router.http.exchange import RequestRecord
    from roost_router.placement import Placer

_Metric = TypeVar("_Metric", Counter, Histogram)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class RouterMetrics:
    """All series of one router process, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._children: dict[tuple[Counter | Histogram, tuple[str, ...]], Counter | Histogram] = {}
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "roost_router_requests",
            "Requests by how they ended.",
            ("model", "replica", "outcome"),
            registry=registry,
        )
        self._refused = Counter(
            "roost_router_refused",
            "Requests refused before a replica was chosen.",
            ("status",),
            registry=registry,
        )
        self._retries = Counter(
            "roost_router_retries",
            "Attempts on another replica before the first byte.",
            ("reason",),
            registry=registry,
        )
        self._ttft = Histogram(
            "roost_router_ttft_seconds",
            "Time to first byte of streams.",
            ("replica",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._duration = Histogram(
            "roost_router_request_seconds",
            "Whole duration of requests.",
            ("replica",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "roost_router_prompt_tokens",
            "Prompt tokens of answered requests, as replicas counted them.",
            ("replica",),
            registry=registry,
        )
        self._cached_tokens = Counter(
            "roost_router_cached_tokens",
            "Prompt tokens that replicas took from their KV cache.",
            ("replica",),
            registry=registry,
        )
        self._matched_tokens = Counter(
            "roost_router_matched_tokens",
            "Prompt tokens that the router expected in the chosen replica's KV cache.",
            ("replica",),
            registry=registry,
        )

    def watch(self, placer: Placer) -> None:
        """Export gauges of `placer`'s fleet and index."""
        self.registry.register(_FleetCollector(placer))

    def observe(self, record: RequestRecord, *, known_model: bool) -> None:
        """Count a finished request."""
        model = record.model if known_model else "unknown"
        replica = record.replica or "none"
        self._child(self._requests, model, replica, record.outcome.value).inc()
        self._child(self._duration, replica).observe(record.duration_s)
        if record.ttft_s is not None:
            self._child(self._ttft, replica).observe(record.ttft_s)
        if record.prompt_tokens is not None:
            self._child(self._prompt_tokens, replica).inc(record.prompt_tokens)
            self._child(self._matched_tokens, replica).inc(record.matched_tokens or 0)
            self._child(self._cached_tokens, replica).inc(record.cached_tokens or 0)

    def _child(self, parent: _Metric, *labels: str) -> _Metric:
        """`parent.labels(*labels)`, remembered: it takes a lock and costs 2 µs each time."""
        key = (parent, labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = parent.labels(*labels)
        return cast("_Metric", child)

    def refused(self, status: int) -> None:
        """Count a request that was refused at the door."""
        self._refused.labels(str(status)).inc()

    def retried(self, reason: str) -> None:
        """Count an attempt on another replica."""
        self._retries.labels(reason).inc()


class _FleetCollector(Collector):
    """Gauges of the fleet and the index, read when asked for."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current values."""
        fleet, index = self._placer.fleet, self._placer.index
        gauges: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "replica_up": ("1 while requests may be placed there.", lambda r: r.is_up),
            "in_flight": ("Requests placed there, not yet ended.", lambda r: r.num_in_flight),
            "decoding": ("Streams running there.", lambda r: r.num_decoding),
            "queued_tokens": ("Uncached prompt tokens waiting there.", lambda r: r.queued_tokens),
            "resident_blocks": (
                "Text blocks believed resident.",
                lambda r: index.num_blocks(r.holder),
            ),
            "prefill_tokens_per_second": (
                "Fitted prefill speed.",
                fleet.prefill_tokens_per_s,
            ),
        }
        for name, (text, read) in gauges.items():
            family = GaugeMetricFamily(f"roost_router_{name}", text, labels=("replica",))
            for replica in fleet.replicas:
                family.add_metric((replica.name,), read(replica))
            yield family
        blocks = GaugeMetricFamily("roost_router_index_blocks", "Distinct blocks in the index.")
        blocks.add_metric((), len(index))
        yield blocks
