"""Makes deploy/grafana/*.json, and alerts.yaml as the Prometheus operator takes it.

    python deploy/dashboards.py

A board is rows of panels, a panel is what is asked and in which unit; where a panel lies and how
Grafana writes it down follows. What is made is committed, and tests/deploy/test_dashboards.py says
so when it is not what this file makes.

Not here: what series there are (docs/operations.md), when to worry (prometheus/alerts.yaml).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_HERE: Final = Path(__file__).parent
_COLUMNS: Final = 24  # of Grafana's grid
_WIDTH: Final = 8
_HEIGHT: Final = 7
_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
#: As long as Grafana thinks that a rate needs.
_RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """Lines over time. `unit` is Grafana's; `lines` are expressions by their legend."""

    title: str
    unit: str
    lines: dict[str, str]
    about: str = ""


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of at most three panels, by the rows' titles."""

    title: str
    rows: dict[str, list[Panel]]


def _rate(name: str, by: str = "", where: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({name}{where}{_RATE}))"


def _quantiles(name: str) -> dict[str, str]:
    return {
        f"p{share * 100:g}": f"histogram_quantile({share}, {_rate(name + '_bucket', 'le')})"
        for share in (0.5, 0.9, 0.99)
    }


def _share(part: str, whole: str, by: str = "") -> str:
    return f"{_rate(part, by)} / {_rate(whole, by)}"


_REQUESTS: Final = "roost_router_requests_total"
_PROMPT: Final = "roost_router_prompt_tokens_total"
_CACHED: Final = "roost_router_cached_tokens_total"
_MATCHED: Final = "roost_router_matched_tokens_total"

BOARDS: Final = {
    "router": Board(
        "Roost: routers",
        {
            "What clients see": [
                Panel("Requests", "reqps", {"{{outcome}}": _rate(_REQUESTS, "outcome")}),
                Panel("Time to first token", "s", _quantiles("roost_router_ttft_seconds")),
                Panel("Whole requests", "s", _quantiles("roost_router_request_seconds")),
            ],
            "What is kept from them": [
                Panel(
                    "Attempts on another replica",
                    "reqps",
                    {"{{reason}}": _rate("roost_router_retries_total", "reason")},
                ),
                Panel(
                    "Streams continued elsewhere",
                    "reqps",
                    {"{{reason}}": _rate("roost_router_resumes_total", "reason")},
                ),
                Panel(
                    "Refused at the door",
                    "reqps",
                    {"{{status}}": _rate("roost_router_refused_total", "status")},
                ),
            ],
            "What waits": [
                Panel(
                    "Held",
                    "short",
                    {"{{instance}}": "sum by (instance) (roost_router_held_requests)"},
                    "Requests that no replica could start yet.",
                ),
                Panel(
                    "In flight",
                    "short",
                    {"{{instance}}": "sum by (instance) (roost_router_in_flight)"},
                ),
                Panel(
                    "Backlog",
                    "s",
                    {
                        "mean": "avg(sum by (replica) (roost_backlog_seconds))",
                        "longest": "max(sum by (replica) (roost_backlog_seconds))",
                    },
                    "Seconds of prefill that wait for a replica, over all routers.",
                ),
            ],
            "Processes": [
                Panel(
                    "CPU",
                    "percentunit",
                    {
                        "{{instance}}": "sum by (instance) "
                        f'(rate(process_cpu_seconds_total{{job="roost-router"}}{_RATE}))'
                    },
                ),
                Panel(
                    "Memory",
                    "bytes",
                    {"{{instance}}": 'process_resident_memory_bytes{job="roost-router"}'},
                ),
                Panel(
                    "Open files",
                    "short",
                    {
                        "{{instance}}": 'process_open_fds{job="roost-router"}',
                        "{{instance}} at most": 'process_max_fds{job="roost-router"}',
                    },
                ),
            ],
        },
    ),
    "fleet": Board(
        "Roost: fleet and caches",
        {
            "Replicas": [
                Panel("Up", "short", {"{{replica}}": "max by (replica) (roost_router_replica_up)"}),
                Panel(
                    "Ejected",
                    "short",
                    {"{{replica}}": "max by (replica) (roost_router_replica_ejected)"},
                ),
                Panel("Requests", "reqps", {"{{replica}}": _rate(_REQUESTS, "replica")}),
            ],
            "Load": [
                Panel("Backlog", "s", {"{{replica}}": "sum by (replica) (roost_backlog_seconds)"}),
                Panel(
                    "Streams", "short", {"{{replica}}": "sum by (replica) (roost_router_decoding)"}
                ),
                Panel(
                    "Prefill speed, tokens a second",
                    "short",
                    {"{{replica}}": "avg by (replica) (roost_router_prefill_tokens_per_second)"},
                ),
            ],
            "Caches": [
                Panel(
                    "Prompt tokens from cache",
                    "percentunit",
                    {"all": _share(_CACHED, _PROMPT), "believed": _share(_MATCHED, _PROMPT)},
                ),
                Panel(
                    "By replica",
                    "percentunit",
                    {"{{replica}}": _share(_CACHED, _PROMPT, "replica")},
                ),
                Panel(
                    "Where hits are lost",
                    "percentunit",
                    {"{{model}} {{rung}}": "avg by (model, rung) (roost_router_hit_ladder_share)"},
                    "Each rung is what is left of the one before: docs/operations.md.",
                ),
            ],
            "KV events": [
                Panel(
                    "Batches",
                    "ops",
                    {"{{replica}}": _rate("roost_router_kv_batches_total", "replica")},
                ),
                Panel(
                    "Losses",
                    "ops",
                    {
                        "{{replica}} {{reason}}": _rate(
                            "roost_router_kv_losses_total", "replica, reason"
                        )
                    },
                ),
                Panel(
                    "Streams that are exact",
                    "percentunit",
                    {"{{replica}}": "avg by (replica) (roost_router_kv_stream_exact)"},
                ),
            ],
            "What routers remember": [
                Panel(
                    "Blocks of text",
                    "short",
                    {"{{instance}}": "sum by (instance) (roost_router_index_blocks)"},
                ),
                Panel(
                    "Memory for KV events",
                    "bytes",
                    {"{{instance}}": "sum by (instance) (roost_router_kv_index_bytes)"},
                ),
                Panel(
                    "Prompts that wait to be tokenised",
                    "short",
                    {"{{instance}}": "sum by (instance) (roost_router_tokenizer_waiting)"},
                ),
            ],
        },
    ),
    "engine": Board(
        "Roost: engines",
        {
            "Work": [
                Panel(
                    "Running",
                    "short",
                    {"{{instance}}": "sum by (instance) (vllm:num_requests_running)"},
                ),
                Panel(
                    "Waiting",
                    "short",
                    {"{{instance}}": "sum by (instance) (vllm:num_requests_waiting)"},
                ),
                Panel(
                    "Tokens left to compute of prompts",
                    "short",
                    {"{{instance}}": "sum by (instance) (roost_engine:queued_tokens)"},
                ),
            ],
            "Speed": [
                Panel(
                    "Tokens a second",
                    "short",
                    {
                        "generated": _rate("vllm:generation_tokens_total"),
                        "prompts computed": _rate("roost_engine:prefill_tokens_total"),
                    },
                ),
                Panel("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
                Panel("Between tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
            ],
            "KV memory": [
                Panel(
                    "In use",
                    "percentunit",
                    {"{{instance}}": "avg by (instance) (vllm:kv_cache_usage_perc)"},
                ),
                Panel(
                    "Found in the cache",
                    "percentunit",
                    {
                        "{{instance}}": _share(
                            "vllm:prefix_cache_hits_total",
                            "vllm:prefix_cache_queries_total",
                            "instance",
                        )
                    },
                ),
                Panel(
                    "Preempted",
                    "reqps",
                    {"{{instance}}": _rate("vllm:num_preemptions_total", "instance")},
                ),
            ],
            "Ends": [
                Panel(
                    "Requests",
                    "reqps",
                    {"{{finished_reason}}": _rate("vllm:request_success_total", "finished_reason")},
                ),
                Panel(
                    "Refused: too late",
                    "reqps",
                    {"{{instance}}": _rate("roost_engine:expired_requests_total", "instance")},
                ),
                Panel(
                    "Memory",
                    "bytes",
                    {"{{instance}}": 'process_resident_memory_bytes{job="roost-engine"}'},
                ),
            ],
        },
    ),
    "store": Board(
        "Roost: what routers share",
        {
            "Redis": [
                Panel(
                    "Reached",
                    "short",
                    {"{{instance}}": "min by (instance) (roost_router_store_up)"},
                ),
                Panel(
                    "Errors",
                    "ops",
                    {"{{reason}}": _rate("roost_router_store_errors_total", "reason")},
                ),
                Panel(
                    "Other routers heard",
                    "short",
                    {"{{instance}}": "max by (instance) (roost_router_peers)"},
                ),
            ],
            "News": [
                Panel(
                    "Late by",
                    "s",
                    {"{{instance}}": "max by (instance) (roost_router_news_lag_seconds)"},
                ),
                Panel(
                    "Batches",
                    "ops",
                    {
                        "{{instance}} {{direction}}": _rate(
                            "roost_router_news_batches_total", "instance, direction"
                        )
                    },
                ),
                Panel(
                    "Prompt tokens from cache, by router",
                    "percentunit",
                    {"{{instance}}": _share(_CACHED, _PROMPT, "instance")},
                    "Routers that hear each other find the same.",
                ),
            ],
        },
    ),
}


def dashboard(name: str, board: Board) -> dict[str, Any]:
    """`board` as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in board.rows.items():
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        for column, panel in enumerate(row):
            place = {"x": column * _WIDTH, "y": y + 1, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel(panel, place))
        y += 1 + _HEIGHT
    for number, made in enumerate(panels, 1):
        made["id"] = number
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"}
    return {
        "uid": f"roost-{name}",
        "title": board.title,
        "tags": ["roost"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    lines = panel.lines.items()
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "legendFormat": of,
                "expr": expr,
            }
            for number, (of, expr) in enumerate(lines)
        ],
    }


def made() -> dict[Path, str]:
    """All that this file makes, by where it lies."""
    files = {
        _HERE / "grafana" / f"{name}.json": json.dumps(dashboard(name, board), indent=1) + "\n"
        for name, board in BOARDS.items()
    }
    rules = (_HERE / "prometheus" / "alerts.yaml").read_text()
    _, _, groups = rules.partition("groups:\n")
    indented = "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(True))
    files[_HERE / "kustomize" / "components" / "monitoring" / "rules.yaml"] = (
        "# Made by deploy/dashboards.py from deploy/prometheus/alerts.yaml.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n"
        f"  name: roost\nspec:\n  groups:\n{indented}"
    )
    return files


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)
