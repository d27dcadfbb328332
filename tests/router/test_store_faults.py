"""What may befall a Redis server, done to a real one: calls end, and work again when it is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest
import redis
from stores import Lua, Told, fault_of, open_store, until, until_works

from roost_loadtest.redis_servers import VERSIONS, RedisServer
from roost_loadtest.tcp_proxy import TcpProxy
from roost_router.store.client import Store
from roost_router.store.errors import StoreError, StoreFault

pytestmark = pytest.mark.e2e

KEY = b"roost:{t}:news"
ONE = Lua("return redis.call('INCR', KEYS[1])")
AWAY = {StoreFault.DOWN, StoreFault.LATE}


@pytest.fixture(params=VERSIONS)
def server(request) -> Iterator[RedisServer]:
    with RedisServer(request.param) as running:
        yield running


@pytest.fixture
def proxy(server) -> Iterator[TcpProxy]:
    with TcpProxy(server.port) as running:
        yield running


@contextlib.asynccontextmanager
async def behind(proxy: TcpProxy, told: list[Told] | None = None) -> AsyncIterator[Store]:
    async with open_store(f"redis://127.0.0.1:{proxy.port}", told) as store:
        yield store


async def each_call_fails(store: Store, budget_s: float = 0.05) -> set[StoreFault]:
    """What calls of every kind fail with, all at once and one after another."""
    calls = [
        lambda: store.append(KEY, b"news", b"0-0", budget_s),
        lambda: store.read_after(KEY, b"0-0", budget_s, 10),
        lambda: store.read_range(KEY, b"-", 10, budget_s),
        lambda: store.last_id(KEY, budget_s),
        lambda: store.get(b"roost:{t}:a", budget_s),
        lambda: store.get_many([b"roost:{t}:a"], budget_s),
        lambda: store.set(b"roost:{t}:a", b"1", 1, budget_s),
        lambda: store.delete([b"roost:{t}:a"], budget_s),
        lambda: store.call(ONE, [b"roost:{t}:n"], [], budget_s),
    ]
    at_once = await asyncio.gather(*(fault_of(call(), budget_s + 1) for call in calls))
    return {*at_once, *[await fault_of(call(), budget_s + 1) for call in calls]}


async def test_a_server_that_is_not_there_is_found_when_it_comes():
    with RedisServer() as server:
        server.kill()
        told: list[Told] = []
        async with open_store(server.url, told) as store:
            assert await each_call_fails(store) == {StoreFault.DOWN}
            assert [change.is_up for change in told] == [False]
            assert "refused" in told[0].why.lower()
            server.start()
            await until_works(store)
            assert [change.is_up for change in told] == [False, True]


async def test_a_killed_server(server):
    told: list[Told] = []
    async with open_store(server.url, told) as store:
        waiting = asyncio.create_task(fault_of(store.read_after(KEY, b"0-0", 20, 1), 20))
        await asyncio.sleep(0.05)
        server.kill()
        assert await waiting is StoreFault.DOWN
        await until(lambda: not store.is_up)
        assert await each_call_fails(store) == {StoreFault.DOWN}
        server.start()
        await until_works(store)
        assert await store.call(ONE, [b"roost:{t}:n"], [], 1) == 1
    assert [change.is_up for change in told][:2] == [True, False]
    assert told[-1].is_up


async def test_a_stopped_server(server):
    async with open_store(server.url) as store:
        server.pause()
        assert StoreFault.LATE in await each_call_fails(store) <= AWAY
        await until(lambda: not store.is_up)
        assert "no reply" in store.why_down
        assert await each_call_fails(store) == {StoreFault.DOWN}
        server.resume()
        await until_works(store)


async def test_a_slow_server_serves_whoever_has_the_time(server, proxy):
    told: list[Told] = []
    async with behind(proxy, told) as store:
        await store.append(KEY, b"news", b"0-0")
        proxy.delay_s = 0.1  # each way
        for _ in range(3):
            assert await fault_of(store.get(KEY, 0.005), 0.005) is StoreFault.LATE
            await store.append(KEY, b"news", b"0-0", 10)
        proxy.delay_s = 0
        await until_works(store)
        assert server.client.xlen(KEY) >= 4
    assert [change.is_up for change in told] == [True]  # slow is not down


async def test_while_a_reply_is_overdue_nothing_more_is_sent_that_cannot_be_in_time(server, proxy):
    async with behind(proxy) as store:
        proxy.is_silent = True
        assert await fault_of(store.set(b"roost:{t}:n0", b"", None, 0.01), 0.01) is StoreFault.LATE
        for number in range(1, 50):
            call = store.set(b"roost:{t}:n%d" % number, b"", None, 0.001)
            assert await fault_of(call, 0.001) in AWAY
        proxy.is_silent = False
        await until_works(store)
        assert server.client.exists("roost:{t}:n0") == 1
        assert server.client.keys("roost:{t}:n?*") == [b"roost:{t}:n0"]


async def test_a_black_hole(server, proxy):
    async with behind(proxy) as store:
        proxy.is_silent = True
        assert StoreFault.LATE in await each_call_fails(store) <= AWAY
        await until(lambda: not store.is_up)
        assert await each_call_fails(store) == {StoreFault.DOWN}
        proxy.is_silent = False
        await until_works(store)


async def test_a_black_hole_from_the_start(proxy):
    proxy.is_silent = True
    async with behind(proxy) as store:
        assert not store.is_up
        await until(lambda: "no reply" in store.why_down or "no connection" in store.why_down)
        proxy.is_silent = False
        await until_works(store)


async def test_a_connection_that_breaks_under_many_calls(server, proxy):
    async with behind(proxy) as store:
        proxy.delay_s = 0.05
        calls = [asyncio.create_task(store.get(b"roost:{t}:a", 5)) for _ in range(100)]
        await asyncio.sleep(0.02)
        proxy.cut()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {StoreError}
        proxy.delay_s = 0
        await until_works(store)
    assert proxy.num_connections == 2


async def test_a_full_server_is_read_and_stays_up(server):
    async with open_store(server.url) as store:
        entry_id = await store.append(KEY, b"news", b"0-0")
        server.client.config_set("maxmemory", "100kb")  # less than the server itself takes
        assert await fault_of(store.append(KEY, b"more", b"0-0"), 0.5) is StoreFault.REFUSED
        assert await fault_of(store.call(ONE, [b"roost:{t}:n"], [], 1), 1) is StoreFault.REFUSED
        assert await store.read_range(KEY, b"-", 10) == [(entry_id, b"news")]
        assert store.is_up
        server.client.config_set("maxmemory", "0")
        await until_works(store)


async def test_a_server_that_is_full_from_the_start_is_up():
    with RedisServer(options={"maxmemory": "100kb", "maxmemory-policy": "noeviction"}) as server:
        async with open_store(server.url) as store:
            assert store.is_up
            with pytest.raises(StoreError, match="OOM"):
                await store.append(KEY, b"news", b"0-0")


async def by_append(store: Store) -> None:
    await store.append(KEY, b"news", b"0-0")


async def by_script(store: Store) -> None:
    await store.call(ONE, [b"roost:{t}:n"], [], 0.5)


@pytest.mark.parametrize("write", [by_append, by_script])
async def test_a_primary_that_became_a_replica(server, write):
    async with open_store(server.url) as store:
        await write(store)
        with RedisServer(server.version) as primary:
            server.client.replicaof("127.0.0.1", primary.port)
            await until(lambda: server.client.info()["master_link_status"] == "up")
            faults = [await fault_of(write(store), 0.5) for _ in range(3)]
            assert set(faults) <= {StoreFault.REFUSED, StoreFault.DOWN}
            await until(lambda: not store.is_up and "READONLY" in store.why_down)
            server.client.replicaof("NO", "ONE")
            await until_works(store)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_server_that_loads_its_data(version):
    """It looks at its connections after each 2 MB that it has loaded."""
    options = {"key-load-delay": 50_000, "rdbcompression": "no"}  # microseconds
    with RedisServer(version, options=options) as server:
        async with open_store(server.url) as store:
            pipe = server.client.pipeline()
            for number in range(30):
                pipe.set(f"roost:{{t}}:{number}", "x" * 500_000)
            pipe.execute()
            server.client.save()
            server.kill()
            server.start(until=lambda: is_loading(server))
            await until(lambda: "LOADING" in store.why_down)
            assert await each_call_fails(store) == {StoreFault.DOWN}
            await until_works(store)
            assert await store.get(b"roost:{t}:29") == b"x" * 500_000


def is_loading(server: RedisServer) -> bool:
    try:
        server.client.get("a")
    except redis.BusyLoadingError:
        return True
    except redis.ConnectionError:
        pass
    return False


async def test_a_flushed_server(server):
    async with open_store(server.url) as store:
        await store.append(KEY, b"news", b"0-0")
        await store.call(ONE, [b"roost:{t}:n"], [], 1)
        server.client.flushall()
        server.client.script_flush()

        assert await store.last_id(KEY) == b"0-0"
        assert await store.read_range(KEY, b"-", 10) == []
        assert await store.call(ONE, [b"roost:{t}:n"], [], 1) == 1
        await store.append(KEY, b"news", b"0-0")


async def test_values_of_another_type(server):
    other = b"roost:{t}:other"
    async with open_store(server.url) as store:
        server.client.rpush(KEY, "poison")
        server.client.hset(other, "poison", 1)
        for call in (
            store.append(KEY, b"news", b"0-0"),
            store.read_after(KEY, b"0-0", 0.1, 10),
            store.read_range(KEY, b"-", 10),
            store.last_id(KEY),
            store.get(other),
            store.call(ONE, [other], [], 1),
        ):
            assert await fault_of(call, 1.1) is StoreFault.REFUSED
        assert await store.get_many([other]) == [None]
        assert store.is_up
        await store.delete([KEY, other])
        await store.append(KEY, b"news", b"0-0")


async def test_a_stream_that_takes_no_entry_any_more(server):
    async with open_store(server.url) as store:
        server.client.xadd(KEY, {"b": "poison"}, id=f"{2**64 - 1}-{2**64 - 1}")
        assert await fault_of(store.append(KEY, b"news", b"0-0"), 0.5) is StoreFault.REFUSED
        assert store.is_up


async def test_a_server_with_no_room_for_us(server):
    async with open_store(server.url) as store:
        server.client.config_set("maxclients", 1)
        fault = await fault_of(store.read_after(KEY, b"0-0", 0.1, 1), 1.1)
        assert fault in {StoreFault.DOWN, StoreFault.REFUSED}  # closed before or after its reply
        await until_works(store)  # what is connected stays
        server.client.config_set("maxclients", 100)
        assert await store.read_after(KEY, b"0-0", 0.001, 1) == []


async def test_a_server_whose_time_is_taken_by_a_script(server):
    server.client.config_set("lua-time-limit", 10)
    async with open_store(server.url) as store:
        forever = Lua("while true do end")
        assert await fault_of(store.call(forever, [], [], 0.1), 0.1) is StoreFault.LATE
        assert await fault_of(store.get(KEY, 0.5), 0.5) in AWAY | {StoreFault.REFUSED}
        server.client.script_kill()
        await until_works(store)


async def test_idle_connections_that_the_server_closes(server):
    told: list[Told] = []
    server.client.config_set("timeout", 1)
    async with open_store(server.url, told) as store:
        await store.read_after(KEY, b"0-0", 0.001, 1)
        await until(lambda: len(told) >= 2)  # lost; then found again by itself
        await until(lambda: store.is_up)
        await until_works(store)


@pytest.mark.parametrize("seed", range(3))
async def test_faults_at_random_mix_up_no_reply(server, proxy, seed):
    """Every key's value is its name: whatever a call gives must be of its own key."""
    rng = Random(seed)
    keys = [b"roost:{t}:%d" % number for number in range(50)]
    outcomes = {"own": 0, "none": 0}

    async def ask() -> None:
        for _ in range(400):
            key = rng.choice(keys)
            budget_s = rng.choice((0.0005, 0.005, 0.05))
            call = asyncio.create_task(store.get(key, budget_s))
            if rng.random() < 0.1:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.003), call.cancel)
            try:
                assert await call == key
                outcomes["own"] += 1
            except (StoreError, asyncio.CancelledError):
                outcomes["none"] += 1
                await asyncio.sleep(0.002)

    async def disturb() -> None:
        for _ in range(12):
            await asyncio.sleep(rng.uniform(0.01, 0.1))
            match rng.choice(("cut", "slow", "silent", "stop")):
                case "cut":
                    proxy.cut()
                case "slow":
                    proxy.delay_s = rng.uniform(0, 0.02)
                case "silent":
                    proxy.is_silent = True
                case "stop":
                    server.pause()
            await asyncio.sleep(rng.uniform(0, 0.05))
            server.resume()
            proxy.is_silent, proxy.delay_s = False, 0.0

    async with behind(proxy) as store:
        for key in keys:
            await store.set(key, key, None)
        await asyncio.gather(disturb(), *(ask() for _ in range(4)))
        await until_works(store)
    assert min(outcomes.values()) > 20
