"""No request reaches a replica unless all parsers agree where it begins and ends.

Each case of tests/support/desync_cases.py goes over a real socket to a real router before a
replica that records every byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import h11
import pytest
from desync_cases import ANY_ERROR, FAMILIES, PATH, Case
from recording_replica import RecordingReplica


@pytest.fixture
async def replica():
    recording = await RecordingReplica().start()
    yield recording
    await recording.stop()


def test_the_corpus_is_large_and_mostly_hostile():
    cases = [case for family in FAMILIES.values() for case in family]

    assert len(cases) >= 250
    assert sum(case.statuses == (ANY_ERROR,) for case in cases) >= 180
    assert len({(family, case.name) for family in FAMILIES for case in FAMILIES[family]}) == len(
        cases
    )


@pytest.mark.parametrize("pieces", ["whole", "bytes"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_nothing_hostile_is_forwarded(start_router, replica, family, pieces):
    """Whole cases come three times: the router recognises heads that it has read before."""
    router = await start_router(replica, poll_interval_s=60.0, max_body_bytes=100_000)
    wrong = []
    for case in [case for case in FAMILIES[family] for _ in range(3)]:
        if pieces == "bytes" and len(case.sent) > 4096:
            continue  # the large ones are about size, not about where a read ends
        try:
            await judge(router, replica, case, 1 if pieces == "bytes" else len(case.sent))
        except (AssertionError, TimeoutError, h11.RemoteProtocolError) as error:
            wrong.append(f"{case.name}: {error!r:.400}")
        replica.take()

    assert not wrong, "\n".join(wrong)


async def judge(router, replica: RecordingReplica, case: Case, size: int) -> None:
    answers = responses(await exchange(router, case.sent, size))
    forwarded = requests(replica.take())

    assert len(case.statuses) == len(answers), [status for status, _ in answers]
    for wanted, (status, body) in zip(case.statuses, answers, strict=True):
        assert status >= 400 if wanted == ANY_ERROR else status == wanted, (status, body)
        if status >= 400:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert list(case.bodies) == [body for _, body in forwarded]
    for request, _ in forwarded:
        names = [name for name, _ in request.headers]
        assert request.target.partition(b"?")[0] == PATH
        assert names.count(b"content-length") == names.count(b"host") == 1
        assert not {b"transfer-encoding", b"connection", b"upgrade", b"te", b"trailer"} & set(names)
        assert not any(b"_" in name for name in names)


async def exchange(router, sent: bytes, size: int) -> bytes:
    """What comes back until the router closes: it must, for each case asks for it or is wrong."""
    loop, sock = asyncio.get_running_loop(), socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = b""
    with sock, contextlib.suppress(ConnectionError):  # closed with bytes of ours unread
        async with asyncio.timeout(5):
            await loop.sock_connect(sock, router.address)
            for start in range(0, len(sent), size):
                await loop.sock_sendall(sock, sent[start : start + size])
            while data := await loop.sock_recv(sock, 65536):
                received += data
    return received


def responses(data: bytes) -> list[tuple[int, bytes]]:
    """All answers in `data`, as (status, body), read by another parser than ours."""
    found = []
    while data:
        status, body, data = one_response(data)
        found.append((status, body))
    return found


def one_response(data: bytes) -> tuple[int, bytes, bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    status, body = 0, b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA, data
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
    return status, body, connection.trailing_data[0]


def requests(data: bytes) -> list[tuple[h11.Request, bytes]]:
    """All requests in what a replica got; fails unless they are well formed to the last byte."""
    found: list[tuple[h11.Request, bytes]] = []
    while data:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        request = connection.next_event()
        assert isinstance(request, h11.Request), (request, data)
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), (event, data)
        found.append((request, body))
        data = connection.trailing_data[0]
    return found
