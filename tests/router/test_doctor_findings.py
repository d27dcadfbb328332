"""What each finding needs to appear, at its edge, and which flag it names."""

from __future__ import annotations

import pytest

from roost_router.findings import (
    MAX_CLOCK_S,
    MIN_ANSWERS,
    MIN_MATCHED_TOKENS,
    UNLIKE,
    Finding,
    find,
)
from roost_router.fleet_page import Ejection, KvStreamRow, ReplicaRow, SourceRow
from roost_router.traffic import Told, Traffic
from roost_wire.load_report import LoadReport

UNIX_S = 1_800_000_000.0


def row(name: str = "r0", **changes: object) -> ReplicaRow:
    """A replica that nothing is wrong with, but for `changes`."""
    fields: dict[str, object] = {
        "name": name,
        "url": "http://10.0.0.1:8000",
        "state": "up",
        "dialect": "vllm",
        "models": ("m",),
        "ejection": None,
        "in_flight": 0,
        "decoding": 0,
        "queued_tokens": 0,
        "resident_blocks": 0,
        "kv_capacity_tokens": 4096,
        "prefill_tokens_per_s": 1000.0,
        "token_gap_s": 0.01,
        "reported": LoadReport(num_running=0, kv_capacity_tokens=4096, started_at=UNIX_S - 60),
        "traffic": Traffic(0.0, 0.0, None, None, None),
        "told": told(),
        "known_by": "placements",
        "kv_streams": None,
        "drifting": [],
    }
    return ReplicaRow(**{**fields, **changes})


def told(**changes: int) -> Told:
    fields = {
        "num_answers": MIN_ANSWERS,
        "num_with_usage": MIN_ANSWERS,
        "num_with_cached": MIN_ANSWERS,
        "matched_tokens": MIN_MATCHED_TOKENS,
        "cached_tokens": 1,
    }
    return Told(**{**fields, **changes})


def one(*rows: ReplicaRow) -> Finding:
    (finding,) = find(rows, UNIX_S)
    return finding


def test_nothing_is_wrong_with_replicas_that_tell_all():
    assert find([row("r0"), row("r1")], UNIX_S) == []


@pytest.mark.parametrize("state", ["down", "joining"])
def test_a_replica_that_is_not_up_is_an_error(state):
    finding = one(row("r0", state=state, reported=LoadReport(), told=Told()), row("r1"))

    assert (finding.severity, finding.replica) == ("error", "r0")
    assert "http://10.0.0.1:8000/v1/models" in finding.cure


def test_a_replica_that_drains_is_nothing_wrong_unless_it_is_the_last():
    draining = row(state="draining", reported=LoadReport())

    assert find([draining, row("r1")], UNIX_S) == []
    finding = one(draining)
    assert (finding.severity, finding.replica) == ("error", "")
    assert finding.cure == "start a replica: those that answer are leaving"


def test_a_source_that_fails_is_a_warning():
    failing = SourceRow("DNS vllm:8000", 3, 61.0, "no resolver")
    well = SourceRow("file x", 3, None, "")

    [finding] = find([row()], UNIX_S, [failing, well])

    assert finding.severity == "warning"
    assert finding.what == "DNS vllm:8000 fails since 61 s: no resolver"


def test_a_fleet_without_a_replica_is_an_error_of_its_own():
    assert [finding.replica for finding in find([row(state="down")], UNIX_S)] == ["r0", ""]


@pytest.mark.parametrize(("left_s", "words"), [(3.2, "for 3 s"), (0.0, "probed now")])
def test_an_ejection_is_told_with_its_reason(left_s, words):
    finding = one(row(ejection=Ejection("a stream stalled", left_s)))

    assert finding.severity == "warning"
    assert words in finding.what
    assert "a stream stalled" in finding.what


@pytest.mark.parametrize(
    ("dialect", "flag"),
    [
        ("sglang", "--enable-metrics"),
        ("llamacpp", "--metrics"),
        ("vllm", "--disable-log-stats"),
        ("tensorrt_llm", "enable_iter_perf_stats"),
        ("unheard of", "/metrics"),
    ],
)
def test_a_replica_without_metrics_is_told_how_to_have_them(dialect, flag):
    finding = one(row(dialect=dialect, reported=LoadReport(), kv_capacity_tokens=None))

    assert finding.severity == "warning"
    assert "no usable /metrics" in finding.what
    assert flag in finding.cure


def test_llama_cpp_cannot_tell_its_capacity():
    mute = row(reported=LoadReport(num_running=1), kv_capacity_tokens=None, dialect="llamacpp")
    assert find([mute], UNIX_S) == []


def test_a_page_without_the_capacity_says_what_is_assumed():
    finding = one(row(reported=LoadReport(num_running=1), kv_capacity_tokens=None))

    assert "262,144" in finding.what


@pytest.mark.parametrize(
    ("dialect", "usage", "cached"),
    [
        ("vllm", "--enable-force-include-usage", "--enable-prompt-tokens-details"),
        ("sglang", "--stream-response-default-include-usage", "--enable-cache-report"),
        ("", "stream_options.include_usage", "cached_tokens"),
    ],
)
def test_answers_that_do_not_tell_of_the_cache_name_the_flag(dialect, usage, cached):
    silent = one(row(dialect=dialect, told=told(num_with_usage=0, num_with_cached=0)))
    vague = one(row(dialect=dialect, told=told(num_with_cached=0)))

    assert usage in silent.cure
    assert cached in silent.cure
    assert cached in vague.cure
    assert (silent.severity, vague.severity) == ("warning", "warning")


def test_few_answers_say_nothing_of_the_cache():
    few = told(num_answers=MIN_ANSWERS - 1, num_with_usage=0, num_with_cached=0)

    assert find([row(told=few)], UNIX_S) == []


@pytest.mark.parametrize(
    ("matched", "cached", "number"),
    [(MIN_MATCHED_TOKENS, 0, 1), (MIN_MATCHED_TOKENS - 1, 0, 0), (MIN_MATCHED_TOKENS, 1, 0)],
)
def test_a_cache_that_never_hits_where_it_should_is_an_error(matched, cached, number):
    found = find([row(told=told(matched_tokens=matched, cached_tokens=cached))], UNIX_S)

    assert [finding.severity for finding in found] == ["error"] * number
    assert all("--enable-prefix-caching" in finding.cure for finding in found)


def test_of_two_replicas_the_slow_one_is_unlike_the_other():
    edge, other = 1000.0 / UNLIKE, row("r1")

    assert find([row(prefill_tokens_per_s=edge, token_gap_s=0.01 * UNLIKE), other], UNIX_S) == []
    assert "others 1,000" in one(row(prefill_tokens_per_s=edge - 1), other).what
    assert "others every 10.0 ms" in one(row(token_gap_s=0.0201), other).what
    assert find([row(token_gap_s=0.0201), row("r1", token_gap_s=None)], UNIX_S) == []


def test_speeds_that_are_unlike_are_noted():
    slow = 1000.0 / UNLIKE
    others = [row("r1"), row("r2")]

    assert find([row(prefill_tokens_per_s=slow), *others], UNIX_S) == []
    finding = one(row(prefill_tokens_per_s=slow - 1), *others)
    assert (finding.severity, finding.replica) == ("note", "r0")
    assert find([row(token_gap_s=0.01 * UNLIKE), *others], UNIX_S) == []
    assert "20.1 ms" in one(row(token_gap_s=0.0201), *others).what


def test_replicas_of_other_models_are_not_compared():
    assert find([row(prefill_tokens_per_s=1.0), row("r1", models=("n",))], UNIX_S) == []


@pytest.mark.parametrize(("ahead_s", "number"), [(MAX_CLOCK_S, 0), (MAX_CLOCK_S + 0.1, 1)])
def test_a_replica_that_starts_in_the_future_has_another_clock(ahead_s, number):
    report = LoadReport(num_running=0, started_at=UNIX_S + ahead_s)

    found = find([row(reported=report)], UNIX_S)

    assert ["clock" in finding.what for finding in found] == [True] * number


def test_the_worst_comes_first():
    rows = [
        row("r0", prefill_tokens_per_s=1.0),
        row("r1", ejection=Ejection("x", 1.0)),
        row("r2", state="down"),
        row("r3"),
    ]

    assert [f.severity for f in find(rows, UNIX_S)] == ["error", "warning", "note"]


def test_a_replica_without_kv_events_is_told_the_flag_where_they_are_followed():
    finding = one(row(kv_streams=[]))

    assert finding.severity == "note"
    assert "--kv-events-config" in finding.cure
    assert find([row(kv_streams=None)], UNIX_S) == []


@pytest.mark.parametrize("reason", ["late_join", "gap", "undecodable", "silent", "not_heard"])
def test_a_stream_that_is_not_exact_says_why(reason):
    exact = KvStreamRow(0, "vllm", "exact", "none", 0)
    finding = one(row(kv_streams=[exact, KvStreamRow(1, "vllm", "catching_up", reason, 0)]))

    assert finding.what == "KV events of rank 1 are catching up"
    assert finding.cure != "wait a moment"


@pytest.mark.parametrize(("count", "times"), [(1, "once"), (1234, "1,234 times")])
def test_what_did_not_add_up_is_told_after_it_was_mended(count, times):
    exact = KvStreamRow(0, "vllm", "exact", "none", 0, {"gap": 3, "digest": count})
    finding = one(row(kv_streams=[exact]))

    assert finding.severity == "warning"
    assert finding.what == f"KV events of rank 0 did not add up {times}; it was learnt anew"
    mended = KvStreamRow(0, "vllm", "exact", "none", 0, {"gap": 3})
    assert find([row(kv_streams=[mended])], UNIX_S) == []


def test_a_replica_that_counts_tokens_differently_is_named_with_the_model():
    finding = one(row(drifting=["m"]))

    assert finding.severity == "warning"
    assert "counts the tokens of m" in finding.what
