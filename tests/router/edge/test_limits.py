"""What a client may hold of the router, over real sockets: each limit at its edge.

Time is the test's: the service's own sweep is stopped and its step called with the time to be.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from fake_replica import FakeReplica
from raw_replica import SSE_HEAD, RawReplica, chunk, whole

BODY = b'{"model":"m","prompt":"x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(BODY)
STREAM = b'{"model":"m","prompt":"x","stream":true}'
STREAM_HEAD = HEAD.replace(b"26", b"%d" % len(STREAM))
EVENT = b'data: {"id":"x","choices":[{"index":0,"text":"%b"}]}\n\n'


class Client:
    """A connection to the router, and the router's clock."""

    def __init__(self, router: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.router, self.reader, self.writer = router, reader, writer

    async def send(self, data: bytes) -> None:
        """Returns when the router has read it, as far as the loop can tell."""
        self.writer.write(data)
        await self.writer.drain()
        for _ in range(5):
            await asyncio.sleep(0.01)

    def pass_s(self, seconds: float) -> None:
        """Let time pass, for the router's connections."""
        self.router.now += seconds
        self.router.service.check_connections(self.router.now)

    async def rest(self) -> bytes:
        """All until the router closes."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def answer(self) -> bytes:
        """Head and body of one answer."""
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    async def is_open(self) -> bool:
        """Whether the router still holds the connection."""
        await asyncio.sleep(0.02)
        return not self.reader.at_eof() and self.router.service._connections != {}


@pytest.fixture
async def connect(start_router):
    """Connect to a router with these options, whose clock stands still."""
    replicas, clients, routers = [], [], []

    async def start(script: Any = None, **options: Any) -> Client:
        if not routers:
            replicas.append(await RawReplica(*(script or [[whole(b"{}")]])).start())
            router = await start_router(replicas[0], **options)
            router.service._sweep.cancel()
            # Whole seconds, passed in eighths: sums are exact, and an edge is an edge.
            router.now = float(int(router.service.now()))
            routers.append(router)
        client = Client(routers[0], *await asyncio.open_connection(*routers[0].address))
        clients.append(client)
        await asyncio.sleep(0.02)
        client.pass_s(0)
        return client

    yield start
    for client in clients:
        client.writer.close()
    for replica in replicas:
        await replica.stop()


async def test_a_connection_without_a_request_is_closed(connect):
    client = await connect(head_timeout_s=10.0)

    client.pass_s(9.875)
    assert await client.is_open()
    client.pass_s(0.125)
    assert await client.rest() == b""


async def test_a_head_that_does_not_end_is_a_timeout(connect):
    client = await connect(head_timeout_s=10.0)
    await client.send(b"GET /v1/mo")
    client.pass_s(0)

    for _ in range(9):
        client.pass_s(1.0)
        await client.send(b"x")
    assert await client.is_open()
    client.pass_s(1.0)

    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


async def test_empty_lines_are_no_request(connect):
    client = await connect(head_timeout_s=10.0)
    for _ in range(9):
        client.pass_s(1.0)
        await client.send(b"\r\n")
    client.pass_s(1.0)

    assert await client.rest() == b""


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_body_that_stalls_is_a_timeout(connect, is_chunked):
    client = await connect(body_stall_s=30.0)
    if is_chunked:
        await client.send(HEAD.replace(b"content-length: 26", b"transfer-encoding: chunked"))
        await client.send(b"1a\r\n" + BODY[:10])
    else:
        await client.send(HEAD + BODY[:10])
    client.pass_s(0)
    client.pass_s(29.875)
    assert await client.is_open()
    client.pass_s(0.125)

    assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
    assert client.router.placer.fleet.replicas[0].num_in_flight == 0


async def test_a_known_head_does_not_change_the_limits_of_its_body(connect):
    client = await connect(body_stall_s=30.0)
    for _ in range(4):
        await client.send(HEAD + BODY)
        assert (await client.answer()).startswith(b"HTTP/1.1 200")
    await client.send(HEAD + BODY[:10])
    client.pass_s(0)
    client.pass_s(29.875)
    assert await client.is_open()
    client.pass_s(0.125)

    assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_trailers_that_trickle_are_a_timeout(connect):
    client = await connect(body_stall_s=30.0)
    await client.send(HEAD.replace(b"content-length: 26", b"transfer-encoding: chunked"))
    await client.send(b"1a\r\n" + BODY + b"\r\n0\r\n")
    for number in range(31):
        client.pass_s(1.0)
        await client.send(b"x%d: y\r\n" % number)

    assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_a_kept_connection_may_idle_as_long_as_it_may(connect):
    client = await connect(keepalive_s=75.0, head_timeout_s=1.0)
    for _ in range(3):
        await client.send(HEAD + BODY)
        assert (await client.answer()).startswith(b"HTTP/1.1 200")
        client.pass_s(0)
        client.pass_s(74.875)
        assert await client.is_open()
    client.pass_s(0.125)

    assert await client.rest() == b""


async def test_a_client_that_does_not_read_is_cut_and_its_replica_released(connect):
    events = [chunk(EVENT % (b"x" * 30_000))] * 1000
    client = await connect([[SSE_HEAD, *events]], write_stall_s=30.0, write_buffer_bytes=65536)
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.reader._transport.pause_reading()
    state = client.router.placer.fleet.replicas[0]
    await client.send(STREAM_HEAD + STREAM)
    (connection,) = client.router.service._connections
    sizes = set()
    async with asyncio.timeout(5):
        while connection._transport.get_write_buffer_size() not in sizes or not sizes:
            sizes.add(connection._transport.get_write_buffer_size())
            await asyncio.sleep(0.1)
    # Back-pressure: no more is held than the limit and what one read may have brought.
    assert 0 < max(sizes) <= 65536 + 2 * 256 * 1024
    assert state.num_in_flight == 1

    client.pass_s(0)
    client.pass_s(29.875)
    assert state.num_in_flight == 1
    client.pass_s(0.125)
    async with asyncio.timeout(5):
        while state.num_in_flight or client.router.service._connections:
            await asyncio.sleep(0.01)


async def test_a_client_that_reads_slowly_is_not_cut(connect):
    events = [chunk(EVENT % (b"x" * 30_000))] * 1000
    client = await connect([[SSE_HEAD, *events]], write_stall_s=30.0, write_buffer_bytes=65536)
    await client.send(STREAM_HEAD + STREAM)
    client.pass_s(0)
    for _ in range(20):  # far less at a time than the kernel holds
        await client.reader.readexactly(300_000)
        await asyncio.sleep(0.05)
        client.pass_s(20.0)

    assert await client.is_open()
    assert client.router.placer.fleet.replicas[0].num_in_flight == 1


async def test_an_answer_in_full_to_a_client_that_never_reads_does_not_stay(connect):
    """The exchange is over, the bytes are not: a closing connection is watched as well."""
    large = whole(b'{"x":"' + b"x" * 3_900_000 + b'"}')
    client = await connect([[large]], write_stall_s=30.0)
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.reader._transport.pause_reading()
    await client.send(HEAD.replace(b"host", b"connection: close\r\nhost") + BODY)
    async with asyncio.timeout(5):
        while client.router.service.num_exchanges or not client.router.service._connections:
            await asyncio.sleep(0.01)
    (connection,) = client.router.service._connections
    while connection._transport is not None and connection._transport.get_write_buffer_size() == 0:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    client.pass_s(0)
    client.pass_s(29.875)
    assert client.router.service._connections
    client.pass_s(0.125)
    async with asyncio.timeout(5):
        while client.router.service._connections:
            await asyncio.sleep(0.01)


async def test_a_refused_client_gets_its_answer_while_it_still_sends(connect):
    """Closing at once would reset the connection, and the answer would be lost."""
    client = await connect(max_body_bytes=1000)
    await client.send(HEAD.replace(b"26", b"9000000"))
    for _ in range(20):
        client.writer.write(b"x" * 100_000)
        await client.writer.drain()

    assert (await client.rest()).startswith(b"HTTP/1.1 413 ")
    assert client.router.service._connections
    client.pass_s(0)
    client.pass_s(2.0)
    async with asyncio.timeout(5):
        while client.router.service._connections:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("option", "whose"),
    [("max_connections", "this router"), ("max_connections_per_address", "your address")],
)
async def test_one_connection_too_many_is_told_so(connect, option, whose):
    clients = [await connect(**{option: 3}) for _ in range(3)]
    refused = await connect()

    answer = await refused.rest()

    assert answer.startswith(b"HTTP/1.1 503 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "too_many_connections"
    assert whose in error["message"]
    for client in clients:
        assert await client.is_open()
    clients[0].writer.close()
    await asyncio.sleep(0.05)
    last = await connect()
    await last.send(HEAD + BODY)
    assert (await last.answer()).startswith(b"HTTP/1.1 200 ")


async def test_one_request_too_many_is_told_so(start_router):
    fake = await FakeReplica().start()
    fake.fault = "slow"
    router = await start_router(fake, max_requests=2)
    clients = [Client(router, *await asyncio.open_connection(*router.address)) for _ in range(3)]
    for client in clients[:2]:
        await client.send(HEAD + BODY)
    async with asyncio.timeout(5):
        while router.service.num_exchanges < 2:
            await asyncio.sleep(0.01)
    await clients[2].send(HEAD + BODY)

    refused = await clients[2].answer()
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in refused
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_requests"
    fake.gate.set()
    for client in clients[:2]:
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    await clients[2].send(HEAD + BODY)
    assert (await clients[2].answer()).startswith(b"HTTP/1.1 200 ")
    for client in clients:
        client.writer.close()
    await fake.stop()


async def test_the_sweep_looks_at_connections_by_itself(start_router, replicas):
    router = await start_router(*replicas, head_timeout_s=0.05)
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(b"GET /")

    async with asyncio.timeout(10):
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
    writer.close()
