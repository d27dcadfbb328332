"""Asking a replica for a page: connections kept, sizes and times at their edges."""

from __future__ import annotations

import asyncio

import pytest
from raw_replica import whole

from roost_router.http.page import MAX_PAGE_BYTES, Page, PageError, get_page
from roost_router.http.upstream import UpstreamPool


class Replica:
    """Answers each GET with the next item of `answers`; after the last it closes or hangs."""

    def __init__(self, *answers: bytes, hangs: bool = False) -> None:
        self.answers = list(answers)
        self.hangs = hangs
        self.heads: list[bytes] = []
        self.num_connections = 0
        self.num_closed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                if self.answers:
                    writer.write(self.answers.pop(0))
                elif not self.hangs:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        self.num_closed += 1
        writer.close()


@pytest.fixture
async def pool_to():
    """A pool to a replica that answers so."""
    opened = []

    async def start(replica: Replica, path: str = "") -> UpstreamPool:
        server = await asyncio.start_server(replica.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        pool = UpstreamPool(f"http://127.0.0.1:{port}{path}", loop, connect_timeout_s=5.0)
        opened.append((server, pool))
        return pool

    yield start
    for server, pool in opened:
        pool.close()
        server.close()


async def get(pool: UpstreamPool, timeout_s: float = 5.0, key: str | None = None) -> Page:
    return await get_page(pool, b"/metrics", key, timeout_s)


async def test_one_connection_is_kept(pool_to):
    replica = Replica(whole(b"one"), whole(b"two"), whole(b"three"))
    pool = await pool_to(replica)

    pages = [await get(pool) for _ in range(3)]

    assert pages == [(200, b"one"), (200, b"two"), (200, b"three")]
    assert replica.num_connections == 1


async def test_what_is_asked(pool_to):
    replica = Replica(whole(b""), whole(b""))
    pool = await pool_to(replica, path="/base/")

    await get(pool)
    await get(pool, key="Bearer sk-replica")

    lines = b"GET /base/metrics HTTP/1.1\r\nhost: %b\r\nuser-agent: roost-router\r\n" % pool.host
    assert replica.heads[0] == lines + b"\r\n"
    assert replica.heads[1] == lines + b"authorization: Bearer sk-replica\r\n\r\n"


async def test_a_kept_connection_that_was_closed_meanwhile_is_no_failure(pool_to):
    replica = Replica(whole(b"one"))
    pool = await pool_to(replica)
    await get(pool)

    asking = asyncio.create_task(get(pool))
    while len(replica.heads) < 2:  # the replica closes at this request, without an answer
        await asyncio.sleep(0)
    replica.answers.append(whole(b"two"))

    assert await asking == (200, b"two")
    assert replica.num_connections == 2


async def test_a_fresh_connection_that_closes_is_a_failure(pool_to):
    with pytest.raises(PageError, match="closed the connection"):
        await get(await pool_to(Replica()))


def by_length(body: bytes) -> bytes:
    return whole(body)


def by_chunks(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("framed", [by_length, by_chunks])
async def test_the_largest_page_is_read_and_one_byte_more_is_not(pool_to, framed):
    largest = b"x" * MAX_PAGE_BYTES
    replica = Replica(framed(largest), framed(largest + b"x"))
    pool = await pool_to(replica)

    page = await get(pool)
    assert (page.status, len(page.body)) == (200, MAX_PAGE_BYTES)
    assert page.body.count(b"x") == MAX_PAGE_BYTES  # a comparison would print both
    with pytest.raises(PageError, match=f"exceeds {MAX_PAGE_BYTES} bytes"):
        await get(pool)

    assert replica.num_connections == 1


async def test_a_page_without_end_is_not_read_on(pool_to):
    replica = Replica(by_chunks(b"x" * (MAX_PAGE_BYTES + 1))[: -len(b"0\r\n\r\n")], hangs=True)
    pool = await pool_to(replica)

    with pytest.raises(PageError):
        await get(pool)

    async with asyncio.timeout(5):
        while not replica.num_closed:
            await asyncio.sleep(0.01)


async def test_a_page_that_does_not_come_ends_in_time_and_its_connection_too(pool_to):
    replica = Replica(hangs=True)
    pool = await pool_to(replica)

    with pytest.raises(TimeoutError):
        await get(pool, timeout_s=0.05)

    async with asyncio.timeout(5):
        while not replica.num_closed:
            await asyncio.sleep(0.01)
    assert pool.try_idle() is None


@pytest.mark.parametrize("status", [b"302 Found", b"404 Not Found", b"503 Busy"])
async def test_other_statuses_are_answers_whose_body_nobody_waits_for(pool_to, status):
    replica = Replica(b"HTTP/1.1 %b\r\ncontent-length: 9\r\n\r\n" % status, whole(b"next"))
    pool = await pool_to(replica)

    page = await get(pool)

    assert page == (int(status[:3]), b"")
    assert await get(pool) == (200, b"next")
    assert replica.num_connections == 2  # the rest of the other could not be told from it


async def test_nobody_listening_is_told_apart(pool_to):
    server = await asyncio.start_server(Replica().serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    pool = UpstreamPool(f"http://127.0.0.1:{port}", asyncio.get_running_loop(), 5.0)

    with pytest.raises(ConnectionRefusedError):
        await get(pool)
