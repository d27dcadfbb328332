"""The admin port byte by byte: methods, what is malformed, and each limit at its edge."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from roost_router.admin import MAX_CONNECTIONS

GET = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n"
MAX_BODY = 4 << 20


async def connect(router: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*router.admin_address)


async def head_of(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    head = await reader.readuntil(b"\r\n\r\n")
    return head, int(head.split(b"content-length: ")[1].split(b"\r\n")[0])


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(5):
        head, length = await head_of(reader)
        return int(head.split(b" ")[1]), await reader.readexactly(length)


async def tell(router: Any, sent: bytes) -> bytes:
    """All that the router answers until it closes."""
    reader, writer = await connect(router)
    writer.write(sent)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


async def test_one_connection_serves_page_after_page(start_router, replicas):
    router = await start_router(*replicas)
    reader, writer = await connect(router)
    paths = (b"/health", b"/ready?verbose", b"/metrics", b"/nothing", b"/fleet")

    writer.write(b"".join(GET % path for path in paths))
    answers = [await answer_of(reader) for _ in paths]

    assert [status for status, _ in answers] == [200, 200, 200, 404, 200]
    assert json.loads(answers[0][1]) == {"status": "alive"}
    assert json.loads(answers[1][1]) == {
        "ready": True,
        "draining": False,
        "replicas_up": ["r0", "r1"],
    }
    assert b"# HELP roost_router_" in answers[2][1]
    writer.close()


async def test_head_is_get_without_the_body(start_router, replicas):
    router = await start_router(*replicas)
    reader, writer = await connect(router)

    writer.write(b"HEAD /ready HTTP/1.1\r\nhost: a\r\n\r\n" + GET % b"/ready")
    head, length = await head_of(reader)
    status, body = await answer_of(reader)  # fails if a body stands before it

    assert head.startswith(b"HTTP/1.1 200 OK")
    assert (status, length) == (200, len(body))
    writer.close()


async def test_a_probe_of_http_1_0_is_answered_and_closed(start_router, replicas):
    router = await start_router(*replicas)

    answer = await tell(router, b"GET /health HTTP/1.0\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in answer


async def test_other_methods_are_told_which_are_served(start_router, replicas):
    router = await start_router(*replicas)

    answer = await tell(router, b"POST /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 405")
    assert b"allow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 128 + b"\r\n", 431),
    ],
)
async def test_what_is_no_request_is_told_so_as_json(start_router, replicas, sent, status):
    router = await start_router(*replicas)

    answer = await tell(router, sent)

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("num_bytes", "status"), [(MAX_BODY, 405), (MAX_BODY + 1, 413)])
async def test_bodies_are_bounded(start_router, replicas, num_bytes, status):
    router = await start_router(*replicas)
    head = b"POST /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"

    reader, writer = await connect(router)
    writer.write(head % num_bytes + b"x" * min(num_bytes, MAX_BODY))

    assert (await answer_of(reader))[0] == status
    writer.close()


async def test_connections_are_bounded(start_router, replicas):
    router = await start_router(*replicas)
    kept = [await connect(router) for _ in range(MAX_CONNECTIONS)]
    for reader, writer in kept:
        writer.write(GET % b"/health")
        assert (await answer_of(reader))[0] == 200

    reader, writer = await connect(router)
    status, body = await answer_of(reader)
    assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
    assert await reader.read() == b""

    writer.close()
    kept[0][1].close()
    await asyncio.sleep(0.05)
    kept[0] = reader, writer = await connect(router)
    writer.write(GET % b"/health")
    assert (await answer_of(reader))[0] == 200
    for _, writer in kept:
        writer.close()


async def test_slow_clients_are_ended(start_router, replicas):
    router = await start_router(*replicas, head_timeout_s=10.0, keepalive_s=75.0)
    admin = router._admin
    admin._check.cancel()  # time is the test's
    idle_reader, idle = await connect(router)
    idle.write(GET % b"/health")
    await answer_of(idle_reader)
    slow_reader, slow = await connect(router)
    slow.write(b"GET /health HT")
    await asyncio.sleep(0.05)

    for at in (0.0, 9.9, 10.0):
        assert not slow_reader._buffer
        admin.check_connections(at)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        assert (await answer_of(slow_reader))[0] == 408
    admin.check_connections(74.9)
    await asyncio.sleep(0.05)
    assert not idle_reader.at_eof()
    admin.check_connections(75.0)
    async with asyncio.timeout(5):
        assert await idle_reader.read() == b""
    slow.close()
    idle.close()


async def test_a_page_that_fails_is_a_500_and_the_next_is_served(
    start_router, replicas, monkeypatch, caplog
):
    router = await start_router(*replicas)
    monkeypatch.setattr("roost_router.admin.generate_latest", lambda _: 1 / 0)
    reader, writer = await connect(router)

    writer.write(GET % b"/metrics" + GET % b"/health")

    status, body = await answer_of(reader)
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
    assert (await answer_of(reader))[0] == 200
    assert "an admin page failed" in caplog.text
    writer.close()


async def test_a_router_that_was_replaced_leaves_the_admin_port_to_its_successor(
    start_router, replicas
):
    """Its connections end at once; those that come find whoever else holds the socket."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        router = await start_router(replicas[0], admin_listen_fd=socket.dup(held.fileno()))
        reader, writer = await connect(router)
        writer.write(GET % b"/health")
        assert (await answer_of(reader))[0] == 200

        await router.stop(replaced=True)
        assert await reader.read() == b""
        writer.close()

        successor = await start_router(replicas[0], admin_listen_fd=socket.dup(held.fileno()))
        assert successor.admin_address == held.getsockname()
        reader, writer = await connect(successor)
        writer.write(GET % b"/ready")
        assert (await answer_of(reader))[0] == 200
        writer.close()
