"""Routers that share through a real Redis: one fleet, several routers, real sockets between all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from asking import PROMPT, complete, get, until

from roost_loadtest.redis_servers import RedisServer
from roost_router import app
from roost_router.openai_request import read_routing_fields
from roost_router.store import link

SECRET = "a secret that is thirty-two bytes"


@pytest.fixture(params=["6.2", "8.2"])
def server(request):
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def sharing(server, tmp_path):
    """Options of a router that shares there."""
    path: Path = tmp_path / "secret"
    path.write_text(SECRET)
    return {"redis": server.url, "redis_secret_file": path}


def holders(router) -> set[str]:
    """Replicas that are believed to hold something."""
    index = router.placer.index
    return {r.name for r in router.placer.fleet.replicas if index.num_blocks(r.holder)}


def views(router) -> dict[str, list[tuple[int, int, list[int]]]]:
    index = router.placer.index
    return {
        r.url: [tuple(t) for t in index.touches(r.holder)] for r in router.placer.fleet.replicas
    }


def holders_of(router, prompt: str) -> set[str]:
    """URLs of the replicas that are believed to hold most of a prompt."""
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    chain = read_routing_fields("/v1/completions", body).chain
    urls = {r.holder: r.url for r in router.placer.fleet.replicas}
    matched = router.placer.index.lookup(chain, sum(1 << holder for holder in urls))
    return {urls[holder] for holder, depth in matched.items() if depth == max(matched.values())}


async def test_what_one_router_placed_the_other_knows(start_router, replicas, sharing):
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    assert await complete(one) == 200

    await until(lambda: holders(other) == holders(one) != set())
    for _ in range(5):
        assert await complete(other) == 200

    served = [len(fake.bodies) for fake in replicas]
    assert sorted(served) == [0, 6]
    await until(lambda: views(one) == views(other))
    assert other.link.hearing.num_peers == one.link.hearing.num_peers == 1


async def test_work_of_the_other_counts_until_it_is_done(start_router, replicas, sharing):
    for fake in replicas:
        fake.fault = "hang"
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    asking = asyncio.create_task(complete(one, stream=True))

    def seen() -> int:
        return sum(r.shared.num_in_flight for r in other.placer.fleet.replicas)

    await until(lambda: seen() == 1)
    assert sum(r.num_in_flight for r in other.placer.fleet.replicas) == 0
    for fake in replicas:
        fake.fault = None
        fake.gate.set()
    assert await asking == 200
    await until(lambda: seen() == 0)


async def test_reservations_of_a_dead_router_vanish(start_router, replicas, sharing):
    for fake in replicas:
        fake.fault = "hang"
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    asking = asyncio.create_task(complete(one, stream=True))
    await until(lambda: any(r.shared.num_in_flight for r in other.placer.fleet.replicas))

    for task in one.link._tasks:  # it is silent from now on, as after a SIGKILL
        task.cancel()

    await until(lambda: not any(r.shared.num_in_flight for r in other.placer.fleet.replicas))
    assert other.link.hearing.num_peers == 0
    for fake in replicas:
        fake.fault = None
        fake.gate.set()
    await asking


async def test_a_router_that_starts_later_knows_it_all(start_router, replicas, sharing):
    one = await start_router(*replicas, **sharing)
    for number in range(20):
        await complete(one, prompt=f"{number} " * 400)
    journal, num_told = one.placer.journal, one.link.num_sent
    await until(lambda: not journal._news and one.link.num_sent > num_told)  # a beat after

    late = await start_router(*replicas, **sharing)

    assert views(late) == views(one)


async def test_it_knows_it_from_snapshots_alone(start_router, replicas, sharing, server):
    one = await start_router(*replicas, **sharing)
    await complete(one)
    key = one.link._news_key
    await until(lambda: bool(holders(one)) and len(one.placer.journal.feeding) == 2)
    state = views(one)
    await one.stop()  # and writes down what it knows
    server.client.delete(key)

    late = await start_router(*replicas, **sharing)

    assert views(late) == state


async def test_a_router_that_starts_asks_nobody_for_its_first_request(
    start_router, replicas, sharing
):
    one = await start_router(*replicas, **sharing)
    for number in range(5):
        await complete(one, prompt=f"{number} " * 400)
    other = await start_router(*replicas, **sharing)
    await until(lambda: views(one) == views(other))

    late = await start_router(*replicas, **sharing)
    for number in range(5):  # each where it is, from the first on
        served = [len(fake.bodies) for fake in replicas]
        before = holders_of(one, f"{number} " * 400)
        assert await complete(late, prompt=f"{number} " * 400) == 200
        [place] = [n for n, fake in enumerate(replicas) if len(fake.bodies) > served[n]]
        assert replicas[place].url in before


async def test_a_store_that_answers_late_delays_what_is_known_not_the_start(
    start_router, replicas, sharing, monkeypatch
):
    one = await start_router(*replicas, **sharing)
    await complete(one)
    await until(lambda: len(one.placer.journal.feeding) == 2)
    monkeypatch.setattr(app, "_CATCH_UP_S", 0.0)  # as if it took longer than that

    late = await start_router(*replicas, **sharing)
    assert await complete(late, prompt="another") == 200

    await until(lambda: late.link.is_sharing and views(late) == views(one) != {})


async def test_a_feeder_that_dies_is_succeeded(start_router, replicas, sharing):
    one = await start_router(*replicas, **sharing)
    await until(lambda: len(one.placer.journal.feeding) == 2)
    other = await start_router(*replicas, **sharing)
    assert not other.placer.journal.feeding

    for task in one.link._tasks:
        task.cancel()

    await until(lambda: len(other.placer.journal.feeding) == 2)


async def test_another_secret_is_another_cluster(start_router, replicas, sharing, tmp_path):
    path = tmp_path / "another"
    path.write_text(SECRET + "!")
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **{**sharing, "redis_secret_file": path})
    await complete(one)
    await until(lambda: one.link.num_sent > 2 and other.link.num_sent > 2)

    assert not holders(other)
    assert other.link.hearing.num_peers == 0


async def test_redis_is_told_nothing_that_can_be_read(start_router, replicas, sharing, server):
    router = await start_router(*replicas, **sharing)
    await complete(router)
    await router.link._write_snapshots(float("inf"))
    client = server.client

    dump = b""
    for key in client.keys("*"):
        dump += key + (client.dump(key) or b"")
        if client.type(key) == b"stream":
            dump += b"".join(fields[b"b"] for _, fields in client.xrange(key))

    [holding] = [r for r in router.placer.fleet.replicas if router.placer.index.num_bytes(r.holder)]
    chain = [b for t in router.placer.index.touches(holding.holder) for b in t.blocks]
    assert chain
    for block in chain:
        assert block.to_bytes(8, "little") not in dump
        assert block.to_bytes(8, "big") not in dump
    assert PROMPT[:40].encode() not in dump
    assert SECRET.encode() not in dump


async def test_poisoned_news_are_left_out(start_router, replicas, sharing, server):
    router = await start_router(*replicas, **sharing)
    key = router.link._news_key
    client = server.client
    await until(lambda: router.link.num_sent > 0)
    [(_, mine)] = client.xrange(key, count=1)
    for blob in (b"", b"x" * 10, b"x" * 200, mine[b"b"][:-1], mine[b"b"][::-1]):
        client.xadd(key, {"b": blob})
    client.xadd(key, {"other": "field"})

    await until(lambda: router.link.num_void["not sealed"] >= 5)
    late = await start_router(*replicas, **sharing)
    assert await complete(router) == 200
    await until(lambda: holders(late) == holders(router) != set())


async def shares(one, other, prompt: str) -> None:
    """Wait until what one places is known to the other."""
    await until(lambda: one.link.is_sharing and other.link.is_sharing)
    await complete(one, prompt=prompt * 200)
    await until(lambda: views(one) == views(other))


@pytest.mark.parametrize("name", ["news", "leases"])
@pytest.mark.parametrize("kind", ["a string", "a list"])
async def test_keys_of_other_types_do_not_end_the_sharing(
    start_router, replicas, sharing, server, name, kind
):
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    await shares(one, other, "before")
    key = one.link._news_key.replace(b"news", name.encode())
    right = b"stream" if name == "news" else b"hash"
    await until(lambda: server.client.type(key) == right)
    server.client.delete(key)
    if kind == "a string":
        server.client.set(key, "poison")
    else:
        server.client.rpush(key, "poison")

    await until(lambda: server.client.type(key) == right)
    await shares(one, other, "after")


async def test_an_entry_of_the_future_is_got_over(start_router, replicas, sharing, server):
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    await shares(one, other, "before")
    key = one.link._news_key
    server.client.xadd(key, {"b": "poison"}, id="4000000000000000-0")
    await until(lambda: one.link.num_void and other.link.num_void)
    await shares(one, other, "meanwhile")

    server.client.delete(key)

    await until(lambda: one.link._position < b"4" and other.link._position < b"4")
    await shares(one, other, "after")


async def test_news_that_no_more_fit_into_their_stream(start_router, replicas, sharing, server):
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    last = 2**64 - 1
    server.client.xadd(one.link._news_key, {"b": "poison"}, id=f"{last}-{last}")

    await until(lambda: b"-" in one.link._end and int(one.link._end.split(b"-")[0]) < last)
    await shares(one, other, "after")


async def test_a_stream_whose_time_stands_still_is_not_kept(
    start_router, replicas, sharing, server, monkeypatch
):
    """Nothing in it would ever be trimmed."""
    one = await start_router(*replicas, **sharing)
    other = await start_router(*replicas, **sharing)
    monkeypatch.setattr(link, "KEPT_S", 0.6)
    key, future = one.link._news_key, b"4000000000000000-0"
    server.client.xadd(key, {"b": "poison"}, id=future)

    await until(lambda: one.link._end > future)
    await until(lambda: one.link._end < future and one.link._position < future)
    await shares(one, other, "after")


async def test_snapshots_that_were_lost_are_written_again(
    start_router, replicas, sharing, server, monkeypatch
):
    one = await start_router(*replicas, **sharing)
    await complete(one)
    keys = [one.link._snapshot_key(fake.url) for fake in replicas]
    await until(lambda: server.client.exists(*keys) == 2)
    monkeypatch.setattr(link, "KEPT_S", 0.6)

    server.client.flushall()

    await until(lambda: server.client.exists(*keys) == 2)


async def test_metrics_tell_of_the_store(start_router, replicas, sharing):
    one = await start_router(*replicas, **sharing)
    await start_router(*replicas, **sharing)
    await until(lambda: one.link.hearing.num_peers == 1)

    _, page, _ = await get(one, "/metrics")

    assert b"roost_router_store_up 1.0" in page
    assert b"roost_router_peers 1.0" in page
    assert b'roost_router_news_batches_total{direction="heard"}' in page
