"""Prometheus metrics of a router: plain counts on the hot path, turned into series at scrape time.

prometheus_client's own counters take a lock and several calls each, 25 µs for the seven that a
request moves; a router runs in one thread and counts in dictionaries, for 3 µs.

Labels come from configuration (replica names) and from what replicas serve (model ids), never
from what a client sends, so that nobody can grow them without bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from roost_router.fleet.replica import Replica
    from roost_router.http.record import RequestRecord
    from roost_router.placement import Placer

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_PREFIX = "roost_router_"


class _Histogram:
    """Counts by bucket of one series."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)  # the last is beyond all buckets
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(_BUCKETS_S, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        names = [*(str(bound) for bound in _BUCKETS_S), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets=buckets, sum_value=self._sum)


class RouterMetrics(Collector):
    """All series of one router process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        # Counted on every request: Counter is four times a dict. Model, replica, outcome:
        self._requests: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._refused: Counter[tuple[str, ...]] = Counter()  # status
        self._retries: Counter[tuple[str, ...]] = Counter()  # reason
        self._resumes: Counter[tuple[str, ...]] = Counter()  # reason
        # By replica, as the next four:
        self._prompt_tokens: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._matched_tokens: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._cached_tokens: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._ttft: defaultdict[tuple[str, ...], _Histogram] = defaultdict(_Histogram)
        self._duration: defaultdict[tuple[str, ...], _Histogram] = defaultdict(_Histogram)
        self.registry.register(self)

    def watch(self, placer: Placer) -> None:
        """Export gauges of `placer`'s fleet and index."""
        self.registry.register(_FleetCollector(placer))

    def observe(self, record: RequestRecord, *, known_model: bool) -> None:
        """Count a finished request."""
        name = record.replica or "none"
        self._requests[record.model if known_model else "unknown", name, record.outcome] += 1
        replica = (name,)
        self._duration[replica].observe(record.duration_s)
        if record.ttft_s is not None:
            self._ttft[replica].observe(record.ttft_s)
        if record.prompt_tokens is not None:
            self._prompt_tokens[replica] += record.prompt_tokens
            self._matched_tokens[replica] += record.matched_tokens or 0
            self._cached_tokens[replica] += record.cached_tokens or 0

    def refused(self, status: int) -> None:
        """Count a request that was refused at the door."""
        self._refused[str(status),] += 1

    def retried(self, reason: str) -> None:
        """Count an attempt on another replica."""
        self._retries[reason,] += 1

    def resumed(self, reason: str) -> None:
        """Count a stream that was continued on another replica."""
        self._resumes[reason,] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield the current values; called by prometheus_client."""
        by_replica = ("replica",)
        yield _counter(
            "requests",
            "Requests by how they ended.",
            ("model", "replica", "outcome"),
            self._requests,
        )
        yield _counter(
            "refused", "Refused before a replica was chosen.", ("status",), self._refused
        )
        yield _counter("retries", "Attempts on another replica.", ("reason",), self._retries)
        yield _counter("resumes", "Streams continued elsewhere.", ("reason",), self._resumes)
        yield _counter("prompt_tokens", "Of answered requests.", by_replica, self._prompt_tokens)
        yield _counter(
            "matched_tokens", "Prompt tokens expected in cache.", by_replica, self._matched_tokens
        )
        yield _counter(
            "cached_tokens", "Prompt tokens taken from cache.", by_replica, self._cached_tokens
        )
        yield _histogram("ttft_seconds", "Time to first token of streams.", self._ttft)
        yield _histogram("request_seconds", "Whole duration of requests.", self._duration)


def _counter(
    name: str, text: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]
) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _histogram(name: str, text: str, series: dict[tuple[str, ...], _Histogram]) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=("replica",))
    for labels, histogram in series.items():
        histogram.add_to(family, labels)
    return family


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
            "prefill_tokens_per_second": ("Fitted prefill speed.", fleet.prefill_tokens_per_s),
        }
        for name, (text, read) in gauges.items():
            family = GaugeMetricFamily(_PREFIX + name, text, labels=("replica",))
            for replica in fleet.replicas:
                family.add_metric((replica.name,), read(replica))
            yield family
        blocks = GaugeMetricFamily(_PREFIX + "index_blocks", "Distinct blocks in the index.")
        blocks.add_metric((), len(index))
        yield blocks
