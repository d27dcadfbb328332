"""Prometheus metrics of a router: plain counts on the hot path, turned into series at scrape time.

prometheus_client's own counters take a lock and several calls each, 25 µs for the seven that a
request moves; a router runs in one thread and counts in plain objects, for 1 µs.

Labels come from configuration (replica names) and from what replicas serve (model ids), never
from what a client sends, so that nobody can grow them without bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from roost_router.hit_ladder import HitLadder
from roost_router.kv_metrics import KvCollector
from roost_router.recent import RecentTraffic
from roost_router.rungs import RUNGS, ModelLadder
from roost_router.series import PREFIX, counter, gauge
from roost_router.store_metrics import StoreCollector

if TYPE_CHECKING:
    from roost_router.discovery.roster import SourceStatus
    from roost_router.dispatch import Dispatcher
    from roost_router.fleet.fleet import Fleet
    from roost_router.fleet.replica import Replica
    from roost_router.http.record import RequestRecord
    from roost_router.kv.follow import KvFollower
    from roost_router.placement import Placer
    from roost_router.policy.shadow import Shadow, ShadowReport
    from roost_router.store.link import Link
    from roost_router.tokens.prompts import PromptTokens
    from roost_router.told_residency import ToldResidency

_BUCKETS_S: Final[tuple[float, ...]] = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    25.0,
    60.0,
    120.0,
)
#: Seconds for which the series of a replica that is gone are told: until they were scraped, and as
#: far back as /fleet looks.
KEEP_GONE_S: Final = 600.0
_NOBODY: Final = "none"
_STATES: Final = ("joining", "up", "down", "draining")
_bisect: Final = bisect_left  # a Final is no look-up where this is compiled


class _Histogram:
    """Counts by bucket of one series."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)  # the last is beyond all buckets
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[_bisect(_BUCKETS_S, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        if not any(self._counts):
            return
        names = [*(str(bound) for bound in _BUCKETS_S), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets=buckets, sum_value=self._sum)


class _Series:
    """What is counted of the requests that ended on one replica."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], int] = {}  # by model and outcome
        self.ended_at = 0.0  # the last of them
        self.duration = _Histogram()
        self.ttft = _Histogram()
        # Of answers that told how long their prompt was:
        self.prompt_tokens = 0
        self.matched_tokens = 0
        self.cached_tokens = 0


class RouterMetrics(Collector):
    """All series of one router process, in a registry of its own."""

    def __init__(self, shadow: Shadow | None = None) -> None:
        """`shadow`: is shown the decisions behind all requests."""
        self.registry = CollectorRegistry()
        self.shadow = shadow
        self.ended_at = 0.0  # the last request, in seconds, monotonic
        self.ladder = HitLadder()
        self.recent = RecentTraffic()
        ProcessCollector(registry=self.registry)
        self._series: dict[str, _Series] = {}  # by replica
        self._refused: Counter[str] = Counter()  # by status
        self._retries: Counter[str] = Counter()  # by reason
        self._resumes: Counter[str] = Counter()  # by reason
        self.registry.register(self)

    def watch(self, placer: Placer) -> None:
        """Export gauges of `placer`'s fleet and index, and the hit ladder."""
        self.registry.register(_FleetCollector(placer))
        self.registry.register(_LadderCollector(placer, self))

    def watch_held(self, dispatcher: Dispatcher[Any], fleet: Fleet) -> None:
        """Export what waits: held by `dispatcher`, and queued on the replicas of `fleet`."""
        self.registry.register(_WaitingCollector(dispatcher, fleet))

    def watch_discovery(
        self, status: Callable[[], list[SourceStatus]], now: Callable[[], float]
    ) -> None:
        """Export how the sources of replicas do."""
        self.registry.register(_DiscoveryCollector(status, now))

    def watch_kv(self, told: ToldResidency, tokens: PromptTokens, follower: KvFollower) -> None:
        """Export what is known from KV events."""
        self.registry.register(KvCollector(told, tokens, follower))

    def watch_store(self, link: Link) -> None:
        """Export what is shared with other routers."""
        self.registry.register(StoreCollector(link))

    def observe(self, record: RequestRecord, *, known_model: bool) -> None:
        """Count a finished request."""
        name = record.replica or _NOBODY
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series()
        self.ended_at = series.ended_at = record.started_at + record.duration_s
        key = (record.model if known_model else "unknown", record.outcome)
        series.requests[key] = series.requests.get(key, 0) + 1
        series.duration.observe(record.duration_s)
        if record.ttft_s is not None:
            series.ttft.observe(record.ttft_s)
        if record.prompt_tokens is not None:
            series.prompt_tokens += record.prompt_tokens
            series.matched_tokens += record.matched_tokens or 0
            series.cached_tokens += record.cached_tokens or 0
        self.recent.add(record)
        self.ladder.add(record)
        if self.shadow is not None:
            _show(self.shadow, record)

    def prune(self, fleet: Fleet, now: float) -> None:
        """Drop what is kept for replicas that are gone. O(replicas)."""
        names = frozenset([replica.name for replica in (*fleet.replicas, *fleet.leaving)])
        kept = names | {_NOBODY}
        for name in [name for name in self._series if name not in kept]:
            if now - self._series[name].ended_at > KEEP_GONE_S:
                del self._series[name]
        self.recent.prune(names, now)
        if self.shadow is not None:
            self.shadow.retain(names)

    def refused(self, status: int) -> None:
        """Count a request that was refused at the door."""
        self._refused[str(status)] += 1

    def retried(self, reason: str) -> None:
        """Count an attempt on another replica."""
        self._retries[reason] += 1

    def resumed(self, reason: str) -> None:
        """Count a stream that was continued on another replica."""
        self._resumes[reason] += 1

    def ladders(self, placer: Placer, now: float) -> list[ModelLadder]:
        """The ladder of each model, with the capacity that its replicas are believed to have."""
        served, index = placer.fleet.models(), placer.index
        return [
            self.ladder.ladder(
                model, sum(index.capacity_bytes(r.holder) for r in served.get(model, ())), now
            )
            for model in self.ladder.models
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield the current values; called by prometheus_client."""
        counted: dict[tuple[str, ...], int] = {
            (model, name, outcome): count
            for name, series in self._series.items()
            for (model, outcome), count in series.requests.items()
        }
        labels = ("model", "replica", "outcome")
        yield counter("requests", "Requests by how they ended.", labels, counted)
        for kind, text, label, counts in (
            ("refused", "Refused before a replica was chosen.", "status", self._refused),
            ("retries", "Attempts on another replica.", "reason", self._retries),
            ("resumes", "Streams continued elsewhere.", "reason", self._resumes),
        ):
            yield counter(kind, text, (label,), {(of,): n for of, n in counts.items()})
        told = {(name,): series for name, series in self._series.items() if series.prompt_tokens}
        for kind, text, read in _TOKENS:
            yield counter(kind, text, ("replica",), {of: read(s) for of, s in told.items()})
        yield self._histogram("ttft_seconds", "Time to first token of streams.", _ttft)
        yield self._histogram("request_seconds", "Whole duration of requests.", _duration)
        if self.shadow is not None:
            yield from _shadow_gauges(self.shadow.report(self.ended_at))

    def _histogram(self, name: str, text: str, read: Callable[[_Series], _Histogram]) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=("replica",))
        for replica, series in self._series.items():
            read(series).add_to(family, (replica,))
        return family


def _ttft(series: _Series) -> _Histogram:
    return series.ttft


def _duration(series: _Series) -> _Histogram:
    return series.duration


_TOKENS: Final[tuple[tuple[str, str, Callable[[_Series], int]], ...]] = (
    ("prompt_tokens", "Of answered requests.", lambda series: series.prompt_tokens),
    ("matched_tokens", "Prompt tokens expected in cache.", lambda series: series.matched_tokens),
    ("cached_tokens", "Prompt tokens taken from cache.", lambda series: series.cached_tokens),
)


def _show(shadow: Shadow, record: RequestRecord) -> None:
    """Every decision behind a request: of attempts that were lost, and the last."""
    placements = [leg.placement for leg in record.lost_legs]
    if record.placement is not None and record.placement not in placements:
        placements.append(record.placement)
    ended_at = record.started_at + record.duration_s
    for placement in placements:
        chosen = placement.decision.chosen
        shadow.see(placement.model, placement.candidates, chosen, ended_at)


def _shadow_gauges(report: ShadowReport) -> Iterator[GaugeMetricFamily]:
    for name, text, value in (
        ("shadow_agreement_share", "Decisions that were the same.", report.agreement),
        ("shadow_wait_seconds", "Predicted to the first token, mean.", report.shadow_wait_s),
        ("shadow_hit_share", "Prompt tokens believed in cache.", report.shadow_hit_rate),
    ):
        family = GaugeMetricFamily(PREFIX + name, text, labels=("policy",))
        if value is not None:
            family.add_metric((report.policy,), value)
        yield family


class _FleetCollector(Collector):
    """Gauges of the fleet and the index, read when asked for."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        fleet, index = self._placer.fleet, self._placer.index
        replicas = [*fleet.replicas, *fleet.leaving]
        gauges: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "replica_up": ("1 while requests may be placed there.", lambda r: r.is_open),
            "replica_ejected": (
                "1 while failures keep requests away, or one may try it.",
                lambda r: r.health.ejected_until is not None,
            ),
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
            yield gauge(name, text, ("replica",), {(r.name,): read(r) for r in replicas})
        states: dict[tuple[str, ...], float] = {(state,): 0 for state in _STATES}
        for replica in replicas:
            states[replica.condition,] += 1
        yield gauge("replicas", "Replicas by state.", ("state",), states)
        for name, text, count in (
            ("replicas_added", "Replicas that joined, the first ones included.", fleet.num_added),
            ("replicas_removed", "Replicas that were removed.", fleet.num_removed),
        ):
            yield counter(name, text, (), {(): count})
        yield gauge("index_blocks", "Distinct blocks in the index.", (), {(): len(index)})


class _WaitingCollector(Collector):
    """Requests that wait for a replica that can start them, and how long all that waits takes.

    A router counts its own work only, so that the sum over routers is each replica's backlog.
    """

    def __init__(self, dispatcher: Dispatcher[Any], fleet: Fleet) -> None:
        self._dispatcher = dispatcher
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        text = "Requests held until a replica can start them."
        yield gauge("held_requests", text, (), {(): self._dispatcher.num_held})
        backlog = GaugeMetricFamily(
            "roost_backlog_seconds",
            "Prefill that this router has waiting for a replica, queued there or held.",
            labels=("replica",),
        )
        fleet, held_s = self._fleet, self._dispatcher.waiting_s()
        for replica in fleet.replicas:
            if replica.is_up:
                queued_s = replica.queued_tokens / fleet.prefill_tokens_per_s(replica)
                backlog.add_metric((replica.name,), queued_s + held_s.get(replica.name, 0.0))
        yield backlog


class _DiscoveryCollector(Collector):
    """Sources of replicas."""

    def __init__(self, status: Callable[[], list[SourceStatus]], now: Callable[[], float]) -> None:
        self._status = status
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        now, every = self._now(), self._status()
        told: dict[tuple[str, ...], float] = {(s.name,): s.num_told for s in every}
        yield gauge("discovery_replicas", "Replicas that a source tells of.", ("source",), told)
        failing: dict[tuple[str, ...], float] = {
            (s.name,): 0.0 if s.failing_since is None else now - s.failing_since for s in every
        }
        text = "For how long a source has failed; 0 while it answers."
        yield gauge("discovery_failing_seconds", text, ("source",), failing)


class _LadderCollector(Collector):
    """Where cache hits are lost, as of the end of the last request."""

    def __init__(self, placer: Placer, metrics: RouterMetrics) -> None:
        self._placer = placer
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current values."""
        family = GaugeMetricFamily(
            PREFIX + "hit_ladder_share",
            "Share of prompt tokens from cache, over ten minutes; hit_ladder.py tells the rungs.",
            labels=("model", "rung"),
        )
        for ladder in self._metrics.ladders(self._placer, self._metrics.ended_at):
            for rung, share in zip(RUNGS, ladder.recent.shares, strict=True):
                if share is not None:
                    family.add_metric((ladder.model, rung.name), share)
        yield family
