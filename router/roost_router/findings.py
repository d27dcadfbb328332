"""What is wrong with replicas, as far as a router sees it, and what mends it. Pure.

Each finding has a severity:

    error      requests fail, or every prompt is computed anew
    warning    requests are placed worse than they could be
    note       worth knowing

Flags are those of vLLM 0.33, SGLang 0.5.23, llama.cpp's server and trtllm-serve 1.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from roost_wire.llama_cpp import LLAMA_CPP

if TYPE_CHECKING:
    from roost_router.fleet_page import ReplicaRow, SourceRow

Severity = Literal["error", "warning", "note"]

#: Answers in ten minutes before silence about the cache says something.
MIN_ANSWERS: Final = 10
#: Tokens expected from a cache before none at all says something.
MIN_MATCHED_TOKENS: Final = 10_000
#: A replica so many times slower than the others of its model is unlike them.
UNLIKE: Final = 2.0
#: Seconds that clocks of machines may part.
MAX_CLOCK_S: Final = 5.0

#: By what `owned_by` in /v1/models says; "" is for all others.
_METRICS: Final = {
    "sglang": "start SGLang with --enable-metrics",
    "llamacpp": "start llama-server with --metrics",
    "tensorrt_llm": "set enable_iter_perf_stats: true and return_perf_metrics: true in the YAML "
    "file of trtllm-serve",
    "vllm": "start vLLM without --disable-log-stats",
    "": "have it serve vLLM's metric names at /metrics",
}
_USAGE: Final = {
    "vllm": "start vLLM with --enable-force-include-usage",
    "sglang": "start SGLang with --stream-response-default-include-usage",
    "": "have clients ask for it: stream_options.include_usage",
}
_CACHED: Final = {
    "vllm": "start vLLM with --enable-prompt-tokens-details",
    "sglang": "start SGLang with --enable-cache-report",
    "": "have it report usage.prompt_tokens_details.cached_tokens",
}
_CACHING: Final = {
    "vllm": "start vLLM with --enable-prefix-caching",
    "sglang": "start SGLang without --disable-radix-cache",
    "llamacpp": "start llama-server with --cache-prompt and a larger --cache-ram",
    "tensorrt_llm": "set kv_cache_config.enable_block_reuse: true in the YAML file of trtllm-serve",
    "": "switch its prefix cache on; and see that no date or id stands at the start of prompts",
}
_EVENTS: Final = {
    "vllm": """start vLLM with --kv-events-config '{"enable_kv_cache_events": true, """
    """"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'""",
    "sglang": """start SGLang with --kv-events-config '{"publisher": "zmq", """
    """"endpoint": "tcp://*:5557"}'""",
    "tensorrt_llm": "set kv_cache_config.event_buffer_max_size: 16384 in the YAML file of "
    "trtllm-serve",
    "roost": "start `roost serve` with --kv-events-endpoint tcp://*:5557 "
    "--kv-events-replay-endpoint tcp://*:5558",
    "": "none is known for this server; it is routed by what was placed there",
}
#: By why a stream of KV events is not exact (kv/trust.py).
_UNTRUSTED: Final = {
    "not_heard": "none came yet; see whether its port is open to the router",
    "silent": "heartbeats are missing: see whether it hangs, or the network",
    "late_join": "it began before the router: with a replay endpoint its past is told, too",
    "gap": "events were lost: give it a replay endpoint, or its reset of the cache will mend it",
    "undecodable": "events cannot be read: is it newer than this router?",
    "digest": "what it told does not add up: please report it",
}


class Finding(msgspec.Struct):
    """Something that is wrong."""

    severity: Severity
    replica: str  # its name; "" for the fleet
    what: str
    cure: str


def find(
    rows: Sequence[ReplicaRow], unix_s: float, sources: Sequence[SourceRow] = ()
) -> list[Finding]:
    """All findings, the worst first. `unix_s`: the router's calendar. O(replicas)."""
    found = [finding for row in rows for finding in _of_replica(row, rows, unix_s)]
    found += [_failing(source) for source in sources if source.failing_s is not None]
    if not any(row.state == "up" for row in rows):
        cure = "start a replica, or give `roost route` the right --replica URLs"
        if any(row.state == "draining" for row in rows):
            cure = "start a replica: those that answer are leaving"
        found.append(Finding("error", "", "no replica is up: every request fails", cure))
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _of_replica(row: ReplicaRow, rows: Sequence[ReplicaRow], unix_s: float) -> Iterator[Finding]:
    if row.state == "draining":
        return
    if row.state != "up":
        what = "never answered" if row.state == "joining" else "does not answer any more"
        cure = f"see whether it runs and whether {row.url}/v1/models answers from here"
        yield Finding("error", row.name, what, cure)
        return
    if row.ejection is not None:
        left = f"for {row.ejection.left_s:.0f} s" if row.ejection.left_s else "probed now"
        what = f"ejected ({left}): {row.ejection.reason}"
        yield Finding("warning", row.name, what, "see its log; a request that succeeds ends this")
    yield from _unreported(row)
    yield from _untold(row)
    yield from _unlike(row, rows)
    started_at = row.reported.started_at
    if started_at is not None and started_at - unix_s > MAX_CLOCK_S:
        what = f"says it started in {started_at - unix_s:.0f} s: its clock and the router's part"
        yield Finding("warning", row.name, what, "run a time service (chrony, ntpd) on both")


def _unreported(row: ReplicaRow) -> Iterator[Finding]:
    """What it does not tell of itself and of its cache."""
    report, told = row.reported, row.told
    if report.num_running is None and row.kv_capacity_tokens is None:
        what = "no usable /metrics page: its queue, KV use, capacity and restarts are unknown"
        yield Finding("warning", row.name, what, _cure(_METRICS, row))
    elif row.kv_capacity_tokens is None and row.dialect != LLAMA_CPP:  # that never tells
        what = "its KV capacity is unknown: the router assumes 262,144 tokens"
        yield Finding("warning", row.name, what, _cure(_METRICS, row))
    if told.num_answers < MIN_ANSWERS:
        return
    if not told.num_with_usage:
        what = "tells no usage with its answers: what it had in cache is not known"
        yield Finding("warning", row.name, what, f"{_cure(_USAGE, row)}; {_cure(_CACHED, row)}")
    elif not told.num_with_cached:
        what = "does not report cached_tokens: evictions go unnoticed"
        yield Finding("warning", row.name, what, _cure(_CACHED, row))
    elif not told.cached_tokens and told.matched_tokens >= MIN_MATCHED_TOKENS:
        what = f"took nothing of {told.matched_tokens:,} expected tokens from its cache"
        yield Finding("error", row.name, what, _cure(_CACHING, row))


def _failing(source: SourceRow) -> Finding:
    what = f"{source.name} fails since {source.failing_s:.0f} s: {source.reason}"
    return Finding("warning", "", what, "mend it; until then replicas stay as they were told")


def no_kv_events(row: ReplicaRow) -> Finding:
    """A replica publishes none."""
    what = "publishes no KV events: what it evicts is guessed"
    return Finding("note", row.name, what, _cure(_EVENTS, row))


def _untold(row: ReplicaRow) -> Iterator[Finding]:
    """What its KV events leave open, where they are followed."""
    if row.kv_streams is not None and not row.kv_streams:
        yield no_kv_events(row)
    for stream in row.kv_streams or ():
        if stream.trust != "exact":
            what = f"KV events of rank {stream.rank} are {stream.trust.replace('_', ' ')}"
            cure = _UNTRUSTED.get(stream.reason, "wait a moment")
            yield Finding("note", row.name, what, cure)
        num_wrong = stream.losses.get("digest", 0)
        if num_wrong and stream.reason != "digest":
            times = "once" if num_wrong == 1 else f"{num_wrong:,} times"
            what = f"KV events of rank {stream.rank} did not add up {times}; it was learnt anew"
            yield Finding("warning", row.name, what, _UNTRUSTED["digest"])
    for model in row.drifting:
        what = f"counts the tokens of {model} differently: its KV events are not used"
        yield Finding("warning", row.name, what, "give --tokenizer its own tokenizer and template")


def _unlike(row: ReplicaRow, rows: Sequence[ReplicaRow]) -> Iterator[Finding]:
    """Much slower than the others that serve the same models usually are."""
    others = [
        other
        for other in rows
        if other is not row and other.state == "up" and other.models == row.models
    ]
    if not others:
        return
    usual = median(other.prefill_tokens_per_s for other in others)
    if row.prefill_tokens_per_s * UNLIKE < usual:
        what = f"computes {row.prefill_tokens_per_s:,.0f} prompt tokens/s, others {usual:,.0f}"
        yield Finding("note", row.name, what, "expected of a smaller GPU; else see what shares it")
    gaps = [other.token_gap_s for other in others if other.token_gap_s is not None]
    if row.token_gap_s is not None and gaps and row.token_gap_s > UNLIKE * median(gaps):
        ms, usual_ms = row.token_gap_s * 1e3, median(gaps) * 1e3
        what = f"streams a token every {ms:.1f} ms, others every {usual_ms:.1f} ms"
        yield Finding("note", row.name, what, "expected of a smaller GPU; else see what shares it")


def _cure(cures: dict[str, str], row: ReplicaRow) -> str:
    return cures.get(row.dialect, cures[""])
