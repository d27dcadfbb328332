"""What others see of our KV events: vLLM's frames, its replay protocol, and the limits of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from roost_engine import kv_publisher
from roost_engine.kv_publisher import (
    MAX_KEPT_BATCHES,
    MAX_REPLAYS,
    KvPublisher,
    KvPublisherError,
)
from roost_wire.kv_events import SNAPSHOT, AllBlocksCleared, BlockRemoved, KvEventBatch, Tier

ANY = "tcp://127.0.0.1:*"
END = b"\xff" * 8


def batch(sequence: int, num_hashes: int = 1) -> KvEventBatch:
    removed = BlockRemoved(tuple(range(num_hashes)), Tier.DEVICE)
    return KvEventBatch(
        sequence=sequence, events=[removed], epoch=1, device_digest=0, host_digest=0
    )


@pytest.fixture
async def publisher() -> AsyncIterator[KvPublisher]:
    publisher = KvPublisher(ANY, ANY, "kv")
    yield publisher
    await publisher.close()


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    """Closes its sockets; the garbage collector, if it came first, would warn of them."""
    kept: list[zmq.asyncio.Socket] = []

    class Keeping(zmq.asyncio.Context):
        def socket(self, *args: Any, **options: Any) -> zmq.asyncio.Socket:
            kept.append(super().socket(*args, **options))
            return kept[-1]

    context = Keeping()
    yield context
    context.destroy(linger=0)


class Asker:
    """As vLLM's documentation asks: a DEALER, or a REQ that adds the empty frame itself."""

    def __init__(
        self, context: zmq.asyncio.Context, publisher: KvPublisher, kind: int = zmq.DEALER
    ) -> None:
        replay_endpoint = publisher.source(16).replay_endpoint
        assert replay_endpoint is not None
        self.socket = context.socket(kind)
        self.socket.connect(replay_endpoint)

    async def ask(self, start: int) -> None:
        await self.socket.send_multipart([b"", start.to_bytes(8)])

    async def answer(self) -> list[list[bytes]]:
        frames: list[list[bytes]] = []
        async with asyncio.timeout(20):
            while not frames or frames[-1][2] != END:
                frames.append(await self.socket.recv_multipart())
        return frames


def numbers(answer: list[list[bytes]]) -> list[int]:
    return [int.from_bytes(frames[2]) for frames in answer[:-1]]


async def test_a_batch_is_three_frames(
    publisher: KvPublisher, context: zmq.asyncio.Context
) -> None:
    sub = context.socket(zmq.SUB)
    sub.connect(publisher.source(16).endpoint)
    sub.subscribe("kv")
    frames: list[bytes] = []
    sequence = 0
    async with asyncio.timeout(20):
        while not frames:  # what is published before a subscription arrives is not for it
            publisher.publish(batch(sequence))
            sequence += 1
            if await sub.poll(20):
                frames = await sub.recv_multipart()

    topic, number, payload = frames
    assert (topic, len(number)) == (b"kv", 8)
    assert int.from_bytes(number) < sequence
    sent_at, events = msgspec.msgpack.decode(payload)
    assert sent_at > 1.7e9
    assert events[0]["type"] == "BlockRemoved"


@pytest.mark.parametrize("start", [0, 3, 4, 5, 2**64 - 2])
async def test_an_answer_is_what_is_kept_from_there_and_an_end(
    publisher: KvPublisher, context: zmq.asyncio.Context, start: int
) -> None:
    publisher.start(lambda: None)
    for sequence in range(5):
        publisher.publish(batch(sequence))
    asker = Asker(context, publisher)
    await asker.ask(start)
    answer = await asker.answer()

    assert numbers(answer) == list(range(min(start, 5), 5))
    assert all(frames[:2] == [b"", b"kv"] for frames in answer[:-1])
    assert answer[-1] == [b"", b"", END, b""]


async def test_a_req_socket_may_ask_too(
    publisher: KvPublisher, context: zmq.asyncio.Context
) -> None:
    publisher.start(lambda: None)
    asker = Asker(context, publisher, zmq.REQ)
    await asker.socket.send(bytes(8))

    assert await asker.socket.recv_multipart() == [b"", END, b""]


@pytest.mark.parametrize(("num_published", "has_snapshot"), [(3, False), (4, True)])
async def test_who_asks_for_more_than_is_kept_gets_a_snapshot(
    publisher: KvPublisher,
    context: zmq.asyncio.Context,
    monkeypatch: pytest.MonkeyPatch,
    num_published: int,
    has_snapshot: bool,
) -> None:
    monkeypatch.setattr(kv_publisher, "MAX_KEPT_BATCHES", 3)

    def take_snapshot() -> None:
        publisher.publish(batch(num_published))
        snapshot = KvEventBatch(sequence=num_published, events=[AllBlocksCleared()])
        publisher.take_snapshot(snapshot)

    publisher.start(take_snapshot)
    for sequence in range(num_published):
        publisher.publish(batch(sequence))
    asker = Asker(context, publisher)
    await asker.ask(0)
    answer = await asker.answer()

    assert numbers(answer) == ([num_published] if has_snapshot else [0, 1, 2])
    _, events = msgspec.msgpack.decode(answer[0][3])
    assert (events[0]["type"] == "AllBlocksCleared") == has_snapshot


async def test_who_asks_for_a_snapshot_gets_one_whatever_is_kept(
    publisher: KvPublisher, context: zmq.asyncio.Context
) -> None:
    snapshot = KvEventBatch(sequence=2, events=[AllBlocksCleared()])
    publisher.start(lambda: publisher.take_snapshot(snapshot))
    for sequence in range(3):
        publisher.publish(batch(sequence))
    asker = Asker(context, publisher)
    await asker.ask(SNAPSHOT)
    answer = await asker.answer()

    assert numbers(answer) == [2]
    assert msgspec.msgpack.decode(answer[0][3])[1] == [{"type": "AllBlocksCleared"}]


async def test_what_is_kept_is_bounded_in_number_and_bytes(
    publisher: KvPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequence in range(MAX_KEPT_BATCHES + 2):
        publisher.publish(batch(sequence))
    assert [publisher._kept[0].sequence, publisher._kept[-1].sequence] == [2, MAX_KEPT_BATCHES + 1]

    size = len(publisher._kept[0].payload)
    monkeypatch.setattr(kv_publisher, "MAX_KEPT_BYTES", 5 * size)
    publisher.publish(batch(MAX_KEPT_BATCHES + 2))
    assert len(publisher._kept) == 5
    assert publisher._kept_bytes == sum(len(kept.payload) for kept in publisher._kept)

    publisher.publish(batch(MAX_KEPT_BATCHES + 3, num_hashes=1000))  # alone too large
    assert (len(publisher._kept), publisher._kept_bytes) == (0, 0)
    assert publisher._oldest == MAX_KEPT_BATCHES + 4


async def test_requests_that_are_none_are_ignored_and_so_many_are_answered(
    publisher: KvPublisher, context: zmq.asyncio.Context
) -> None:
    waiting: list[bool] = []
    publisher.start(lambda: waiting.append(True))
    publisher._oldest = 1  # the first batch is not kept: its askers wait for a snapshot
    asker = Asker(context, publisher)
    for nonsense in ([b""], [b"", b"short"], [b"", bytes(8), b"more"], [bytes(8)]):
        await asker.socket.send_multipart(nonsense)
    for _ in range(MAX_REPLAYS + 1):
        await asker.ask(0)
    async with asyncio.timeout(20):
        while publisher.num_refused < 5:
            await asyncio.sleep(0.01)
    publisher.take_snapshot(KvEventBatch(sequence=5, events=[AllBlocksCleared()]))
    frames = [await asker.socket.recv_multipart() for _ in range(2 * MAX_REPLAYS)]

    assert len(waiting) == MAX_REPLAYS
    assert sum(frame[2] == END for frame in frames) == MAX_REPLAYS
    assert not await asker.socket.poll(50)


async def test_an_asker_that_leaves_is_forgotten(
    publisher: KvPublisher, context: zmq.asyncio.Context
) -> None:
    publisher.start(lambda: None)
    for sequence in range(2000):
        publisher.publish(batch(sequence, num_hashes=200))
    asker = Asker(context, publisher)
    asker.socket.rcvhwm = 1
    await asker.ask(0)
    await asker.socket.recv_multipart()
    asker.socket.close(linger=0)
    async with asyncio.timeout(20):
        while publisher._num_replays:
            await asyncio.sleep(0.01)


async def test_endpoints_that_cannot_be_used_are_told() -> None:
    first = KvPublisher(ANY)
    port = first.source(16).endpoint.rpartition(":")[2]
    assert first.source(16).replay_endpoint is None
    for arguments in (
        (f"tcp://*:{port}",),
        (ANY, f"tcp://*:{port}"),
        ("nonsense",),
        ("tcp://*",),
        (ANY, "tcp://no.such.interface:1"),
    ):
        with pytest.raises(KvPublisherError, match="cannot publish KV events"):
            KvPublisher(*arguments)
    await first.close()


async def test_without_a_wildcard_it_connects(context: zmq.asyncio.Context) -> None:
    sub = context.socket(zmq.SUB)
    port = sub.bind_to_random_port("tcp://127.0.0.1")
    sub.subscribe("")
    publisher = KvPublisher(f"tcp://127.0.0.1:{port}")
    sequence = 0
    async with asyncio.timeout(20):
        while not await sub.poll(20):
            publisher.publish(batch(sequence))
            sequence += 1
    await publisher.close()
