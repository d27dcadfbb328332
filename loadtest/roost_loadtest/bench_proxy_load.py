"""The load of `roost bench proxy`: clients as raw protocols on uvloop, requests as ready bytes.

It shares a core with the mocks, so it has to be cheap: straight to a mock it reaches what wrk
reaches. Answers are read no further than needed to know that they are whole and right.

Not here: what is sent and measured (bench_proxy_scenarios.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from time import perf_counter_ns

import msgspec

from roost_loadtest.mock_replica import MODEL, STAMP, STAMP_DIGITS, stream_order

NUM_PROMPTS = 64

_STEP = NUM_PROMPTS + 1  # a client's next prompt: each meets all of them

_END = b"0\r\n\r\n"  # the last chunk of a chunked answer
_STAMPED = len(STAMP) + STAMP_DIGITS


class LoadError(Exception):
    """A proxy did not answer as it should; the message quotes it."""


class RequestFigures(msgspec.Struct, frozen=True):
    """What came of a load of whole answers."""

    requests: int
    seconds: float
    cpu_s: float  # of whoever was loaded
    latencies_ns: list[int]  # ascending


class StreamFigures(msgspec.Struct, frozen=True):
    """What came of a load of streams."""

    chunks: int
    seconds: float
    cpu_s: float
    delays_ns: list[int]  # from the mock's write of a chunk to its arrival; ascending
    first_ns: list[int]  # from the request to the first chunk; ascending


def requests_of(num_bytes: int) -> list[bytes]:
    """Different requests with prompts of so many bytes, the first half of which they share."""
    half = num_bytes // 2
    return [
        _request(("shared " * half)[:half] + (f"{number} own " * half)[:half])
        for number in range(NUM_PROMPTS)
    ]


def stream_request(num_chunks: int, gap_us: int, number: int) -> bytes:
    """A request for a stream of a mock; `number` makes the prompt a different one."""
    prompt = f"{stream_order(num_chunks, gap_us)} {number} " + "please " * 25
    return _request(prompt, stream=True)


def _request(prompt: str, *, stream: bool = False) -> bytes:
    body: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    if stream:
        body["stream"] = True
    encoded = msgspec.json.encode(body)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(encoded), encoded)
    )


async def drive_requests(
    port: int,
    requests: Sequence[bytes],
    *,
    connections: int,
    warm_s: float,
    seconds: float,
    read_cpu_s: Callable[[], float],
) -> RequestFigures:
    """Closed loops, each with its connection and the next request when the last is answered.

    Counted after `warm_s`: by then connections exist and prompts are known. LoadError for any
    answer that is not 200 and for a lost connection.
    """
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clients = [_RequestClient(requests, number, failed) for number in range(connections)]
    async with connected(port, clients, failed):
        for client in clients:
            client.begin()
        await _sleep(warm_s, failed)
        for client in clients:
            client.latencies_ns.clear()
        cpu_s, started = read_cpu_s(), perf_counter_ns()
        await _sleep(seconds, failed)
        cpu_s, elapsed = read_cpu_s() - cpu_s, perf_counter_ns() - started
    latencies = sorted(taken for client in clients for taken in client.latencies_ns)
    if not latencies:
        raise LoadError(f"no answer came in {seconds:g} s")
    return RequestFigures(len(latencies), elapsed / 1e9, cpu_s, latencies)


async def drive_streams(
    port: int,
    requests: Sequence[bytes],
    *,
    stagger_s: float,
    read_cpu_s: Callable[[], float],
) -> StreamFigures:
    """A stream for each request, all at once, each on a connection of its own, to their ends.

    They begin `stagger_s` apart, so that chunks of different streams do not fall together.
    """
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clients = [StreamClient(failed) for _ in requests]
    async with connected(port, clients, failed):
        cpu_s, started = read_cpu_s(), perf_counter_ns()
        for request, client in zip(requests, clients, strict=True):
            client.begin(request)
            if stagger_s:
                await asyncio.sleep(stagger_s)
        for client in clients:
            await asyncio.wait([client.ended, failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        cpu_s, elapsed = read_cpu_s() - cpu_s, perf_counter_ns() - started
    delays = sorted(delay for client in clients for delay in client.delays_ns)
    return StreamFigures(
        len(delays), elapsed / 1e9, cpu_s, delays, sorted(client.first_ns for client in clients)
    )


class _Client(asyncio.Protocol):
    """A connection whose loss fails the whole load, until it leaves itself."""

    def __init__(self, failed: asyncio.Future[None]) -> None:
        self._failed = failed
        self._transport: asyncio.Transport | None = None
        self._leaving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._write: Callable[[bytes], None] = transport.write  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._leaving:
            self.fail(f"the connection was lost: {exc or 'closed by the proxy'}")

    def leave(self) -> None:
        """Cut the connection, if there is one."""
        self._leaving = True
        if self._transport is not None:
            self._transport.abort()

    def fail(self, why: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(LoadError(why))


class _RequestClient(_Client):
    """Asks again and again."""

    def __init__(
        self, requests: Sequence[bytes], number: int, failed: asyncio.Future[None]
    ) -> None:
        super().__init__(failed)
        self.latencies_ns: list[int] = []
        self._requests = requests
        self._position = number
        self._answer = b""
        self._length = 0  # of the last answer: the next one is mostly as long

    def begin(self) -> None:
        self._sent_ns = perf_counter_ns()
        self._write(self._requests[self._position % len(self._requests)])

    def data_received(self, data: bytes) -> None:
        if self._answer:
            data = self._answer + data
        if len(data) != self._length or not data.startswith(b"HTTP/1.1 200"):
            length = self._whole_length(data)
            if length is None or len(data) < length:
                self._answer = data
                return
            self._length = length
        self._answer = b""
        now = perf_counter_ns()
        self.latencies_ns.append(now - self._sent_ns)
        self._position += _STEP
        self._sent_ns = now
        self._write(self._requests[self._position % len(self._requests)])

    def _whole_length(self, data: bytes) -> int | None:
        """Of the answer that begins with `data`; None while its head is incomplete."""
        head, blank, _ = data.partition(b"\r\n\r\n")
        if not blank:
            return None
        length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        if not head.startswith(b"HTTP/1.1 200") or not length:
            self.fail(f"not a 200 with a length: {data[:400]!r}")
            return None
        return len(head) + len(blank) + int(length)


class StreamClient(_Client):
    """Reads one stream of a mock."""

    def __init__(self, failed: asyncio.Future[None]) -> None:
        super().__init__(failed)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.delays_ns: list[int] = []
        self.first_ns = 0  # from the request to the first chunk; 0: not yet
        self._rest = b""  # what may be the beginning of a stamp or of the end

    def begin(self, request: bytes) -> None:
        """Send it."""
        self._sent_ns = perf_counter_ns()
        self._write(request)

    def data_received(self, data: bytes) -> None:
        """Note the chunks that are in it."""
        now = perf_counter_ns()
        data = self._rest + data
        if not self.first_ns and not data.startswith(b"HTTP/1.1 200"[: len(data)]):
            self.fail(f"not a 200: {data[:400]!r}")
            return
        at = data.find(STAMP)
        looked_at = 0
        while at >= 0 and at + _STAMPED <= len(data):
            looked_at = at + _STAMPED
            self.delays_ns.append(now - int(data[at + len(STAMP) : looked_at]))
            at = data.find(STAMP, looked_at)
        if not self.first_ns:
            if not looked_at:
                self._rest = data  # the head is still to be judged
                return
            self.first_ns = now - self._sent_ns
        self._rest = data[max(looked_at, len(data) - _STAMPED + 1) :]
        if self._rest.endswith(_END) and not self.ended.done():
            self.ended.set_result(None)


@contextlib.asynccontextmanager
async def connected(
    port: int, clients: Sequence[_Client], failed: asyncio.Future[None]
) -> AsyncIterator[None]:
    """Connections to 127.0.0.1 for all clients; cut at the end, also when `failed` has failed."""
    try:
        for client in clients:
            await connect(port, client)
        yield
    finally:
        for client in clients:
            client.leave()
        if not failed.cancel():
            failed.exception()  # raised already, or less telling than what is


async def connect(port: int, client: _Client) -> None:
    """Connect a client to 127.0.0.1."""
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: client, "127.0.0.1", port)


async def _sleep(seconds: float, failed: asyncio.Future[None]) -> None:
    """Raises at once when a client fails."""
    await asyncio.wait([failed], timeout=seconds)
    if failed.done():
        failed.result()
