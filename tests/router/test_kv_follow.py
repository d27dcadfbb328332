"""From a replica's URL to its blocks: discovery over HTTP, then events."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
from raw_replica import LocalReplica, whole

from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.kv import tensorrt_poller
from roost_router.kv.follow import KvFollower
from roost_router.kv.source import Dialect
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_dialects.vllm_encoder import encode_batch
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventBatch,
    Tier,
)
from roost_wire.load_report import LoadReport


class Replica(LocalReplica):
    """Answers GETs with pages by path, one after the other; the last again and again."""

    def __init__(self, **pages: list[bytes]) -> None:
        self.pages = {f"/{path}": list(answers) for path, answers in pages.items()}
        self.asked: list[str] = []

    async def _serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1].decode()
                self.asked.append(path)
                answers = self.pages.get(path)
                if not answers:
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                else:
                    writer.write(whole(answers.pop(0) if len(answers) > 1 else answers[0]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Sink:
    """Names of blocks, whatever engine they are of."""

    def __init__(self):
        self.resident = set()
        self.trust = (Trust.BLIND, Reason.NOT_HEARD)
        self.num_events = 0
        self.num_dropped = 0

    def apply(self, events):
        for event in events:
            self.num_events += 1
            match event:
                case AllBlocksCleared():
                    self.resident.clear()
                case BlockRemoved():
                    self.resident.difference_update(event.block_hashes)
                case BlockStored():
                    self.resident.update(event.block_hashes)

    def drop_all(self):
        self.num_dropped += 1
        self.resident.clear()

    def trust_changed(self, trust, reason):
        self.trust = (trust, reason)


class Following:
    """A follower of one replica, its fleet played by hand."""

    def __init__(self, replica, owned_by, started_at):
        self.fleet = Fleet(PrefixIndex(), (replica.url,))
        (self.replica,) = self.fleet.replicas
        self.owned_by = owned_by
        self.sinks: dict[int, Sink] = {}
        self.up(started_at)
        self.follower = KvFollower(self.fleet, self._make_sink, lambda: "Bearer k", time.monotonic)

    def _make_sink(self, replica, rank):
        assert replica is self.replica
        self.sinks[rank] = Sink()
        return self.sinks[rank]

    def up(self, started_at):
        report = LoadReport(started_at=started_at)
        self.fleet.answered(self.replica, ["m"], report, self.owned_by)

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)
                self.follower._tick()

    async def until_heard(self, tell):
        """`tell` is repeated: what is published before a subscription is lost."""

        def is_heard():
            tell()
            return 0 in self.sinks and self.sinks[0].num_events > 0

        await self.until(is_heard)


@asynccontextmanager
async def following(replica, owned_by="", started_at=1.0):
    await replica.start()
    following = Following(replica, owned_by, started_at)
    try:
        yield following
    finally:
        await replica.stop()
        await following.follower._close()


@pytest.fixture
def publisher():
    """A PUB socket and its port."""
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, port
    context.destroy(linger=0)


def send(socket, sequence, payload, topic=b""):
    socket.send_multipart([topic, sequence.to_bytes(8), payload])


STORED = BlockStored((7,), None, (1, 2), 2, Tier.DEVICE)


async def test_vllms_events_are_found_and_followed(publisher):
    socket, port = publisher
    sources = [{"data_parallel_rank": 0, "endpoint": f"tcp://0.0.0.0:{port}", "topic": "kv"}]
    replica = Replica(kv_event_sources=[json.dumps(sources).encode()])
    batch = KvEventBatch(sequence=0, events=[STORED], sent_at=1.0)
    async with following(replica) as live:
        await live.until_heard(lambda: send(socket, 0, encode_batch(batch), b"kv"))
        (status,) = live.follower.status()

        assert replica.asked == ["/kv_event_sources"]
        assert live.sinks[0].resident == {7}
        assert (status.dialect, status.trust) == (Dialect.VLLM, Trust.EXACT)
        assert live.replica.name not in live.follower.reseeding


async def test_a_late_join_without_replay_has_vllm_report_what_is_reused(publisher):
    socket, port = publisher
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://*:%d"}]' % port])
    batch = encode_batch(KvEventBatch(sequence=5, events=[STORED], sent_at=1.0))
    async with following(replica) as live:
        await live.until_heard(lambda: send(socket, 5, batch))

        assert live.sinks[0].trust == (Trust.APPROXIMATE, Reason.LATE_JOIN)
        async with asyncio.timeout(5):
            while live.replica.name not in live.follower.reseeding:
                await asyncio.sleep(0.02)


async def test_a_start_that_becomes_known_later_is_no_restart(publisher):
    socket, port = publisher
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://*:%d"}]' % port])
    batch = encode_batch(KvEventBatch(sequence=0, events=[STORED], sent_at=1.0))
    async with following(replica, started_at=None) as live:
        await live.until_heard(lambda: send(socket, 0, batch))
        live.follower._followed["r0"].ask_after = 0.0
        live.up(started_at=2.0)
        for _ in range(5):
            live.follower._tick()
            await asyncio.sleep(0.01)

        assert live.sinks[0].num_dropped == 0
        assert replica.asked == ["/kv_event_sources"]


async def test_sglangs_events_are_found_and_followed(publisher):
    socket, port = publisher
    events = {
        "endpoint_host": "*",
        "endpoint_port_base": port,
        "block_size": 1,
        "topic": "",
        "dp_size": 1,
    }
    replica = Replica(server_info=[json.dumps({"kv_events": events}).encode()])
    stored = {
        "type": "BlockStored",
        "block_hashes": [-1],
        "parent_block_hash": None,
        "token_ids": [3],
        "block_size": 1,
    }
    payload = msgspec.msgpack.encode([1.0, [stored], None])
    async with following(replica, "sglang") as live:
        await live.until_heard(lambda: send(socket, 5, payload))

        assert replica.asked == ["/kv_event_sources", "/server_info"]
        assert live.sinks[0].resident == {2**64 - 1}
        assert live.sinks[0].trust == (Trust.APPROXIMATE, Reason.LATE_JOIN)
        assert live.replica.name not in live.follower.reseeding  # SGLang could not


async def test_a_replica_without_events_is_asked_once(publisher):
    replica = Replica()
    async with following(replica) as live:
        await live.until(lambda: live.follower._followed["r0"].was_found)
        for _ in range(10):
            await live.until(lambda: True)
            live.follower._tick()

        assert replica.asked == ["/kv_event_sources", "/server_info"]
        assert live.follower.status() == []
        assert live.sinks == {}


async def test_a_new_process_is_asked_again_and_what_it_told_elsewhere_is_void(publisher):
    socket, port = publisher
    page = '[{"endpoint": "tcp://*:%d"}]'
    replica = Replica(kv_event_sources=[(page % port).encode(), b"[]"])
    batch = encode_batch(KvEventBatch(sequence=0, events=[STORED], sent_at=1.0))
    async with following(replica) as live:
        await live.until_heard(lambda: send(socket, 0, batch))
        live.follower._followed["r0"].ask_after = 0.0
        live.up(started_at=2.0)
        await live.until(lambda: live.follower.status() == [])

        assert live.sinks[0].resident == set()
        assert live.sinks[0].trust == (Trust.BLIND, Reason.NOT_HEARD)
        assert len(replica.asked) == 2


async def test_an_address_that_no_replica_may_have_is_not_followed(publisher):
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://169.254.169.254:80"}]'])
    async with following(replica) as live:
        await live.until(lambda: bool(replica.asked))
        await live.until(live.follower._followed["r0"].asking.done)

        assert live.follower.status() == []
        assert not live.follower._followed["r0"].was_found


def trt(event_id, data, rank=0):
    return {"event_id": event_id, "data": data, "attention_dp_rank": rank}


CREATED = {"type": "created"}


def trt_stored(block_hash):
    block = {"block_hash": block_hash, "tokens": [{"token_id": 1}, {"token_id": 2}]}
    return {"type": "stored", "parent_hash": None, "blocks": [block]}


async def test_tensorrt_llm_is_polled_and_its_ranks_kept_apart(monkeypatch):
    monkeypatch.setattr(tensorrt_poller, "POLL_S", 60.0)  # each poll is wanted here
    answers = [
        [trt(0, CREATED), trt(1, trt_stored(11)), trt(0, CREATED, 1), trt(1, trt_stored(12), 1)],
        [trt(2, {"type": "removed", "block_hashes": [11]}), trt(3, trt_stored(13), 1)],
        [trt(0, CREATED), trt(1, trt_stored(14))],
        [],
    ]
    replica = Replica(
        metrics=[b"trtllm_kv_cache_tokens_per_block 2\n"],
        kv_cache_events=[json.dumps(answer).encode() for answer in answers],
    )
    async with following(replica, "tensorrt_llm") as live:

        def streams():
            return live.follower._followed["r0"].streams

        async def poll():
            before = streams()[0]._task if streams() else None
            if before is not None:
                streams()[0]._poll_after = 0.0
            await live.until(
                lambda: (
                    streams()
                    and streams()[0]._task not in (None, before)
                    and streams()[0]._task.done()
                )
            )

        await poll()
        assert [live.sinks[rank].resident for rank in (0, 1)] == [{11}, {12}]
        assert live.sinks[0].trust == (Trust.EXACT, Reason.NONE)
        await poll()
        assert [live.sinks[rank].resident for rank in (0, 1)] == [set(), {13}]  # 12 may be gone
        assert live.sinks[1].trust == (Trust.APPROXIMATE, Reason.GAP)
        await poll()
        assert live.sinks[0].resident == {14}
        assert live.sinks[0].num_dropped == 1
        assert [status.rank for status in live.follower.status()] == [0, 1]


async def test_run_follows_until_cancelled(publisher):
    _, port = publisher
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://*:%d"}]' % port])
    async with following(replica) as live:
        task = asyncio.ensure_future(live.follower.run())
        async with asyncio.timeout(20):
            while not live.follower.status():
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        assert live.follower._context.closed


def test_a_router_without_events_does_not_import_zeromq():
    code = "import sys, roost_router.kv.follow; print('zmq' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout

    assert shown.strip() == b"False"


async def test_a_replica_that_is_gone_is_followed_no_more_and_again_when_it_is_back(publisher):
    socket, port = publisher
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://*:%d"}]' % port])
    batch = encode_batch(KvEventBatch(sequence=0, events=[STORED], sent_at=1.0))
    async with following(replica) as live:
        await live.until_heard(lambda: send(socket, 0, batch))
        before = live.sinks[0]

        live.fleet.remove(live.replica, 0.0)
        assert live.follower.status() == []
        assert (before.num_dropped, before.trust) == (1, (Trust.BLIND, Reason.NOT_HEARD))
        live.follower._tick()
        live.replica = live.fleet.add(live.replica.url)
        live.up(2.0)
        await live.until(lambda: live.sinks[0] is not before)

        assert [status.replica for status in live.follower.status()] == [live.replica.name]
        assert replica.asked == ["/kv_event_sources"] * 2


async def test_a_replica_that_goes_while_it_is_asked_leaves_no_stream_behind(publisher):
    _, port = publisher
    replica = Replica(kv_event_sources=[b'[{"endpoint": "tcp://*:%d"}]' % port])
    async with following(replica) as live:
        live.follower._tick()
        asking = live.follower._followed[live.replica.name].asking
        assert asking is not None
        await asyncio.sleep(0)

        live.fleet.remove(live.replica, 0.0)
        await asyncio.gather(asking, return_exceptions=True)

        assert asking.cancelled()
        assert live.sinks == {}
        assert live.follower.status() == []
