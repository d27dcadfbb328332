"""GET /fleet over real sockets: what it says of replicas, of itself, and of cache hits."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import pytest
from asking import complete, fleet, get

from roost_router.fleet_page import KvStreamRow, _known_by
from roost_router.rungs import RUNGS


async def test_a_router_that_served_nobody_yet(start_router, replicas):
    router = await start_router(*replicas)

    page = await fleet(router)

    assert page.version == version("roost")
    assert 0 <= page.uptime_s < 60
    assert (page.is_draining, page.ladders, page.rungs) == (False, [], RUNGS)
    assert (page.totals.replicas, page.totals.replicas_up, page.totals.held_requests) == (2, 2, 0)
    assert [row.name for row in page.replicas] == ["r0", "r1"]
    assert [row.url for row in page.replicas] == [replica.url for replica in replicas]
    assert {row.kv_capacity_tokens for row in page.replicas} == {16384}
    assert page.totals.traffic.hit_rate is None


async def test_what_requests_leave_behind(start_router, replicas):
    router = await start_router(*replicas)
    for replica in replicas:
        replica.prompt_tokens, replica.cached_tokens = 800, 400
    for stream in (False, True):
        assert await complete(router, stream=stream) == 200

    page = await fleet(router)

    home = max(page.replicas, key=lambda row: row.traffic.requests_per_s)
    assert home.traffic.requests_per_s == page.totals.traffic.requests_per_s == pytest.approx(0.2)
    assert home.traffic.hit_rate == page.totals.traffic.hit_rate == 0.5
    assert home.traffic.ttft_p50_s > 0
    assert home.resident_blocks > 0
    assert (home.told.num_answers, home.told.num_with_cached) == (2, 2)
    (ladder,) = page.ladders
    assert ladder.model == "m"
    assert (ladder.recent.num_requests, ladder.recent.prompt_tokens) == (2, 1600)
    assert ladder.recent.shares == [
        pytest.approx(share, abs=0.03) for share in (0.5, 0.5, 0.5, 0.5, 0.5)
    ]
    assert sum(row.kv_capacity_tokens for row in page.replicas) * 2 < ladder.capacity_bytes


async def test_a_request_under_way_is_counted(start_router, replicas):
    router = await start_router(*replicas)
    for replica in replicas:
        replica.fault = "slow"
    asking = asyncio.create_task(complete(router))
    while not any(replica.bodies for replica in replicas):
        await asyncio.sleep(0.01)

    page = await fleet(router)
    for replica in replicas:
        replica.gate.set()
    await asking

    assert (page.totals.in_flight, page.totals.decoding) == (1, 0)
    assert page.totals.queued_tokens > 0
    assert (await fleet(router)).totals.in_flight == 0


async def test_an_ejected_replica_shows_why_and_how_long(start_router, replicas):
    router = await start_router(replicas[0], max_attempts=1)
    replicas[0].fault = "text500"
    for _ in range(3):
        assert await complete(router) == 500

    page = await fleet(router)

    (row,) = page.replicas
    assert row.state == "up"
    assert row.ejection.reason == "3 failures in a row"
    assert 0 < row.ejection.left_s <= 1.0
    assert row.traffic.failures_per_s == page.totals.traffic.failures_per_s == pytest.approx(0.3)
    assert [finding.severity for finding in page.findings] == ["warning"]
    assert "3 failures in a row" in page.findings[0].what


async def test_a_replica_that_is_down_is_an_error(start_router, replicas):
    router = await start_router(*replicas)
    await replicas[1].stop()
    while (page := await fleet(router)).replicas[1].state == "up":
        pass

    assert page.totals.replicas_up == 1
    assert [(f.severity, f.replica) for f in page.findings] == [("error", "r1")]


async def test_the_ladder_is_a_metric_too(start_router, replicas):
    router = await start_router(*replicas)
    _, before, _ = await get(router, "/metrics")
    await complete(router)
    _, page, _ = await get(router, "/metrics")

    assert b'rung="' not in before
    for rung in RUNGS:
        series = f'roost_router_hit_ladder_share{{model="m",rung="{rung.name}"}} 0.0'
        assert series.encode() in page


async def test_a_request_that_no_replica_can_start_is_shown_as_held(start_router, replicas):
    router = await start_router(replicas[0])
    replicas[0].fault = "slow"
    for _ in range(5):  # a thousand tokens a second: the second request would wait for 40 s
        router.placer.fleet.replicas[0].speed.observe_ttft(10_000, 10.0)
    asking = [asyncio.create_task(complete(router, f"{n} " * 40_000)) for n in range(2)]
    async with asyncio.timeout(5):
        while not (page := await fleet(router)).totals.held_requests:
            await asyncio.sleep(0.01)
    replicas[0].gate.set()

    assert (page.totals.held_requests, page.totals.in_flight) == (1, 1)
    assert [await each for each in asking] == [200, 200]
    assert (await fleet(router)).totals.held_requests == 0


@pytest.mark.parametrize(
    ("trusts", "drifting", "known_by"),
    [
        ([], [], "placements"),
        (["exact", "exact"], [], "exact"),
        (["exact", "approximate"], [], "approximate"),
        (["catching_up", "approximate"], [], "catching up"),
        (["exact", "blind", "catching_up"], [], "blind"),
        (["exact"], ["m"], "drifting"),
        ([], ["m"], "placements"),
    ],
)
def test_a_replica_is_known_by_its_least_trusted_stream(trusts, drifting, known_by):
    streams = [KvStreamRow(rank, "vllm", trust, "none", 0) for rank, trust in enumerate(trusts)]

    assert _known_by(streams, drifting) == known_by
