"""Routers write what replicas hold into the index of a real Redis; anybody can look it up."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from asking import complete, get, until

from roost_loadtest.redis_servers import VERSIONS, RedisServer
from roost_router.store import feeder
from roost_router.store.address import parse_address
from roost_router.store.client import Store
from roost_router.store.errors import StoreError
from roost_router.store.index import HolderName, RedisIndex
from roost_router.store.secret import ClusterSecret
from roost_wire.kv_events import Tier

pytestmark = pytest.mark.e2e  # Redis, routers and others, as processes

SECRET = ClusterSecret(b"a secret that is thirty-two bytes")


@pytest.fixture(params=VERSIONS)
def server(request):
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def sharing(server, tmp_path, monkeypatch):
    """Options of a router that shares there, and looks often whether all is there."""
    monkeypatch.setattr(feeder, "LOOK_S", 0.5)
    path: Path = tmp_path / "secret"
    path.write_bytes(b"a secret that is thirty-two bytes")
    return {"redis": server.url, "redis_secret_file": path}


class Reader:
    """Somebody who was not there: knows the secret, and asks the index alone."""

    def __init__(self, index: RedisIndex) -> None:
        self.index = index

    async def holders(self, chain: list[int]) -> dict[HolderName, int]:
        """How many leading blocks of a chain who has."""
        found = await self.index.lookup(SECRET.block_ids(chain), 1.0)
        return {
            name: depth
            for depth, mask in found.levels
            for number, name in found.holders.items()
            if mask >> number & 1
        }

    async def until(self, router) -> None:
        """Wait until it says of texts exactly what `router` believes."""

        async def is_right() -> bool:
            index = router.placer.index
            for replica in router.placer.fleet.replicas:
                for other in router.placer.fleet.replicas:
                    for touch in index.touches(other.holder):
                        if touch.first:
                            continue
                        held = index.num_held(replica.holder, touch.blocks, len(touch.blocks))
                        found = await self.holders(touch.blocks)
                        said = {name.replica: depth for name, depth in found.items()}
                        if said.get(replica.url.encode(), 0) != held:
                            return False
            return True

        async with asyncio.timeout(20):
            while True:
                try:
                    if await is_right():
                        return
                except StoreError:
                    pass
                await asyncio.sleep(0.02)


@asynccontextmanager
async def reading(server):
    store = Store(
        parse_address(server.url), lambda is_up, why: None, probe_key=SECRET.prefix + b"probe"
    )
    await store.start()
    try:
        yield Reader(RedisIndex(store, SECRET.prefix, max_blocks=feeder.MAX_BLOCKS))
    finally:
        await store.close()


@pytest.fixture
async def reader(server):
    async with reading(server) as reader:
        yield reader


def chains(router) -> list[list[int]]:
    """Chains of all prompts that replicas are believed to hold, those that share nothing."""
    index = router.placer.index
    return [
        touch.blocks
        for replica in router.placer.fleet.replicas
        for touch in index.touches(replica.holder)
        if not touch.first
    ]


async def fill(router, num_prompts: int = 10) -> None:
    for number in range(num_prompts):
        assert await complete(router, prompt=f"{number} " * 1000) == 200


async def test_what_a_feeder_wrote_can_be_looked_up(start_router, replicas, sharing, reader):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)

    [chain, *_] = chains(router)
    [(name, depth)] = (await reader.holders(chain)).items()
    assert depth == len(chain) > 5
    assert name.tier is Tier.DEVICE
    assert name.replica.decode() in {fake.url for fake in replicas}
    assert await reader.holders([block ^ 1 for block in chain]) == {}


async def test_a_replica_that_begins_anew_holds_nothing(start_router, replicas, sharing, reader):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)
    before = chains(router)

    for replica in router.placer.fleet.replicas:
        router.placer.fleet.started_anew(replica, 2e9)
    assert not chains(router)

    async def is_empty() -> bool:
        return not any([await reader.holders(chain) for chain in before])

    async with asyncio.timeout(10):
        while not await is_empty():
            await asyncio.sleep(0.02)
    await fill(router, 3)
    await reader.until(router)
    [chain, *_] = chains(router)
    assert {name.epoch for name in await reader.holders(chain)} == {2_000_000_000_000}


async def test_what_is_evicted_is_removed(start_router, replicas, sharing, reader):
    for fake in replicas:
        fake.capacity_blocks = 200  # of 16 tokens: some 13 KB of text
    router = await start_router(*replicas, **sharing)
    await fill(router, 4)
    await reader.until(router)
    first = chains(router)

    for number in range(50, 70):
        await complete(router, prompt=f"{number} " * 1000)
    index, fleet = router.placer.index, router.placer.fleet
    gone = [
        chain
        for chain in first
        if not any(index.num_held(r.holder, chain, len(chain)) for r in fleet.replicas)
    ]
    assert gone
    await reader.until(router)
    for chain in gone:
        assert await reader.holders(chain) == {}
    assert router.link.feeder.num_removed > 0


async def test_a_feeder_that_dies_is_succeeded(start_router, replicas, sharing, reader):
    one = await start_router(*replicas, **sharing)
    await until(lambda: one.link.feeder.num_holders == 2)
    other = await start_router(*replicas, **sharing)
    await fill(one)
    await reader.until(one)
    assert other.link.feeder.num_holders == 0

    for task in one.link._tasks:  # as after a SIGKILL
        task.cancel()

    await until(lambda: other.link.feeder.num_holders == 2)
    await fill(other, 12)
    await reader.until(other)
    assert other.link.feeder.num_begun == 2


async def test_who_lost_the_lease_writes_no_more(start_router, replicas, sharing, reader):
    one = await start_router(*replicas, **sharing)
    await until(lambda: one.link.feeder.num_holders == 2)
    other = await start_router(*replicas, **sharing)
    fences = one.link.feeder.fences
    _, _, feed, feeding = one.link._tasks
    feed.cancel()  # it beats no more, and does not know it
    await until(lambda: other.link.feeder.num_holders == 2)
    await fill(one)

    await until(lambda: one.link.feeder.num_holders == 0)

    assert one.link.feeder.fences is fences
    assert not feeding.done()
    await reader.until(other)


async def test_an_index_that_is_lost_is_written_again(
    start_router, replicas, sharing, reader, server
):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)

    server.client.flushall()
    await reader.until(router)

    server.client.delete(SECRET.prefix + b"holders")  # its table alone
    await fill(router, 2)
    await reader.until(router)


async def test_a_redis_that_was_away_gets_what_it_missed(
    start_router, replicas, sharing, reader, server
):
    router = await start_router(*replicas, **sharing)
    await fill(router, 3)
    await reader.until(router)

    server.kill()
    await fill(router)
    await until(lambda: sum(router.link.feeder.num_errors.values()) > 0)
    server.start()

    await reader.until(router)


async def test_a_replica_that_leaves_is_let_go(start_router, replicas, sharing, reader):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)

    gone, left = router.placer.fleet.replicas
    router.placer.fleet.remove(gone, 0.0)
    async with asyncio.timeout(10):
        while {name.replica for name in (await reader.index.holders()).values()} != {
            left.url.encode()
        }:
            await asyncio.sleep(0.02)
    await reader.until(router)


async def test_a_dump_tells_no_block(start_router, replicas, sharing, reader, server):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)
    client = server.client
    dump = b""
    for key in client.keys("*"):
        dump += key
        if client.type(key) == b"hash":
            dump += b"".join(name + value for name, value in client.hgetall(key).items())

    blocks = {block for chain in chains(router) for block in chain}
    right = [SECRET.block_ids([block])[2:] for block in blocks]
    assert all(block_id in dump for block_id in right)
    wrong = ClusterSecret(b"another secret of thirty-two bytes")
    for block in blocks:
        for length in (6, 8):  # an index keeps 6 bytes of an id
            for order in ("little", "big"):
                assert block.to_bytes(8, order)[:length] not in dump
                assert block.to_bytes(8, order)[-length:] not in dump
        assert wrong.block_ids([block])[2:] not in dump


async def test_metrics_tell_what_is_written(start_router, replicas, sharing, reader):
    router = await start_router(*replicas, **sharing)
    await fill(router)
    await reader.until(router)

    _, page, _ = await get(router, "/metrics")

    num_blocks = len({block for chain in chains(router) for block in chain})
    assert b'index_written_blocks_total{change="added"} %d.0' % num_blocks in page
    assert b"roost_router_index_holders 2.0" in page
    assert b"roost_router_index_begun_total 2.0" in page
