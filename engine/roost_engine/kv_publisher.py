"""Publishes KV events as vLLM does, over ZeroMQ, so that any router can follow this replica.

    PUB     [topic, sequence, payload]       each batch; who is too slow loses batches, not we time
    ROUTER  [b"", sequence]                  asks for all batches from this number on
            [b"", topic, sequence, payload]  each of them, then [b"", b"", 2**64 - 1, b""]

Sequences are 8 bytes, big endian. An endpoint with a wildcard ("tcp://*:5557",
"tcp://127.0.0.1:*") or of ipc is bound, any other is connected to, as vLLM does.

The last batches are kept for replay, bounded in number and bytes. Who asks for older ones gets a
snapshot instead: a batch that begins by clearing everything and has the number of the last one, so
that a reader who has never heard of snapshots ends with the right blocks too. So does who asks for
SNAPSHOT, because what it was told does not add up.

Everything runs on the event loop and waits for nobody: PUB drops for slow readers, a replay is a
task of its own, and there are only so many of them.

KV events tell the prompts' token ids: bind where only routers can reach.

Not here: what the payload means (roost_wire.kv_dialects.vllm_encoder), when batches are made
(kv_teller.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
import zmq
import zmq.asyncio

from roost_wire.kv_dialects.vllm_encoder import encode_batch
from roost_wire.kv_events import SNAPSHOT, KvEventBatch

_log = logging.getLogger(__name__)

#: As vLLM keeps; what a router misses in a minute or two.
MAX_KEPT_BATCHES: Final = 10_000
MAX_KEPT_BYTES: Final = 64 << 20
MAX_REPLAYS: Final = 8
_REPLAY_S: Final = 30.0  # for one replay; who reads more slowly asks again
_MAX_QUEUED: Final = 10_000  # batches for a subscriber that reads too slowly
_END: Final = b"\xff" * 8


class KvPublisherError(OSError):
    """An endpoint cannot be used; the message says which and why."""


class KvSource(msgspec.Struct, frozen=True):
    """One publisher as /kv_event_sources describes it: vLLM's fields and the size of a block."""

    data_parallel_rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str
    block_size: int


class _Kept(NamedTuple):
    sequence: int
    payload: bytes


class KvPublisher:
    """The sockets of one replica. Used on the event loop only; to be closed."""

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        """KvPublisherError if an endpoint is taken or no endpoint at all."""
        self.num_refused = 0  # requests for a replay that were none, or one too many
        self._topic = topic.encode()
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._oldest = 0  # sequence of the first batch that is kept, or would be
        self._asked: list[bytes] = []  # who waits for a snapshot
        self._tasks: set[asyncio.Task[None]] = set()
        self._ask_snapshot: Callable[[], None] | None = None
        self._context = zmq.Context()
        self._replies: zmq.asyncio.Socket | None = None
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.sndhwm = _MAX_QUEUED
            self._endpoint = _open(self._pub, endpoint)
            self._replay_endpoint = None
            if replay_endpoint is not None:
                router = zmq.asyncio.Socket(self._context, zmq.ROUTER)
                router.router_mandatory = True  # tells when a reader is full or gone
                self._replies = router
                self._replay_endpoint = _bind(router, replay_endpoint)
        except BaseException:
            self._close_sockets()
            raise

    def source(self, block_size: int) -> KvSource:
        """Where others find it, ports resolved."""
        return KvSource(0, self._endpoint, self._replay_endpoint, self._topic.decode(), block_size)

    def start(self, ask_snapshot: Callable[[], None]) -> None:
        """Serve replays. `ask_snapshot` leads to `take_snapshot`, soon."""
        self._ask_snapshot = ask_snapshot
        if self._replies is not None:
            self._run(self._serve(self._replies))

    def publish(self, batch: KvEventBatch) -> None:
        """Send a batch to whoever follows, and keep it. O(its size)."""
        kept = _encode(batch)
        self._kept.append(kept)
        self._kept_bytes += len(kept.payload)
        while len(self._kept) > MAX_KEPT_BATCHES or self._kept_bytes > MAX_KEPT_BYTES:
            left = self._kept.popleft()
            self._kept_bytes -= len(left.payload)
            self._oldest = left.sequence + 1
        frames = [self._topic, kept.sequence.to_bytes(8), kept.payload]
        self._pub.send_multipart(frames, zmq.NOBLOCK)

    def take_snapshot(self, batch: KvEventBatch) -> None:
        """Answer those who asked for batches that are not kept any more."""
        asked, self._asked = self._asked, []
        snapshot = _encode(batch)
        newer = [kept for kept in self._kept if kept.sequence > batch.sequence]
        for identity in asked:
            self._run(self._replay(identity, [snapshot, *newer]))

    async def close(self) -> None:
        """Stop replays and close the sockets; what was published and not sent yet is lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._replies is not None:  # the context does not know this one, and would wait for it
            self._replies.close(linger=0)
        self._context.destroy(linger=0)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8 or self._num_replays >= MAX_REPLAYS:
                self.num_refused += 1  # whoever asked well asks again
                continue
            self._answer(frames[0], int.from_bytes(frames[2]))

    @property
    def _num_replays(self) -> int:
        return len(self._tasks) - 1 + len(self._asked)

    def _answer(self, identity: bytes, start: int) -> None:
        if start < self._oldest or start == SNAPSHOT:
            assert self._ask_snapshot is not None
            self._asked.append(identity)
            self._ask_snapshot()
        else:
            kept = [each for each in self._kept if each.sequence >= start]
            self._run(self._replay(identity, kept))

    async def _replay(self, identity: bytes, batches: list[_Kept]) -> None:
        assert self._replies is not None
        try:
            async with asyncio.timeout(_REPLAY_S):
                for sequence, payload in batches:
                    await self._replies.send_multipart(
                        [identity, b"", self._topic, sequence.to_bytes(8), payload]
                    )
                    await asyncio.sleep(0)
                await self._replies.send_multipart([identity, b"", b"", _END, b""])
        except (TimeoutError, zmq.ZMQError) as error:
            _log.debug("a replay broke off: %r", error)


def _encode(batch: KvEventBatch) -> _Kept:
    stamped = msgspec.structs.replace(batch, sent_at=datetime.now(UTC).timestamp())
    return _Kept(batch.sequence, encode_batch(stamped))


def _open(socket: zmq.Socket[Any], endpoint: str) -> str:
    """Bind or connect, as the endpoint says; where it is reached."""
    if "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://"):
        return _bind(socket, endpoint)
    socket.ipv6 = "[" in endpoint
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise KvPublisherError(f"cannot publish KV events to {endpoint}: {error}") from None
    return endpoint


def _bind(socket: zmq.Socket[Any], endpoint: str) -> str:
    socket.ipv6 = "[" in endpoint
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise KvPublisherError(f"cannot publish KV events on {endpoint}: {error}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
