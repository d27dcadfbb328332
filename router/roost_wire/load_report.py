"""What a replica reports about itself, read from its Prometheus page.

Only the few lines that routing needs are looked at: parsing a whole vLLM page with a general
parser costs about 10 ms, and the router reads one page a second of every replica. Pure.

Missing metrics are None: a server that is not vLLM-like still gets routed to, with less known.
"""

import re
from math import isfinite

import msgspec

from roost_wire import vllm_metrics as names

_SAMPLE = re.compile(
    r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>[-+.\w]+)", re.MULTILINE
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_WANTED = frozenset(
    {
        names.NUM_REQUESTS_RUNNING,
        names.NUM_REQUESTS_WAITING,
        names.KV_CACHE_USAGE,
        names.CACHE_CONFIG_INFO,
        "process_start_time_seconds",
    }
)
_PREFIXES = tuple(sorted(_WANTED))
#: Larger capacities are nonsense, and would end up in sizes of data structures.
_MAX_TOKENS = 1 << 40


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's own figures at one moment."""

    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float | None = None  # share of KV blocks in use by requests, 0 to 1
    kv_capacity_tokens: int | None = None  # block_size * num_gpu_blocks
    started_at: float | None = None  # Unix seconds; another value means another process


def parse_load_report(page: str) -> LoadReport:
    """Read a Prometheus text page. Lines that do not parse are skipped; O(length of page).

    Samples of several engines behind one page (data parallel ranks) are added up, usage is
    averaged over them.
    """
    totals: dict[str, float] = {}
    num_usages = 0
    capacity: int | None = None
    for line in page.splitlines():
        if not line.startswith(_PREFIXES):
            continue
        match = _SAMPLE.match(line)
        if match is None or match["name"] not in _WANTED:
            continue
        if match["name"] == names.CACHE_CONFIG_INFO:
            tokens = _capacity(match["labels"] or "")
            capacity = tokens if capacity is None else capacity + (tokens or 0)
            continue
        value = _number(match["value"])
        if value is not None:
            totals[match["name"]] = totals.get(match["name"], 0.0) + value
            num_usages += match["name"] == names.KV_CACHE_USAGE
    return LoadReport(
        num_running=_count(totals.get(names.NUM_REQUESTS_RUNNING)),
        num_waiting=_count(totals.get(names.NUM_REQUESTS_WAITING)),
        kv_usage=totals[names.KV_CACHE_USAGE] / num_usages if num_usages else None,
        kv_capacity_tokens=capacity,
        started_at=totals.get("process_start_time_seconds"),
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
