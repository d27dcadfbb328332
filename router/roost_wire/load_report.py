"""What a replica reports about itself: on its Prometheus page, or unasked (told_load.py).

Only the few lines that routing needs are looked at: parsing a whole vLLM page with a general
parser costs about 10 ms, and the router reads one page a second of every replica. Pure.

Missing metrics are None: a server that is not vLLM-like still gets routed to, with less known.
"""

from __future__ import annotations

import re
from math import isfinite

import msgspec

from roost_wire import vllm_metrics as names
from roost_wire.told_load import ToldLoad

_SAMPLE = re.compile(
    r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>[-+.\w]+)", re.MULTILINE
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: Our engine's: ToldLoad.queued_tokens.
QUEUED_TOKENS = "roost_engine:queued_tokens"
#: What a sample is, by its name. Sources: vLLM's as in vllm_metrics.py; SGLang's
#: srt/observability/metrics_collector.py; TensorRT-LLM's metrics/collector.py; llama.cpp's
#: tools/server/README.md. SGLang and llama.cpp show theirs when started with an option.
_FIELDS = {
    names.NUM_REQUESTS_RUNNING: "num_running",
    "sglang:num_running_reqs": "num_running",
    "trtllm_num_requests_running": "num_running",
    "llamacpp:requests_processing": "num_running",
    names.NUM_REQUESTS_WAITING: "num_waiting",
    "sglang:num_queue_reqs": "num_waiting",
    "trtllm_num_requests_waiting": "num_waiting",
    "llamacpp:requests_deferred": "num_waiting",
    names.KV_CACHE_USAGE: "kv_usage",
    "sglang:token_usage": "kv_usage",
    "trtllm_kv_cache_utilization": "kv_usage",
    "sglang:max_total_num_tokens": "capacity",
    "trtllm_kv_cache_tokens_per_block": "tokens_per_block",
    "trtllm_kv_cache_max_blocks": "max_blocks",
    QUEUED_TOKENS: "queued_tokens",
    "process_start_time_seconds": "started_at",
}
_PREFIXES = (*_FIELDS, names.CACHE_CONFIG_INFO)
#: Larger capacities are nonsense, and would end up in sizes of data structures.
_MAX_TOKENS = 1 << 40


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's own figures at one moment."""

    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float | None = None  # share of KV blocks in use by requests, 0 to 1
    kv_capacity_tokens: int | None = None  # of all its KV blocks
    max_running: int | None = None  # requests; more than that wait in it
    started_at: float | None = None  # Unix seconds; another value means another process
    queued_tokens: int | None = None  # see told_load.py; only our engine tells

    def with_load(self, load: ToldLoad) -> LoadReport:
        """The report as of `load`; what that does not tell stays."""
        capacity = load.capacity_tokens
        return LoadReport(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_usage=min(1.0, load.used_tokens / capacity) if capacity else None,
            kv_capacity_tokens=capacity or None,
            max_running=self.max_running,
            started_at=self.started_at,
            queued_tokens=load.queued_tokens,
        )


def parse_load_report(page: str) -> LoadReport:
    """Read a Prometheus text page. Lines that do not parse are skipped; O(length of page).

    Samples of several engines behind one page (data parallel ranks) are added up, usage is
    averaged over them.
    """
    totals: dict[str, float] = {}
    num_usages = num_block_sizes = 0
    for line in page.splitlines():
        if not line.startswith(_PREFIXES):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            continue
        field, value = _FIELDS.get(match["name"]), _number(match["value"])
        if match["name"] == names.CACHE_CONFIG_INFO:
            field, value = "capacity", _capacity(match["labels"] or "")
        if field is not None and value is not None:
            totals[field] = totals.get(field, 0.0) + value
            num_usages += field == "kv_usage"
            num_block_sizes += field == "tokens_per_block"
    if num_block_sizes and "max_blocks" in totals:
        block_tokens = totals["tokens_per_block"] / num_block_sizes  # the same of every rank
        totals.setdefault("capacity", block_tokens * totals["max_blocks"])
    return LoadReport(
        num_running=_count(totals.get("num_running")),
        num_waiting=_count(totals.get("num_waiting")),
        kv_usage=totals["kv_usage"] / num_usages if num_usages else None,
        kv_capacity_tokens=_count(totals.get("capacity")) or None,
        started_at=totals.get("started_at"),
        queued_tokens=_count(totals.get("queued_tokens")),
    )


def _capacity(labels: str) -> int | None:
    found = dict(_LABEL.findall(labels))
    try:
        tokens = int(found["block_size"]) * int(found["num_gpu_blocks"])
    except (KeyError, ValueError):
        return None
    return tokens if 0 < tokens <= _MAX_TOKENS else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and 0 <= value <= _MAX_TOKENS else None
