"""Sentinel and Cluster, real servers of both versions: the store finds who takes writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from stores import Lua, Told, fault_of, open_store, until, until_works

from roost_loadtest.redis_servers import VERSIONS, RedisCluster, RedisSentinels, RedisServer
from roost_router.store.client import Store
from roost_router.store.errors import StoreError, StoreFault

pytestmark = pytest.mark.e2e

KEY = b"roost:{t}:news"
COUNT = Lua("return redis.call('INCR', KEYS[1])")


@pytest.fixture(params=VERSIONS)
def sentinels(request) -> Iterator[RedisSentinels]:
    with RedisSentinels(request.param, num_replicas=1, num_sentinels=1) as running:
        yield running


@pytest.fixture(scope="module", params=VERSIONS)
def running_cluster(request) -> Iterator[RedisCluster]:
    with RedisCluster(request.param) as running:
        yield running


@pytest.fixture
def cluster(running_cluster) -> RedisCluster:
    """Without keys, all nodes running, the slot of KEY wherever the last test left it."""
    for node in running_cluster.nodes:
        running_cluster.call(node, "FLUSHALL")
        running_cluster.call(node, "SCRIPT", "FLUSH")
    return running_cluster


@pytest.fixture
async def store(cluster) -> AsyncIterator[Store]:
    async with open_store(cluster.url) as opened:
        assert opened.is_up, opened.why_down
        yield opened


def other_than(cluster: RedisCluster, node: RedisServer) -> RedisServer:
    return next(other for other in cluster.nodes if other is not node)


async def test_the_primary_that_sentinels_name_is_used(sentinels):
    async with open_store(sentinels.url) as store:
        await store.append(KEY, b"news", b"0-0")
        assert sentinels.primary().client.xlen(KEY) == 1


async def test_a_failover_is_followed(sentinels):
    told: list[Told] = []
    async with open_store(sentinels.url, told) as store:
        await store.append(KEY, b"before", b"0-0")
        first = sentinels.primary()
        first.client.wait(1, 5000)
        reading = asyncio.create_task(store.read_after(KEY, b"$", 30, 10))
        await asyncio.sleep(0.05)
        first.kill()
        with pytest.raises(StoreError):
            await reading
        await until(lambda: not store.is_up)
        assert await fault_of(store.append(KEY, b"lost", b"0-0"), 0.5) is StoreFault.DOWN
        await asyncio.to_thread(sentinels.until_failed_over, first)
        await until_works(store)
        await store.append(KEY, b"after", b"0-0")

        assert [blob for _, blob in await store.read_range(KEY, b"-", 10)] == [b"before", b"after"]
    assert [change.is_up for change in told][:2] == [True, False]


async def test_a_primary_that_is_replaced_alive_is_left(sentinels):
    """An operator asks for it: for ten seconds the old primary takes writes as before."""
    told: list[Told] = []
    async with open_store(sentinels.url, told) as store:
        await store.append(KEY, b"before", b"0-0")
        first = sentinels.primary()
        first.client.wait(1, 5000)
        await until(lambda: is_failover_begun(sentinels.sentinels[0]))
        second = await asyncio.to_thread(sentinels.until_failed_over, first)
        await until(lambda: any("sentinels name" in change.why for change in told))
        await until_works(store)
        await store.append(KEY, b"after", b"0-0")

        assert second.client.xlen(KEY) == 2


def is_failover_begun(sentinel: RedisServer) -> bool:
    try:
        sentinel.client.execute_command("SENTINEL", "FAILOVER", "roost")
    except redis.ResponseError:  # it has not heard from the replica for the first time
        return False
    return True


async def test_a_sentinel_that_is_gone_is_passed_over(sentinels):
    with RedisServer() as gone:
        port = gone.port
    url = sentinels.url.replace("//", f"//127.0.0.1:{port},")
    async with open_store(url) as store:
        assert store.is_up, store.why_down


async def test_a_service_that_sentinels_do_not_know_is_named(sentinels):
    told: list[Told] = []
    async with open_store(sentinels.url.replace("/roost", "/toast"), told) as store:
        assert not store.is_up
    assert "knows no service 'toast'" in told[0].why


async def test_sentinels_with_a_password_are_told_it():
    users = ("user default off", "user roost on >pw ~* +@all")
    with RedisServer(users=users) as primary:
        lines = (
            f"sentinel monitor roost 127.0.0.1 {primary.port} 1\n"
            "sentinel auth-user roost roost\nsentinel auth-pass roost pw\n"
        )
        with RedisServer(sentinel=lines, users=users) as sentinel:
            url = f"redis+sentinel://roost:pw@127.0.0.1:{sentinel.port}/roost"
            async with open_store(url) as store:
                assert store.is_up, store.why_down


async def test_a_cluster_serves_from_whichever_node_it_is_given(cluster):
    owner = cluster.owner(KEY)
    for node in cluster.nodes:
        async with open_store(f"redis+cluster://127.0.0.1:{node.port}") as store:
            await store.append(KEY, b"news", b"0-0")
            assert len(await store.read_after(KEY, b"0-0", 1, 10)) > 0
            await store.call(COUNT, [b"roost:{t}:n"], [], 1)
    assert cluster.call(owner, "XLEN", KEY) == 3
    assert cluster.call(owner, "GET", "roost:{t}:n") == b"3"


async def test_seeds_that_are_gone_are_passed_over(cluster):
    with RedisServer() as gone:
        port = gone.port
    async with open_store(cluster.url.replace("//", f"//127.0.0.1:{port},")) as store:
        assert store.is_up, store.why_down


async def test_a_slot_that_moves_is_followed_by_calls_and_readers(cluster, store):
    """MOVED; the node it moved to does not know the script."""
    source = cluster.owner(KEY)
    await store.append(KEY, b"before", b"0-0")
    assert await store.call(COUNT, [b"roost:{t}:n"], [], 1) == 1
    reading = asyncio.create_task(store.read_after(KEY, await store.last_id(KEY), 20, 10))
    await asyncio.sleep(0.05)
    to = other_than(cluster, source)
    await asyncio.to_thread(cluster.move, KEY, to)

    assert await store.call(COUNT, [b"roost:{t}:n"], [], 1) == 2
    await store.append(KEY, b"after", b"0-0")
    assert [blob for _, blob in await reading] == [b"after"]
    assert cluster.call(to, "XLEN", KEY) == 2
    assert store.is_up


async def test_a_slot_that_is_moving_is_asked_for(cluster, store):
    """ASK, key by key: what is not there yet is made where the slot goes."""
    source = cluster.owner(KEY)
    await store.append(KEY, b"news", b"0-0")
    to = other_than(cluster, source)
    cluster.start_moving(KEY, to)

    assert len(await store.read_range(KEY, b"-", 10)) == 1  # has not moved yet
    assert await store.call(COUNT, [b"roost:{t}:n"], [], 1) == 1
    await store.append(b"roost:{t}:new", b"news", b"0-0")
    assert len(await store.read_after(b"roost:{t}:new", b"0-0", 1, 10)) == 1
    assert cluster.call(source, "EXISTS", KEY) == 1
    assert cluster.call(to, "CLUSTER", "COUNTKEYSINSLOT", cluster.slot(KEY)) >= 2
    await asyncio.to_thread(cluster.move, KEY, to)
    assert await store.call(COUNT, [b"roost:{t}:n"], [], 1) == 2


async def test_a_storm_of_moves_ends_no_call_but_within_its_budget(cluster, store):
    done, failed = 0, 0
    is_over = asyncio.Event()

    async def work() -> None:
        nonlocal done, failed
        while not is_over.is_set():
            try:
                await store.append(KEY, b"news", b"0-0", 0.5)
                done += 1
            except StoreError:
                failed += 1
            await asyncio.sleep(0.001)

    working = [asyncio.create_task(work()) for _ in range(4)]
    for number in range(8):
        to = cluster.nodes[number % 3]
        if to is not cluster.owner(KEY):
            await asyncio.to_thread(cluster.move, KEY, to)
    is_over.set()
    await asyncio.gather(*working)
    await until_works(store)

    assert done > 100
    assert await store.last_id(KEY) != b"0-0"
    assert cluster.call(cluster.owner(KEY), "XLEN", KEY) >= min(done, 1000)
    assert failed < done / 10


async def test_a_node_that_dies_with_our_slot_is_waited_for(cluster, store):
    owner = cluster.owner(KEY)
    owner.kill()
    await until(lambda: not store.is_up)
    assert await fault_of(store.append(KEY, b"news", b"0-0"), 0.5) is StoreFault.DOWN
    await asyncio.sleep(0.2)
    assert not store.is_up  # the others are there, but they are not home
    owner.start()
    await until_works(store)


async def test_redirections_in_a_circle_end():
    """Each of two servers says that the other has the slot."""
    ports: list[int] = []

    def answering(number: int):
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(4096):
                writer.write(b"-MOVED 1 127.0.0.1:%d\r\n" % ports[1 - number])
            writer.close()

        return serve

    servers = [await asyncio.start_server(answering(n), "127.0.0.1", 0) for n in range(2)]
    ports += [server.sockets[0].getsockname()[1] for server in servers]
    async with open_store(f"redis+cluster://127.0.0.1:{ports[0]}") as store:
        assert not store.is_up
        assert "redirected" in store.why_down
    for server in servers:
        server.close()
