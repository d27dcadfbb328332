"""Our engine's publisher and the router's subscriber over real sockets, faults between them."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
import zmq
from resident_set import ResidentSet, fill

from roost_engine import kv_publisher
from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.kv_log import KvEventLog
from roost_engine.kv_publisher import KvPublisher
from roost_engine.kv_teller import KvTeller
from roost_engine.request import Request, SamplingParams
from roost_engine.scheduler import Scheduler
from roost_router.kv.source import Dialect, KvSource
from roost_router.kv.subscriber import Subscriber
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_dialects.vllm import VllmDecoder
from roost_wire.told_load import ToldLoad

ANY = "tcp://127.0.0.1:*"


def listening(endpoint):
    """To be bound, not connected to."""
    return f"tcp://*:{endpoint.rpartition(':')[2]}"


class Engine:
    """A real pool whose events are published; the test is its engine thread."""

    def __init__(self, epoch=1, endpoint=ANY, replay_endpoint=ANY, topic=""):
        log = KvEventLog(epoch)
        self.pool = BlockPool(64, 2, num_host_blocks=16, on_event=log.append)
        config = SchedulerConfig(max_step_tokens=16, max_running=4, max_model_len=64)
        self.scheduler = Scheduler(config, self.pool, frozenset())
        self.teller = KvTeller(log)
        self.publisher = KvPublisher(endpoint, replay_endpoint, topic)
        self.teller.on_batch = self.publisher.publish
        self.teller.on_snapshot = self.publisher.take_snapshot
        self.publisher.start(self._ask_snapshot)
        self.next_token = 0

    def _ask_snapshot(self):
        self.teller.ask_snapshot()
        self.beat()

    def step(self):
        """A prompt of some new blocks; the oldest leave."""
        tokens = list(range(self.next_token, self.next_token + 9))
        self.next_token += 9
        self.pool.release(fill(self.pool, tokens))
        self.beat()

    def beat(self):
        for listener, batch in self.teller.due(self.scheduler, time.monotonic()):
            listener(batch)

    def source(self, **changes):
        told = self.publisher.source(2)
        source = KvSource(Dialect.VLLM, told.endpoint, told.replay_endpoint, told.topic)
        return msgspec.structs.replace(source, **changes)


class Sink(ResidentSet):
    def __init__(self):
        super().__init__()
        self.trusts = []
        self.num_dropped = 0

    def apply(self, events):
        for event in events:
            super().apply(event)

    def drop_all(self):
        self.num_dropped += 1
        for hashes in self.hashes.values():
            hashes.clear()

    def trust_changed(self, trust, reason):
        self.trusts.append((trust, reason))


class Lossy:
    """Between a publisher and a subscriber: loses the batches with these numbers."""

    def __init__(self, context, endpoint):
        self.lost: set[int] = set()
        self.sub, self.pub = context.socket(zmq.SUB), context.socket(zmq.PUB)
        self.sub.connect(endpoint)
        self.sub.subscribe("")
        self.pub.bind(ANY)
        self.endpoint = self.pub.getsockopt_string(zmq.LAST_ENDPOINT)
        asyncio.get_running_loop().add_reader(self.sub.fileno(), self.forward)

    def forward(self):
        while True:
            try:
                frames = self.sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if int.from_bytes(frames[1]) not in self.lost:
                self.pub.send_multipart(frames)

    def close(self):
        asyncio.get_running_loop().remove_reader(self.sub.fileno())
        self.sub.close()
        self.pub.close()


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
async def follow(context):
    """Follow a source; closed in any case: uvloop does not end while it reads a closed socket."""
    followed = []

    def start(source):
        followed.append(Followed(context, source))
        return followed[-1]

    yield start
    for each in followed:
        each.subscriber.close()


@pytest.fixture
async def lossy(context, engine):
    lossy = Lossy(context, engine.source().endpoint)
    yield lossy
    lossy.close()


@pytest.fixture
async def start_engine():
    """Start engines; those that are left are closed."""
    engines = []

    def start(*arguments, **options):
        engines.append(Engine(*arguments, **options))
        return engines[-1]

    yield start
    for engine in engines:
        await engine.publisher.close()


class Followed:
    """A sink behind a subscriber."""

    def __init__(self, context, source):
        self.sink = Sink()
        self.loads = []
        self.subscriber = Subscriber(
            context, source, VllmDecoder(), self.sink, time.monotonic, on_load=self.loads.append
        )

    async def until(self, condition, engine=None):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)
                self.subscriber.tick()
                if engine is not None:
                    engine.beat()

    async def until_trusted(self, trust=Trust.EXACT, engine=None):
        await self.until(lambda: self.subscriber.feed.trust is trust, engine)

    async def until_equal(self, engine):
        """Trusted, and not behind: the sink has what the pool has."""
        last = engine.teller._log._num_batches
        await self.until(
            lambda: (
                self.subscriber.feed.trust is Trust.EXACT and self.subscriber.feed._next >= last
            ),
            engine,
        )
        self.sink.check_equals(engine.pool)


@pytest.fixture
async def engine(start_engine):
    return start_engine()


async def test_a_follower_from_the_start_has_what_the_engine_has(follow, engine):
    followed = follow(engine.source())
    await followed.until_trusted()
    for _ in range(40):
        engine.step()
    await followed.until_equal(engine)

    assert followed.sink.num_events > 40
    assert followed.sink.trusts == [(Trust.EXACT, Reason.NONE)]


async def test_what_the_engine_itself_told_wrongly_is_learnt_anew(follow, engine, caplog):
    """Its kept batches would tell it again; the digest, and a snapshot, are right."""
    followed = follow(engine.source())
    await followed.until_trusted()
    publish = engine.teller.on_batch
    engine.teller.on_batch = lambda batch: publish(msgspec.structs.replace(batch, events=[]))
    engine.step()
    engine.teller.on_batch = publish
    await followed.until(lambda: followed.subscriber.feed.losses)
    await followed.until_equal(engine)

    assert followed.subscriber.feed.losses == {Reason.DIGEST: 1}
    assert followed.sink.num_dropped == 2  # what did not add up, and for the snapshot
    assert "does not add up" in caplog.text
    engine.step()
    await followed.until_equal(engine)
    assert followed.subscriber.feed.losses == {Reason.DIGEST: 1}


async def test_the_load_is_passed_on_as_it_is_told(follow, engine):
    followed = follow(engine.source())
    await followed.until_trusted()
    for number in range(2):
        request = Request(str(number), [number, 2, 3], SamplingParams(max_tokens=4), 0.0)
        engine.scheduler.add(request)
        engine.beat()
    await followed.until(lambda: followed.loads[-1:] == [ToldLoad(0, 2, 0, 128, 6)])
    engine.scheduler.schedule()
    engine.beat()
    await followed.until(lambda: followed.loads[-1:] == [ToldLoad(2, 0, 8, 128, 6)])


async def test_a_late_follower_gets_what_is_kept(follow, engine):
    for _ in range(20):
        engine.step()
    followed = follow(engine.source(topic=""))
    await followed.until_equal(engine)

    assert followed.sink.num_dropped == 0


async def test_a_follower_that_is_too_late_gets_a_snapshot(follow, engine, monkeypatch):
    monkeypatch.setattr(kv_publisher, "MAX_KEPT_BATCHES", 3)
    for _ in range(20):
        engine.step()
    followed = follow(engine.source())
    await followed.until_equal(engine)

    engine.step()
    await followed.until_equal(engine)
    assert (Trust.APPROXIMATE, Reason.LATE_JOIN) not in followed.sink.trusts


@pytest.mark.parametrize("num_kept", [10_000, 2])
async def test_a_lost_batch_is_replayed_or_a_snapshot_stands_for_it(
    follow, engine, lossy, monkeypatch, num_kept
):
    monkeypatch.setattr(kv_publisher, "MAX_KEPT_BATCHES", num_kept)
    lossy.lost = {5, 6, 11}
    followed = follow(engine.source(endpoint=lossy.endpoint))
    await followed.until_trusted(engine=engine)
    for _ in range(20):
        engine.step()
    await followed.until_equal(engine)

    assert (Trust.CATCHING_UP, Reason.GAP) in followed.sink.trusts


async def test_without_a_replay_socket_a_lost_batch_is_a_loss(follow, engine, lossy):
    followed = follow(engine.source(endpoint=lossy.endpoint, replay_endpoint=None))
    await followed.until(lambda: followed.subscriber.num_batches > 0, engine)
    number = engine.teller._log._num_batches
    lossy.lost = {number}
    engine.pool.clear()  # what was missed in between does not matter
    engine.step()
    engine.pool.clear()
    engine.step()
    await followed.until(lambda: followed.subscriber.feed._next == number + 2)
    assert followed.subscriber.feed.trust is Trust.EXACT

    lossy.lost = {number + 2}
    engine.step()
    engine.teller.ask_snapshot()  # a batch that says nothing
    engine.beat()
    await followed.until(lambda: followed.subscriber.feed._next == number + 4)

    assert followed.subscriber.feed.reason is Reason.GAP


async def test_an_engine_that_starts_anew_at_the_same_place_is_another_epoch(follow, start_engine):
    first = start_engine(epoch=1)
    source = first.source()
    followed = follow(source)
    await followed.until_trusted()
    for _ in range(5):
        first.step()
    await followed.until_equal(first)
    await first.publisher.close()
    second = start_engine(2, listening(source.endpoint), source.replay_endpoint)
    for _ in range(3):
        second.step()
    await followed.until(lambda: followed.sink.num_dropped == 1, second)
    await followed.until_equal(second)


async def test_a_topic_is_subscribed_to(follow, start_engine):
    engine = start_engine(topic="kv-events")
    followed = follow(engine.source())
    await followed.until_trusted()
    await followed.until(lambda: engine.step() or followed.subscriber.num_batches > 0)
    await followed.until_equal(engine)


async def test_nonsense_on_the_wire_costs_one_batch_each(follow, context):
    pub = context.socket(zmq.PUB)
    pub.bind(ANY)
    source = KvSource(Dialect.VLLM, pub.getsockopt_string(zmq.LAST_ENDPOINT))
    followed = follow(source)
    fine = msgspec.msgpack.encode([1.0, [["BlockRemoved", []]]])

    def send(sequence, payload):
        pub.send_multipart([b"", sequence.to_bytes(8), payload])
        return False

    await followed.until(lambda: followed.subscriber.num_batches or send(0, fine))
    number = followed.subscriber.feed._next
    pub.send_multipart([b"lonely"])
    pub.send_multipart([b"", b"short", fine])
    pub.send_multipart([b"", b"\xff" * 8, fine])
    send(number, b"\xc1")
    send(number + 1, fine)
    await followed.until(lambda: followed.subscriber.feed._next == number + 2)

    assert followed.subscriber.num_undecodable == 1
    assert followed.subscriber.feed.reason is Reason.UNDECODABLE
    pub.close()


async def test_engines_may_connect_to_the_router(follow, start_engine):
    """vLLM's endpoint without a wildcard: the router listens."""
    followed = follow(KvSource(Dialect.VLLM, "tcp://127.0.0.1:*"))
    engine = start_engine(endpoint=followed.subscriber._sub.getsockopt_string(zmq.LAST_ENDPOINT))
    await followed.until(lambda: engine.step() or followed.subscriber.num_batches > 0)

    assert followed.subscriber.feed.trust in (Trust.EXACT, Trust.APPROXIMATE)


async def test_a_dead_publisher_can_be_left_at_once(context):
    source = KvSource(Dialect.VLLM, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9")
    followed = Followed(context, source)
    for _ in range(5):
        followed.subscriber.tick()
        await asyncio.sleep(0)
    followed.subscriber.close()

    assert (followed.subscriber.feed.trust, followed.sink.trusts) == (Trust.BLIND, [])
