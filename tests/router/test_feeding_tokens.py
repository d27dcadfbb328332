"""What streams of KV events tell is written into the index of a real Redis, by tier."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random

import pytest

from roost_loadtest.redis_servers import VERSIONS, RedisServer
from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.token_identity import chain_root, follow, local_hashes
from roost_router.index.token_knowledge import TokenKnowledge
from roost_router.kv.trust import Reason, Trust
from roost_router.store import feeder
from roost_router.store.address import parse_address
from roost_router.store.client import Store
from roost_router.store.errors import StoreError
from roost_router.store.feeder import Feeder
from roost_router.store.index import RedisIndex
from roost_router.store.secret import ClusterSecret
from roost_router.told_residency import ToldResidency
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from roost_wire.load_report import LoadReport

SECRET = ClusterSecret(b"a secret that is thirty-two bytes")
URL = "http://127.0.0.1:8101"
STREAM = f"{URL} #0".encode()
SIZE = 16
TOKENS = tuple(Random(1).choices(range(30_000), k=SIZE * 40))
NAMES = tuple(Random(2).sample(range(1 << 62), 40))  # as the engine calls the blocks


@pytest.fixture(scope="module", params=VERSIONS)
def server(request):
    with RedisServer(request.param) as server:
        yield server


class Bench:
    """A router's feeder, told what a stream tells; the index it writes to."""

    def __init__(self, store: Store, fence: int = 1) -> None:
        texts = PrefixIndex()
        self.fleet = Fleet(texts, [URL])
        [self.replica] = self.fleet.replicas
        self.fleet.answered(self.replica, ["m"], LoadReport(started_at=1000.5), "vllm")
        self.told = ToldResidency(TokenKnowledge(1 << 24, 1 << 24), ["m"], lambda _: None)
        self.sink = self.told.sink(self.replica, 0)
        self.sink.trust_changed(Trust.APPROXIMATE, Reason.LATE_JOIN)
        self.index = RedisIndex(store, SECRET.prefix, max_blocks=feeder.MAX_BLOCKS)
        self.now = 0.0
        self.feeder = Feeder(self.index, SECRET, self.fleet, texts, self.told, lambda: self.now)
        self.feeder.fences = {URL: fence}

    def store(self, tier: Tier = Tier.DEVICE, num_blocks: int = 40, **more: str) -> None:
        names, tokens = NAMES[:num_blocks], TOKENS[: SIZE * num_blocks]
        self.sink.apply([BlockStored(names, None, tokens, SIZE, tier, **more)])

    def remove(self, tier: Tier, start: int) -> None:
        self.sink.apply([BlockRemoved(NAMES[start:][::-1], tier)])

    async def held(self, adapter: str | None = None) -> dict[str, int]:
        """By tier: how many blocks of the prompt the index says that the stream told of."""
        await self.feeder.beat()
        chain = follow(chain_root(adapter, None), local_hashes(TOKENS, SIZE))
        found = await self.index.lookup(SECRET.block_ids(chain), 1.0)
        held = {}
        for depth, mask in found.levels:
            for number, name in found.holders.items():
                if mask >> number & 1:
                    assert name.replica == STREAM
                    held[name.tier.value] = depth
        return held

    async def names(self) -> set[tuple[bytes, str, int]]:
        there = (await self.index.holders()).values()
        return {(name.replica, name.tier.value, name.epoch) for name in there}


@pytest.fixture
async def bench(server):
    server.client.flushall()
    store = Store(
        parse_address(server.url), lambda is_up, why: None, probe_key=SECRET.prefix + b"probe"
    )
    await store.start()
    try:
        yield Bench(store)
    finally:
        await store.close()


def another(bench: Bench, fence: int) -> Bench:
    """Another router on the same store."""
    return Bench(bench.index._store, fence)  # type: ignore[arg-type]


async def test_blocks_go_by_their_tiers(bench):
    bench.store()
    assert await bench.held() == {"device": 40}

    bench.store(Tier.HOST, 30)
    bench.remove(Tier.DEVICE, 20)
    assert await bench.held() == {"device": 20, "host": 30}

    bench.remove(Tier.HOST, 0)
    assert await bench.held() == {"device": 20}


async def test_adapters_are_told_apart(bench):
    bench.store(lora_name="an adapter")
    assert await bench.held() == {}
    assert await bench.held("an adapter") == {"device": 40}


@pytest.mark.parametrize("what", ["cleared", "dropped", "restart", "silent"])
async def test_what_holds_no_more_is_dead_at_once(bench, what):
    bench.store()
    bench.store(Tier.HOST)
    assert await bench.held() == {"device": 40, "host": 40}

    if what == "cleared":
        bench.sink.apply([AllBlocksCleared()])
    elif what == "dropped":
        bench.sink.drop_all()
    elif what == "restart":
        bench.sink.drop_all()
        bench.fleet.started_anew(bench.replica, 2000.25)
    else:
        bench.sink.trust_changed(Trust.BLIND, Reason.SILENT)
    assert await bench.held() == {}

    bench.sink.trust_changed(Trust.EXACT, Reason.NONE)
    bench.store(num_blocks=9)
    assert await bench.held() == ({"device": 40, "host": 40} if what == "silent" else {"device": 9})
    epoch = 2_000_250 if what == "restart" else 1_000_500
    assert (STREAM, "device", epoch) in await bench.names()


async def test_a_router_that_takes_over_writes_what_it_was_told(bench):
    bench.store()
    bench.store(Tier.HOST)
    await bench.held()

    other = another(bench, fence=2)
    other.store(num_blocks=12)
    assert await other.held() == {"device": 12}
    assert await bench.held() == {"device": 12}  # it is refused
    bench.store(Tier.HOST, 5)  # a tier that nobody has
    assert await bench.held() == {"device": 12}
    bench.remove(Tier.DEVICE, 0)
    assert await bench.held() == {"device": 12}
    bench.now += feeder.LOOK_S
    assert await bench.held() == {"device": 12}
    assert bench.feeder.num_holders == 0


async def test_more_than_a_beat_writes_comes_with_the_next(bench, monkeypatch):
    monkeypatch.setattr(feeder, "SLICES", 2)
    monkeypatch.setattr(feeder, "SLICE_BLOCKS", 8)
    await bench.feeder.beat()
    bench.store()

    written = []
    for _ in range(5):
        await bench.feeder.beat()
        written.append(bench.feeder.num_added)

    assert written[0] < written[1] < written[2] == written[4] == 40


async def test_a_write_that_failed_is_made_again(bench, server):
    bench.store()
    server.pause()
    with pytest.raises(StoreError):
        await bench.feeder.beat()
    server.resume()
    held: dict[str, int] = {}
    async with asyncio.timeout(20):
        while held != {"device": 40}:
            with contextlib.suppress(StoreError):
                held = await bench.held()
            await asyncio.sleep(0.02)


async def test_holders_that_change_nothing_are_looked_at(bench, server):
    bench.store()
    assert await bench.held() == {"device": 40}
    server.client.flushall()

    bench.now += feeder.LOOK_S / 2
    assert await bench.held() == {}
    bench.now += feeder.LOOK_S / 2
    await bench.held()  # sees it

    assert await bench.held() == {"device": 40}
