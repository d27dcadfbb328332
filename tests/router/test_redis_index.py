"""The index and the leases as routers use them, through the store, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_twins import LeasesTwin, pack

from roost_loadtest.redis_servers import VERSIONS, RedisCluster, RedisSentinels, RedisServer
from roost_router.store import scripts
from roost_router.store.address import parse_address
from roost_router.store.client import Store
from roost_router.store.errors import StoreError
from roost_router.store.index import (
    CHUNK_IDS,
    FencedError,
    HolderGoneError,
    HolderName,
    RedisIndex,
    Swept,
    Written,
)
from roost_router.store.leases import Leases
from roost_router.store.masks import MAX_BLOCKS, bucket_blocks, levels, mask_of, thinned
from roost_wire.kv_events import Tier

pytestmark = pytest.mark.e2e

PREFIX = b"roost:{1a2b3c4d}:"
DOCUMENT = Path(__file__).parents[2] / "docs/redis.md"


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as running:
        yield running


@asynccontextmanager
async def store_at(url: str) -> AsyncIterator[Store]:
    store = Store(parse_address(url), lambda is_up, why: None, probe_key=PREFIX + b"probe")
    await store.start()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def index_at(server: RedisServer) -> AsyncIterator[RedisIndex]:
    server.client.flushall()
    async with store_at(server.url) as store:
        yield RedisIndex(store, PREFIX, max_blocks=1_000_000)


def ids_of(count: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(8 * count)


async def test_what_was_added_is_found_with_its_holders(server: RedisServer) -> None:
    ids = ids_of(2 * CHUNK_IDS + 1)
    async with index_at(server) as index:
        device = await index.open_holder(b"http://a:1", Tier.DEVICE, 2**63, 1)
        host = await index.open_holder(b"http://a:1", Tier.HOST, 2**63, 1)

        written = await index.add(device, ids, 0)
        await index.add(host, ids[: 8 * CHUNK_IDS], 0)
        found = await index.lookup(ids, 0.5)

        assert written == Written(2 * CHUNK_IDS + 1, 0, 0)
        assert found.levels == [(CHUNK_IDS, 0b11), (2 * CHUNK_IDS, 0b01)]  # every second is asked
        assert found.holders == {
            0: HolderName(b"http://a:1", Tier.DEVICE, 2**63),
            1: HolderName(b"http://a:1", Tier.HOST, 2**63),
        }
        assert await index.remove(device, ids[-8:]) == Written(1, 0, 0)
        assert (await index.lookup(ids[:-8], 0.5)).levels[-1] == (2 * CHUNK_IDS, 0b01)


async def test_a_restart_is_seen_by_the_next_lookup(server: RedisServer) -> None:
    ids = ids_of(10)
    async with index_at(server) as index:
        old = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        await index.add(old, ids, 0)
        await index.open_holder(b"b", Tier.DEVICE, 1, 1)
        assert (await index.lookup(ids, 0.5)).levels == [(10, 1)]

        await index.open_holder(b"a", Tier.DEVICE, 2, 1)

        assert (await index.lookup(ids, 0.5)).levels == []
        with pytest.raises(HolderGoneError):
            await index.add(old, ids, 0)
        with pytest.raises(FencedError):
            await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        with pytest.raises(HolderGoneError):
            await index.retire_holder(old)


async def test_a_flushed_server_is_an_empty_index(server: RedisServer) -> None:
    ids = ids_of(10)
    async with index_at(server) as index:
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        await index.add(holder, ids, 0)
        await index.lookup(ids, 0.5)

        server.client.flushall()

        found = await index.lookup(ids, 0.5)
        assert (found.levels, found.holders) == ([], {})
        assert await index.sweep() == Swept(True, 0, 0, 0, 0)
        with pytest.raises(HolderGoneError):
            await index.remove(holder, ids)


async def test_the_sweep_goes_round_and_frees_numbers(server: RedisServer) -> None:
    async with index_at(server) as index:
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        await index.add(holder, ids_of(3000), 0)
        await index.retire_holder(holder)

        swept: list[Swept] = []
        while sum(one.is_round_over for one in swept) < 2:
            swept.append(await index.sweep())

        assert sum(one.removed for one in swept) == 3000
        assert [one.freed for one in swept if one.is_round_over] == [0, 1]
        assert (await index.open_holder(b"b", Tier.DEVICE, 1, 1)).number == 0


async def test_the_index_never_holds_more_than_it_may(server: RedisServer) -> None:
    server.client.flushall()
    async with store_at(server.url) as store:
        index = RedisIndex(store, PREFIX, max_blocks=32_768)
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        evicted = (await index.add(holder, ids_of(20_000), 0)).evicted

        assert evicted > 1000
        assert len(server.client.keys(PREFIX + b"b:*")) == 20_000 - evicted
        assert all(server.client.hlen(key) == 1 for key in server.client.keys(PREFIX + b"b:*"))


async def test_ids_that_are_not_whole_are_refused(server: RedisServer) -> None:
    async with index_at(server) as index:
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        for call in (
            index.add(holder, b"x" * 9, 0),
            index.remove(holder, b"x"),
            index.lookup(b"x", 1),
        ):
            with pytest.raises(ValueError, match="8 bytes each"):
                await call


async def test_a_cluster_takes_every_script_with_one_declared_key() -> None:
    """Keys of buckets are computed inside; by the hash tag they are in the declared key's slot."""
    with RedisCluster() as cluster:
        async with store_at(cluster.url) as store:
            index, ids = RedisIndex(store, PREFIX, max_blocks=100_000), ids_of(500)
            leases = Leases(store, PREFIX, b"router")
            holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
            await index.add(holder, ids, 0)
            assert (await leases.beat([b"a"])).keys() == {b"a"}

            other = next(node for node in cluster.nodes if node is not cluster.owner(PREFIX))
            cluster.move(PREFIX, other)

            assert (await index.lookup(ids, 0.5)).levels == [(500, 1)]
            await index.remove(holder, ids[-8:])
            await index.retire_holder(holder)
            while not (await index.sweep()).is_round_over:
                pass
            assert (await index.lookup(ids, 0.5)).levels == []
            await leases.release()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_replica_of_redis_has_all_that_scripts_wrote(version: str) -> None:
    """What a script wrote is replicated, not the script: its clock is read once."""
    with RedisSentinels(version) as redis:
        async with store_at(redis.servers[0].url) as store:
            index, leases = (
                RedisIndex(store, PREFIX, max_blocks=32_768),
                Leases(store, PREFIX, b"r"),
            )
            first = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
            await index.add(first, ids_of(3000), 0)  # evicts, too
            await index.retire_holder(first)
            second = await index.open_holder(b"a", Tier.DEVICE, 2, 1)
            await index.add(second, ids_of(300), 0)
            await index.remove(second, ids_of(100))
            while not (await index.sweep()).is_round_over:
                pass
            await leases.beat([b"a", b"b"])

        primary, replica = (server.client for server in redis.servers)
        assert primary.wait(1, 10_000) == 1
        keys = sorted(primary.keys(PREFIX + b"[bhl]*"))
        assert len(keys) > 100
        assert sorted(replica.keys(PREFIX + b"[bhl]*")) == keys
        assert all(primary.hgetall(key) == replica.hgetall(key) for key in keys)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_user_with_the_documented_rights_may_do_everything(version: str) -> None:
    words = DOCUMENT.read_text().partition("**Rights.**")[2].split("`")[1::2]
    pattern, commands = words[0], " ".join(words[1:]).split()
    assert "hsetnx" in commands
    rights = " ".join(f"+{command}" for command in [*commands, "set", "auth"])
    users = ["user default off", f"user roost on >secret ~{pattern} -@all {rights}"]
    with RedisServer(version, users=users) as server:
        async with store_at(f"redis://roost:secret@127.0.0.1:{server.port}") as store:
            index, leases = (
                RedisIndex(store, PREFIX, max_blocks=32_768),
                Leases(store, PREFIX, b"r"),
            )
            assert await leases.beat([b"a"])
            holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
            await index.add(holder, ids_of(3000), 0)
            await index.remove(holder, ids_of(10))
            assert (await index.lookup(ids_of(9, seed=2), 0.5)).holders
            await index.retire_holder(holder)
            while not (await index.sweep()).is_round_over:
                pass
            await leases.release()


async def test_a_full_server_takes_what_makes_room_and_nothing_half(server: RedisServer) -> None:
    ids = ids_of(300)
    async with index_at(server) as index:
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        other = await index.open_holder(b"b", Tier.DEVICE, 1, 1)
        for one in (holder, other):
            await index.add(one, ids, 0)
        await index.retire_holder(other)
        server.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreError, match="OOM"):
                await index.add(holder, ids_of(20, seed=2), 0)
            with pytest.raises(StoreError, match="OOM"):
                await index.open_holder(b"a", Tier.DEVICE, 2, 1)
            assert (await index.lookup(ids, 0.5)).levels == [(300, 1)]
            assert (await index.remove(holder, ids[-80:])).changed == 10
            while not (await index.sweep()).is_round_over:
                pass
        finally:
            server.client.config_set("maxmemory", 0)
        assert (await index.lookup(ids, 0.5)).levels == [(290, 1)]
        assert (await index.lookup(ids_of(20, seed=2), 0.5)).levels == []


FIELDS = [b"at", b"live", b"dead", b"going", b"cursor", b"gen", b"r0", b"s0", b"ndevice a"]


@pytest.mark.parametrize("field", FIELDS, ids=bytes.decode)
@pytest.mark.parametrize("garbage", [b"", b"-1", b"0.5", b"1e300", b"\xff" * 70, b"9 9 x y z"])
async def test_a_poisoned_table_is_got_over(
    server: RedisServer, field: bytes, garbage: bytes
) -> None:
    """Whoever may write to Redis can make the index forget or lie, but break nothing."""
    ids = ids_of(9)
    async with index_at(server) as index:
        holder = await index.open_holder(b"a", Tier.DEVICE, 1, 1)
        await index.add(holder, ids, 0)
        server.client.hset(PREFIX + b"holders", field, garbage)

        await index.lookup(ids, 0.5)
        for write in (index.add(holder, ids, 0), index.remove(holder, ids)):
            with suppress(HolderGoneError):
                await write
        while not (await index.sweep()).is_round_over:
            pass
        while not (await index.sweep()).is_round_over:
            pass
        again = await index.open_holder(b"a", Tier.DEVICE, 2, 2)
        assert (await index.add(again, ids, 0)).skipped == 0
        levels_found = (await index.lookup(ids, 0.5)).levels
        assert [depth for depth, _ in levels_found] == [9]


# leases


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    beats=st.lists(
        st.tuples(
            st.sampled_from(["beat", "beat", "beat", "release", "die", "lose"]),
            st.sampled_from([b"r1", b"r2", b"r 3"]),
            st.lists(st.sampled_from([b"a", b"b c", b"d\x00"]), unique=True),
        ),
        max_size=40,
    )
)
def test_leases_do_what_their_twin_does(
    server: RedisServer, beats: list[tuple[str, bytes, list[bytes]]]
) -> None:
    redis, twin = server.client, LeasesTwin()
    redis.flushall()
    for script in (scripts.LEASE, scripts.RELEASE):
        redis.script_load(script.source)
    key, greatest = PREFIX + b"leases", 0
    for what, router, replicas in beats:
        if what == "beat":
            fences = redis.evalsha(scripts.LEASE.sha, 1, key, router, 60_000, 86_400, *replicas)
            newest = max(map(int, fences), default=0)
            assert fences == twin.beat(router, replicas, max(newest, greatest))
            greatest = max(newest, greatest)
        elif what == "release":
            assert redis.evalsha(scripts.RELEASE.sha, 1, key, router) == twin.release(router)
        elif what == "die":
            redis.delete(PREFIX + b"router:" + router)
            twin.release(router)
        else:
            redis.delete(key)
            twin.leases.clear()
        kept = {name: b"%d %b" % lease for name, lease in twin.leases.items()}
        assert redis.hgetall(key) == kept
        assert set(redis.keys(PREFIX + b"router:*")) == {
            PREFIX + b"router:" + one for one in twin.alive
        }


async def test_a_dead_feeder_is_followed_by_another_with_a_greater_fence(
    server: RedisServer,
) -> None:
    server.client.flushall()
    async with store_at(server.url) as store:
        one, two = (Leases(store, PREFIX, name) for name in (b"one", b"two"))
        before = await one.beat([b"a", b"b"])
        assert await two.beat([b"a", b"b"]) == {}
        assert 0 < server.client.pttl(PREFIX + b"router:one") <= 1300
        assert await one.beat([b"a", b"b"]) == before

        server.client.delete(PREFIX + b"router:one")  # as its life's end would

        after = await two.beat([b"a", b"b"])
        assert all(after[name] > before[name] for name in (b"a", b"b"))
        assert (await one.beat([b"a", b"b", b"c"])).keys() == {b"c"}
        await two.release()
        assert (await one.beat([b"a"]))[b"a"] > after[b"a"]


async def test_fences_grow_although_the_clock_went_back(server: RedisServer) -> None:
    server.client.flushall()
    server.client.hset(PREFIX + b"leases", "a", "9000000000000000 somebody")
    async with store_at(server.url) as store:
        assert await Leases(store, PREFIX, b"r").beat([b"a"]) == {b"a": 9_000_000_000_000_001}


async def test_leases_of_replicas_that_are_no_more_are_forgotten(server: RedisServer) -> None:
    server.client.flushall()
    async with store_at(server.url) as store:
        one, two = (Leases(store, PREFIX, name) for name in (b"one", b"two"))
        await one.beat([b"old %d" % number for number in range(600)])
        await two.beat([b"b"])
        assert server.client.hlen(PREFIX + b"leases") == 601  # their feeder is alive
        await one.release()

        await two.beat([b"a"])

        assert set(server.client.hkeys(PREFIX + b"leases")) == {b"a", b"b"}
        assert 0 < server.client.ttl(PREFIX + b"leases") <= 86_400


# what values say


def test_a_value_names_the_holders_that_the_scripts_packed() -> None:
    for holders in ([0], [7], [8], [31], [32], [63, 64], [300], [0, 503], [480, 503]):
        mask = sum(1 << number for number in holders)
        assert mask_of(pack(15, mask)) == mask
    assert mask_of(b"") == 0


def test_levels_leave_out_the_dead_and_end_at_the_first_hole() -> None:
    runs = [2, pack(0, 0b111), 5, pack(0, 0b101), 9, pack(0, 0b011)]

    assert levels(runs, 0b111) == [(2, 0b111), (5, 0b101), (9, 0b001)]
    assert levels(runs, 0b101) == [(5, 0b101), (9, 0b001)]
    assert levels(runs, 0b110) == [(2, 0b110), (5, 0b100)]
    assert levels(runs, 0) == []
    assert levels([], 0b111) == []


@pytest.mark.parametrize(
    ("count", "step"), [(0, 1), (1, 1), (512, 1), (513, 2), (1024, 2), (1025, 4), (8192, 16)]
)
def test_long_chains_are_thinned_to_so_many_ids(count: int, step: int) -> None:
    ids = ids_of(count)

    asked, found = thinned(ids, 512)

    assert found == step
    every = [ids[at : at + 8] for at in range(8 * (step - 1), len(ids), 8 * step)]
    assert asked == b"".join(every)
    assert levels([3, pack(0, 1)], 1, step) == [(3 * step, 1)]


def test_an_index_may_be_neither_too_small_nor_too_large() -> None:
    assert bucket_blocks(32_768) == 1
    assert bucket_blocks(MAX_BLOCKS) == 480
    for wrong in (32_767, MAX_BLOCKS + 1):
        with pytest.raises(ValueError, match="max_blocks must be from 32768 to 15728640"):
            bucket_blocks(wrong)
