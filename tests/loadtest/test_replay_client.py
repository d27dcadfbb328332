"""The open-loop client against servers of every kind of manners."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from roost_loadtest.local_processes import free_port
from roost_loadtest.replay.answer import Answer, Usage
from roost_loadtest.replay.client import Ask, Chain, Outcome, drive

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Listen = Callable[[Handler], Awaitable[int]]

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":2,"total_tokens":42,'
    b'"prompt_tokens_details":{"cached_tokens":16}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
WHOLE = ROLE + TOKEN * 2 + STOP + USAGE + DONE
REQUEST = b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Starts a server that a test writes; its port."""
    servers = []

    async def start(handler: Handler) -> int:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await handler(reader, writer)
            writer.close()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
        return servers[-1].sockets[0].getsockname()[1]

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()
    await asyncio.sleep(0.01)  # the last connections close in the next turns


def answering(answer: bytes, *, then_close: bool = False) -> Handler:
    """Gives the same answer to each request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            if then_close:
                return

    return handle


def chain(num_asks: int = 1, starts_s: float = 0.0, think_s: float = 0.0) -> Chain:
    return Chain(starts_s, [Ask(lambda: REQUEST, think_s) for _ in range(num_asks)])


async def one(port: int, patience_s: float = 5.0) -> Outcome:
    return (await drive(port, [chain()], patience_s=patience_s))[0]


async def test_a_whole_stream_is_counted(listen: Listen):
    port = await listen(answering(HEAD + chunked(WHOLE) + b"0\r\n\r\n"))

    got = await one(port)

    assert (got.status, got.error, got.truncated) == (200, "", False)
    assert got.usage == Usage(prompt=40, cached=16, output=2)
    assert 0.0 <= got.due_s <= got.sent_s <= got.first_s <= got.ended_s


@pytest.mark.parametrize(
    ("answer", "error", "truncated"),
    [
        (HEAD + chunked(ROLE + TOKEN + STOP) + b"0\r\n\r\n", "without a finish reason", True),
        (HEAD + chunked(ROLE + TOKEN + DONE) + b"0\r\n\r\n", "without a finish reason", True),
        (HEAD + chunked(STOP + DONE) + b"0\r\n\r\n", "without a finish reason", True),
        (HEAD + chunked(ROLE + TOKEN), "was lost", True),
        (b"", "was lost", False),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nfull", "status 503: full", False),
        (b"nonsense\r\n\r\n", "HttpParser", False),
    ],
)
async def test_anything_less_is_an_error(listen: Listen, answer, error, truncated):
    port = await listen(answering(answer, then_close=True))

    got = await one(port)

    assert error in got.error
    assert got.truncated is truncated


async def test_nobody_there_is_an_error():
    got = await one(free_port())

    assert "ConnectionRefused" in got.error
    assert not got.truncated


async def test_a_silent_server_is_left_after_some_patience(listen: Listen):
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del writer
        await reader.read()

    got = await one(await listen(silent), patience_s=0.05)

    assert "within 0.05 s" in got.error


async def test_requests_leave_when_they_are_due_whatever_came_of_others(listen: Listen):
    """The loop is open: nothing is answered before all have come."""
    waiting, all_there = [], asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        waiting.append(writer)
        if len(waiting) == 5:
            all_there.set()
        await all_there.wait()
        writer.write(HEAD + chunked(WHOLE) + b"0\r\n\r\n")
        await reader.read()

    port = await listen(hold)
    got = await drive(port, [chain(starts_s=0.01 * n) for n in range(5)], patience_s=5.0)

    assert [outcome.error for outcome in got] == [""] * 5
    assert [outcome.due_s for outcome in got] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert max(o.sent_s for o in got) <= min(o.first_s for o in got)


async def test_a_conversation_waits_for_each_answer_and_thinks(listen: Listen):
    port = await listen(answering(HEAD + chunked(WHOLE) + b"0\r\n\r\n"))
    ended = []

    got = await drive(port, [chain(3, think_s=0.02)], patience_s=5.0, on_progress=ended.append)

    assert [outcome.error for outcome in got] == [""] * 3
    for before, after in itertools.pairwise(got):
        assert after.due_s >= before.ended_s + 0.02
    assert ended == [1, 2, 3]


async def test_connections_are_kept(listen: Listen):
    peers = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer)
        await answering(HEAD + chunked(WHOLE) + b"0\r\n\r\n")(reader, writer)

    await drive(await listen(handle), [chain(4)], patience_s=5.0)

    assert len(peers) == 1


async def test_a_kept_connection_that_closes_under_a_request_is_no_failure(listen: Listen):
    """llama-server does that; any HTTP client asks again on a fresh one."""
    requests = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(2):
            await reader.readuntil(b"\r\n\r\n")
            requests.append(number)
            if number == 0:
                writer.write(HEAD + chunked(WHOLE) + b"0\r\n\r\n")

    got = await drive(await listen(handle), [chain(2)], patience_s=5.0)

    assert [outcome.error for outcome in got] == ["", ""]
    assert requests == [0, 1, 0]


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_an_answer_is_read_however_it_is_cut(size: int):
    answer, first_at = Answer(), None
    for number, start in enumerate(range(0, len(WHOLE), size)):
        answer.feed(WHOLE[start : start + size], float(number))
        if first_at is None and b'"content":"a' in WHOLE[: start + size]:
            first_at = float(number)

    assert answer.is_whole
    assert answer.first_s == first_at
    assert answer.last_s == float(number)
    assert answer.usage == Usage(prompt=40, cached=16, output=2)


def test_a_token_that_a_large_piece_ends_is_seen():
    answer, event = Answer(), b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    answer.feed(event[:30], 1.0)
    answer.feed(event[30:] + b": comment\n\n" * 400, 2.0)

    assert answer.first_s == 2.0


def test_the_excerpt_is_the_end_of_a_long_answer():
    answer = Answer()
    answer.feed(b"{" + b" " * 5000 + b"the end}", 1.0)

    assert len(answer.excerpt) == 200
    assert answer.excerpt.endswith("the end}")


def test_an_answer_without_text_has_no_first_token():
    answer = Answer()
    answer.feed(ROLE + STOP + DONE, 1.0)

    assert answer.first_s is None
    assert answer.usage == Usage(prompt=0, cached=0, output=0)
