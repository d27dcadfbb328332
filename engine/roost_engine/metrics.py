"""Prometheus metrics of one replica, under vLLM's names so that any router can read them.

Gauges and counters are read from scheduler and pool when somebody scrapes: the engine counts in
plain integers and does not know this module. Only the latency histograms are fed from outside,
through RequestTimes, which the front end tells of every delta.

Beside vLLM's names, where vLLM counts nothing of the kind:

    roost_engine:prefill_tokens     prompt tokens computed, not taken from the cache; recomputation
                                    included
    roost_engine:queued_tokens      left to compute of prompts, as told to routers (told_load.py)
    roost_engine:free_blocks        blocks that can be allocated now
    roost_engine:restored_tokens    copied back from host memory instead of computed
    roost_engine:host_blocks_used   blocks in host memory now
    roost_engine:expired_requests   refused because their deadline passed while they waited
    roost_engine:broken_pins        pins given up because a request could not run beside them

Invariants: one registry per replica, nothing global; all series carry model_name and engine.

Not here: the names (roost_wire.vllm_metrics), the endpoint (server.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from roost_wire import vllm_metrics as names
from roost_wire.load_report import QUEUED_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from roost_engine.core import EngineCore
    from roost_engine.request import FinishReason

PREFILL_TOKENS: Final = "roost_engine:prefill_tokens"
FREE_BLOCKS: Final = "roost_engine:free_blocks"
RESTORED_TOKENS: Final = "roost_engine:restored_tokens"
HOST_BLOCKS_USED: Final = "roost_engine:host_blocks_used"
EXPIRED_REQUESTS: Final = "roost_engine:expired_requests"
BROKEN_PINS: Final = "roost_engine:broken_pins"

# Seconds. vLLM's buckets, thinned out where a decision would not change.
_TTFT_BUCKETS: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 80)
_ITL_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_E2E_BUCKETS: Final = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 480)

_LABELS: Final = ("model_name", "engine")


class EngineMetrics:
    """The registry of one replica and what feeds it."""

    def __init__(self, model_name: str, core: EngineCore) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # its start time tells routers of a restart
        self._label_values = (model_name, "0")
        self._registry.register(_EngineCollector(core, self._label_values))
        self.ttft = self._histogram(
            names.TIME_TO_FIRST_TOKEN, "From arrival to first token.", _TTFT_BUCKETS
        )
        self.itl = self._histogram(names.INTER_TOKEN_LATENCY, "Between two tokens.", _ITL_BUCKETS)
        self.e2e = self._histogram(names.E2E_LATENCY, "From arrival to the end.", _E2E_BUCKETS)
        self._finished = Counter(
            names.REQUEST_SUCCESS,
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )

    def start_request(self, arrival_s: float) -> RequestTimes:
        """Follow one request; `arrival_s` is monotonic."""
        return RequestTimes(self, arrival_s)

    def count_finished(self, reason: FinishReason) -> None:
        """Count a request that ended."""
        self._finished.labels(*self._label_values, reason.value).inc()

    def render(self) -> bytes:
        """Text exposition format 0.0.4."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            name, documentation, _LABELS, buckets=buckets, registry=self._registry
        )
        return histogram.labels(*self._label_values)


class RequestTimes:
    """Feeds the latency histograms for one request. All times are monotonic seconds."""

    def __init__(self, metrics: EngineMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._last_token_s: float | None = None

    def note_tokens(self, count: int, now: float) -> None:
        """`count` tokens arrived together, after the first one evenly spaced in time."""
        if self._last_token_s is None:
            self._metrics.ttft.observe(now - self._arrival_s)
        else:
            for _ in range(count):
                self._metrics.itl.observe((now - self._last_token_s) / count)
        self._last_token_s = now

    def note_end(self, reason: FinishReason, now: float) -> None:
        """The request ended."""
        self._metrics.e2e.observe(now - self._arrival_s)
        self._metrics.count_finished(reason)


class _EngineCollector(Collector):
    """Reads scheduler and pool at scrape time. The numbers may be a step apart, never torn."""

    def __init__(self, core: EngineCore, label_values: tuple[str, ...]) -> None:
        self._core = core
        self._label_values = label_values

    def collect(self) -> Iterator[Metric]:
        """All series, current values."""
        scheduler, load = self._core.scheduler, self._core.load
        pool, counters = scheduler.pool, scheduler.counters
        yield self._gauge(names.NUM_REQUESTS_RUNNING, "With blocks.", scheduler.num_running)
        yield self._gauge(names.NUM_REQUESTS_WAITING, "Without blocks.", self._core.num_waiting)
        yield self._gauge(names.KV_CACHE_USAGE, "Share of blocks in use, 0 to 1.", pool.usage)
        yield self._gauge(QUEUED_TOKENS, "Left to compute of prompts.", load.queued_tokens)
        yield self._gauge(FREE_BLOCKS, "Blocks that can be allocated now.", pool.num_free)
        yield self._gauge(HOST_BLOCKS_USED, "Blocks in host memory.", pool.num_host_used)
        yield self._cache_config()
        yield self._counter(
            names.PREFIX_CACHE_QUERIES, "Prompt tokens looked up.", counters.prefix_queries_tokens
        )
        yield self._counter(
            names.PREFIX_CACHE_HITS, "Prompt tokens found.", counters.prefix_hits_tokens
        )
        yield self._counter(
            names.PROMPT_TOKENS, "Tokens of admitted prompts.", counters.prefix_queries_tokens
        )
        yield self._counter(
            names.GENERATION_TOKENS, "Tokens generated.", counters.generation_tokens
        )
        yield self._counter(names.NUM_PREEMPTIONS, "Preemptions.", counters.preemptions)
        yield self._counter(PREFILL_TOKENS, "Prompt tokens computed.", counters.prefill_tokens)
        yield self._counter(
            RESTORED_TOKENS, "Tokens copied back from host memory.", counters.restored_tokens
        )
        yield self._counter(EXPIRED_REQUESTS, "Deadlines passed in the queue.", counters.expired)
        yield self._counter(BROKEN_PINS, "Pins given up for a request.", counters.pins_broken)

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._label_values, value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._label_values, value)
        return family

    def _cache_config(self) -> Metric:
        pool = self._core.scheduler.pool
        family = GaugeMetricFamily(
            names.CACHE_CONFIG_INFO,
            "Shape of the KV cache; the value is always 1.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks"),
        )
        sizes = (str(pool.block_size), str(pool.num_blocks))
        family.add_metric((*self._label_values, *sizes), 1)
        return family
