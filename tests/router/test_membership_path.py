"""Replicas that join and leave under requests, over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
from asking import PROMPT, complete, fleet, get, until
from fake_replica import FakeReplica

from roost_router import metrics
from roost_router.fleet.replica import Membership, ReplicaState


def stream(router, session: aiohttp.ClientSession, prompt: str = PROMPT):
    body = {"model": "m", "prompt": prompt, "stream": True}
    return session.post("http://{}:{}/v1/completions".format(*router.address), json=body)


async def test_a_removed_replica_finishes_its_stream_and_is_gone(start_router, replicas):
    router = await start_router(*replicas)
    members = router.placer.fleet
    for fake in replicas:
        fake.fault = "hang"
    async with aiohttp.ClientSession() as session:
        async with stream(router, session) as answer:
            name = answer.headers["x-roost-replica"]
            streaming = next(r for r in members.replicas if r.name == name)
            members.remove(streaming, router.service.now())
            [row] = [row for row in (await fleet(router)).replicas if row.name == name]
            assert (row.state, row.in_flight) == ("draining", 1)
            for fake in replicas:
                fake.fault = None
            assert [await complete(router) for _ in range(4)] == [200] * 4
            for fake in replicas:
                fake.gate.set()
            text = (await answer.read()).decode()

    assert text.endswith("data: [DONE]\n\n")
    assert text.count("data: ") == 5
    served = dict(zip(("r0", "r1"), [len(fake.bodies) for fake in replicas], strict=True))
    assert served.pop(name) == 1
    assert list(served.values()) == [4]
    await until(lambda: streaming.membership is Membership.GONE)
    assert [row.name for row in (await fleet(router)).replicas] == list(served)


async def test_nothing_is_kept_open_to_a_replica_that_is_gone(start_router, replicas):
    router = await start_router(*replicas)
    for number in range(8):
        await complete(router, prompt=f"{number} " * 400)
    removed = router.placer.fleet.replicas[0]
    pool = router.service.pool(removed)

    router.placer.fleet.remove(removed, router.service.now())

    assert not pool._idle
    assert removed.name not in router.service._pools


async def test_a_removed_replica_is_polled_no_more(start_router):
    fakes = [await FakeReplica().start() for _ in range(2)]
    asked: list[int] = []

    async def models(request: object) -> object:
        asked.append(1)
        return await FakeReplica._models(fakes[0], request)  # type: ignore[arg-type]

    await fakes[0].stop()
    fakes[0]._models = models  # type: ignore[method-assign]
    await fakes[0].start()
    router = await start_router(*fakes)
    router.placer.fleet.remove(router.placer.fleet.replicas[0], router.service.now())
    await asyncio.sleep(0)
    before = len(asked)

    await asyncio.sleep(0.3)  # six polls

    assert len(asked) <= before + 1  # one may have been under way
    for fake in fakes:
        await fake.stop()


async def test_a_removed_replica_is_polled_while_requests_run_there(start_router, replicas):
    """An answer that is not streamed waits for it until polls fail: it must not wait for ever."""
    router = await start_router(replicas[0])
    replicas[0].fault = "slow"
    asking = asyncio.create_task(complete(router))
    await until(lambda: bool(replicas[0].bodies))
    [removed] = router.placer.fleet.replicas
    router.placer.fleet.remove(removed, router.service.now())

    replicas[0].model = "another"
    await until(lambda: removed.models == ("another",))
    replicas[0].gate.set()

    assert await asking == 200
    await until(lambda: removed.membership is Membership.GONE)


async def test_a_hundred_replicas_that_came_and_went_leave_nothing_behind(start_router, replicas):
    """Tasks, open files and what is kept by name are as before."""
    router = await start_router(replicas[0], poll_interval_s=5.0)
    members, service = router.placer.fleet, router.service
    await complete(router)

    def kept() -> tuple[int, ...]:
        placer, poller = router.placer, members._watchers[-1]
        return (
            len(asyncio.all_tasks()),
            len(service._pools),
            len(placer._pending) + len(placer._running) + len(placer._silent),
            len(poller._tasks) + len(poller._unasked),
            len(placer.index._held),
        )

    def num_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before, files_before = kept(), num_files()
    for number in range(100):
        url = replicas[1].url if number % 2 else f"http://127.0.0.1:9/{number}"
        added = members.add(url)
        if number % 2:
            await until(lambda added=added: added.is_up)
            await complete(router, prompt=f"{number} " * 400)
        members.remove(added, service.now())
    await until(lambda: kept() == before)
    await until(lambda: num_files() <= files_before + 2)

    assert members.num_removed == 100
    assert replicas[1].bodies


async def test_an_added_replica_is_asked_at_once_and_gets_traffic(start_router, replicas):
    router = await start_router(replicas[0], poll_interval_s=30.0)
    added = router.placer.fleet.add(replicas[1].url)
    assert added.state is ReplicaState.JOINING

    await until(lambda: added.is_up)
    for number in range(16):
        assert await complete(router, prompt=f"{number} " * 400) == 200

    assert all(fake.bodies for fake in replicas)
    status, page, _ = await get(router, "/metrics")
    assert status == 200
    assert b'roost_router_replica_up{replica="r1"} 1.0' in page
    assert b'roost_router_replicas{state="up"} 2.0' in page
    assert b"roost_router_replicas_added_total 2.0" in page


async def test_a_router_without_a_replica_is_not_ready_until_one_joins(start_router, replicas):
    router = await start_router(replicas[0])
    router.placer.fleet.remove(router.placer.fleet.replicas[0], router.service.now())
    assert (await get(router, "/ready"))[0] == 503
    assert await complete(router) == 503

    router.placer.fleet.add(replicas[1].url)

    await until(lambda: router.placer.fleet.is_ready)
    assert (await get(router, "/ready"))[0] == 200
    assert await complete(router) == 200


async def test_series_of_a_replica_that_is_gone_are_told_for_a_while(
    start_router, replicas, monkeypatch
):
    router = await start_router(*replicas)
    await complete(router)
    [name] = [n for n, fake in zip(("r0", "r1"), replicas, strict=True) if fake.bodies]
    members, now = router.placer.fleet, router.service.now()
    members.remove(next(r for r in members.replicas if r.name == name), now)
    counts = router.service.metrics
    ended_at = counts._series[name].ended_at

    counts.prune(members, ended_at + metrics.KEEP_GONE_S)
    assert name in counts._series
    counts.prune(members, ended_at + metrics.KEEP_GONE_S + 20.0)

    assert name not in counts._series
    assert name not in counts.recent._replicas
