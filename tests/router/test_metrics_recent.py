"""The last minute and the last ten, replica by replica."""

from __future__ import annotations

from random import Random

import pytest

from roost_router.answer.phases import Answer
from roost_router.config import RouterConfig
from roost_router.fleet.fleet import Fleet
from roost_router.http.record import LostLeg, RequestRecord
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.round_robin import RoundRobin
from roost_router.recent import RecentTraffic
from roost_wire.load_report import LoadReport

LIMITS = RouterConfig(replicas=("http://127.0.0.1:8101",))


def placements() -> list[Placement]:
    """A prompt that both r0 and r1 have seen before, placed on each."""
    index = PrefixIndex()
    fleet = Fleet(index, [f"http://127.0.0.1:{port}" for port in (8101, 8102)])
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport())
    placer = Placer(index, fleet, RoundRobin, Random(1))
    fields = RoutingFields("m", stream=True, prompt=b"x" * 2048)
    placed = {p.replica.name: p for p in [placer.place(fields, 0.0) for _ in range(4)]}
    return [placed["r0"], placed["r1"]]


PLACED = placements()


def record(now: float, replica: int | None = 0, lost: tuple[int, ...] = (), **more):
    """A request that ended at `now` on r0 or r1, after attempts lost on those of `lost`."""
    placement = None if replica is None else PLACED[replica]
    answer = Answer(b"{}", LIMITS, None, 0.0)
    answer.prompt_tokens = more.pop("prompt_tokens", None)
    answer.cached_tokens = more.pop("cached_tokens", None)
    fields = {"outcome": "ok", "status": 200, "ttft_s": None, "error_code": None, **more}
    return RequestRecord(
        b"id",
        "m",
        answer,
        placement=placement,
        first=placement,
        lost_legs=tuple(LostLeg(PLACED[number], "status", "retried") for number in lost),
        started_at=now - 0.5,
        duration_s=0.5,
        **fields,
    )


def test_a_minute_of_one_replica_and_of_all():
    recent = RecentTraffic()
    for now in range(60):
        recent.add(record(100.0 + now, now % 2))
    recent.add(record(159.5, None, outcome="server_error", status=503))

    assert recent.traffic("r0", 160.0).requests_per_s == pytest.approx(30 / 60, rel=0.2)
    assert recent.total(159.9).requests_per_s == pytest.approx(61 / 60, rel=0.05)
    assert recent.total(159.9).failures_per_s == pytest.approx(1 / 60, rel=0.05)
    assert recent.traffic("r0", 230.0).requests_per_s == 0.0


def test_a_replica_that_was_never_asked_has_no_traffic():
    traffic = RecentTraffic().traffic("r0", 10.0)

    assert traffic.requests_per_s == traffic.failures_per_s == 0.0
    assert traffic.hit_rate is traffic.ttft_p50_s is traffic.ttft_p99_s is None


def test_an_attempt_that_was_made_good_counts_against_its_replica_only():
    recent = RecentTraffic()
    recent.add(record(5.0, 1, lost=(0, 0)))

    assert recent.traffic("r0", 9.0).failures_per_s == pytest.approx(2 / 10)
    assert recent.traffic("r1", 9.0).failures_per_s == 0.0
    assert recent.total(9.0).failures_per_s == 0.0
    assert recent.total(9.0).requests_per_s == pytest.approx(1 / 10)


def test_a_failed_request_counts_once_against_the_replica_that_failed_it_last():
    recent = RecentTraffic()
    recent.add(record(5.0, 0, outcome="server_error"))
    recent.add(record(5.0, 1, (1,), outcome="cut"))

    assert recent.traffic("r0", 9.0).failures_per_s == pytest.approx(1 / 10)
    assert recent.traffic("r1", 9.0).failures_per_s == pytest.approx(1 / 10)
    assert recent.total(9.0).failures_per_s == pytest.approx(2 / 10)


def test_the_hit_rate_is_of_prompts_that_replicas_told_of():
    recent = RecentTraffic()
    recent.add(record(1.0, prompt_tokens=100, cached_tokens=30))
    recent.add(record(1.0, prompt_tokens=300, cached_tokens=0))
    recent.add(record(1.0, prompt_tokens=500))
    recent.add(record(1.0))

    assert recent.traffic("r0", 2.0).hit_rate == 30 / 400


def test_time_to_first_token_is_of_streams():
    recent = RecentTraffic()
    for number in range(1, 101):
        recent.add(record(1.0, ttft_s=number / 100))
        recent.add(record(1.0))

    traffic = recent.traffic("r0", 2.0)
    assert traffic.ttft_p50_s == pytest.approx(0.50, rel=1 / 8)
    assert traffic.ttft_p99_s == pytest.approx(0.99, rel=1 / 8)
    assert traffic.ttft_p50_s < traffic.ttft_p99_s


def test_what_answers_told_is_kept_for_ten_minutes():
    recent = RecentTraffic()
    recent.add(record(1.0))
    recent.add(record(2.0, prompt_tokens=100))
    recent.add(record(3.0, prompt_tokens=100, cached_tokens=0))
    recent.add(record(300.0, prompt_tokens=100, cached_tokens=40))
    recent.add(record(300.0, outcome="client_gone"))
    recent.add(record(300.0, outcome="server_error"))

    assert PLACED[0].matched_tokens > 0
    told = recent.told("r0", 301.0)
    assert (told.num_answers, told.num_with_usage, told.num_with_cached) == (4, 3, 2)
    assert (told.matched_tokens, told.cached_tokens) == (3 * PLACED[0].matched_tokens, 40)
    assert recent.told("r0", 610.0).num_answers == 1
    assert recent.told("r0", 900.0).num_answers == 0
    assert recent.told("r1", 301.0).num_answers == 0
