"""Simulated clients: patient, slow, pipelining, leaving, and those that try again like the SDK.

A client makes its requests one after the other on one connection, which it opens anew when it
was closed; a pipelining one sends them all at once. Each answer goes to a Judge.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random

import httptools
import msgspec

from roost_loadtest.simulation.judge import Ask, Judge, Outcome
from roost_loadtest.simulation.language import Answer, answer
from roost_loadtest.simulation.network import Network, SimTransport
from roost_loadtest.simulation.replica import Leg

#: Statuses after which the SDK tries again.
_RETRIED = frozenset({408, 409, 429})


class Manner(msgspec.Struct, frozen=True):
    """How a client behaves."""

    starts_at: float = 0.0  # seconds
    pauses_s: float = 0.0  # between its requests, at most
    pipelines: bool = False
    reads_slowly_s: float = 0.0  # how long it stops reading, now and then
    sends_slowly: bool = False  # in pieces
    is_http_1_0: bool = False
    max_retries: int = 0  # as the SDK does
    half_closes: bool = False  # says at once that no more requests come


class Call(msgspec.Struct, kw_only=True):
    """One request that was made: an entry of the run's result."""

    ask: Ask
    request_id: str | None
    sent_at: float
    retry: int = 0
    outcome: Outcome | None = None
    status: int = 0
    ended_at: float = 0.0


class SimClient:
    """One client with its list of requests."""

    def __init__(
        self,
        network: Network,
        rng: Random,
        name: str,
        asks: list[Ask],
        manner: Manner,
        *,
        ledger: dict[int, list[Leg]],
        log: Callable[..., None],
        is_counted: bool,
    ) -> None:
        self.is_counted = is_counted
        self.network = network
        self.loop = network.loop
        self.rng = rng
        self.host = network.add_host(name)
        self.manner = manner
        self.ledger = ledger
        self.log = log
        self.calls: list[Call] = []
        self.faults: list[str] = []
        self._asks = deque(asks)
        self._retry = 0
        self._connection: ClientConnection | None = None
        self._is_dialling = False
        self.is_over = False
        self.loop.at(manner.starts_at, self._go)

    @property
    def name(self) -> str:
        """Its host's."""
        return self.host.name

    def _go(self) -> None:
        """Make the next request, or end."""
        if self._connection is None and self._asks:
            if not self._is_dialling:
                self._is_dialling = True
                self.network.dial(
                    self.host, "router", lambda: ClientConnection(self), self._connected
                )
            return
        if not self._asks:
            if self._connection is not None and not self._connection.pending:
                self._connection.leave()
            if self._connection is None or not self._connection.pending:
                self.is_over = True
            return
        assert self._connection is not None
        self._connection.send(self._asks.popleft(), self._retry)
        if self.manner.pipelines:
            self._retry = 0
            while self._asks:
                self._connection.send(self._asks.popleft(), 0)
        if self.manner.half_closes:
            self._connection.half_close()

    def _connected(self, transport: SimTransport | None, protocol: asyncio.BaseProtocol) -> None:
        self._is_dialling = False
        if transport is None:
            ask = self._asks.popleft()
            call = Call(ask=ask, request_id=None, sent_at=self.loop.time(), retry=self._retry)
            self.calls.append(call)
            self.over(call, Outcome.UNREACHED, 0, None)
            return
        assert isinstance(protocol, ClientConnection)
        self._connection = protocol
        self._go()

    def lost(self, connection: ClientConnection) -> None:
        """The connection is gone."""
        if self._connection is connection:
            self._connection = None

    def over(self, call: Call, outcome: Outcome, status: int, wait_s: float | None) -> None:
        """An answer came to its end. `wait_s`: what the router said of trying again."""
        call.outcome, call.status, call.ended_at = outcome, status, self.loop.time()
        self.log(self.name, "ends", call.ask.number, outcome.value, status)
        failed = outcome in {Outcome.CUT, Outcome.UNREACHED} or (
            outcome is Outcome.ERROR and (status in _RETRIED or status >= 500)
        )
        if failed and wait_s != -1.0 and self._retry < self.manner.max_retries:
            self._retry += 1
            self._asks.appendleft(call.ask)
            backoff_s = min(8.0, 0.5 * 2 ** (self._retry - 1)) * (0.75 + 0.25 * self.rng.random())
            self.host.later(backoff_s if wait_s is None else wait_s, self._go)
        else:
            self._retry = 0
            self.host.later(self.manner.pauses_s * self.rng.random(), self._go)

    def answers(self, call: Call) -> list[Answer]:
        """What the model may have said to this call."""
        seeds = {
            leg.seed
            for leg in self.ledger.get(call.ask.number, ())
            if leg.seed is not None and (call.request_id or leg.request_id) == leg.request_id
        }
        ask = call.ask
        return [
            answer(ask.prompt, seed, ask.max_tokens, holds_back=False) for seed in sorted(seeds)
        ]


class ClientConnection(asyncio.Protocol):
    """One connection to the router."""

    def __init__(self, client: SimClient) -> None:
        self._client = client
        self._transport: SimTransport
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._has_length = False
        self.pending: deque[tuple[Call, Judge]] = deque()
        self._has_left = False
        self._num_answered = 0

    def send(self, ask: Ask, retry: int) -> None:
        """Make a request."""
        client, loop = self._client, self._client.loop
        call = Call(ask=ask, request_id=ask.request_id, sent_at=loop.time(), retry=retry)
        if call.request_id is not None and retry:
            call.request_id = f"{ask.request_id}.{retry}"
        client.calls.append(call)
        client.log(client.name, "sends", ask.number, "chat" if ask.is_chat else "text")
        judge = Judge(ask, lambda: client.answers(call), is_counted=client.is_counted)
        self.pending.append((call, judge))
        body = ask.body()
        version = b"1.0" if client.manner.is_http_1_0 else b"1.1"
        lines = [b"POST %b HTTP/%b" % (ask.path(), version), b"host: router"]
        if call.request_id is not None:
            lines.append(b"x-request-id: " + call.request_id.encode())
        if ask.timeout_s is not None:
            lines.append(b"x-request-timeout-s: %.3f" % ask.timeout_s)
        if client.manner.max_retries:
            lines.append(b"x-stainless-retry-count: %d" % retry)
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        data = b"\r\n".join(lines) + body
        if client.manner.sends_slowly:
            cut = client.rng.randrange(1, len(data))
            self._transport.write(data[:cut])
            client.host.later(client.rng.random() * 0.02, self._transport.write, data[cut:])
        else:
            self._transport.write(data)
        if ask.leaves_after_s is not None:
            client.host.later(ask.leaves_after_s, self._leave_from, call)

    def half_close(self) -> None:
        """No more requests."""
        self._transport.write_eof()

    def leave(self) -> None:
        """Close."""
        self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        assert isinstance(transport, SimTransport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the router closed, or we did."""
        client = self._client
        client.lost(self)
        for position, (call, judge) in enumerate(self.pending):
            # Without a length or chunks an answer ends with its connection.
            ends_here = bool(judge.status) and not self._has_length and exc is None
            outcome = judge.end(
                is_proper=ends_here and not self._has_left and not judge.has_error_event
            )
            if self._has_left:
                outcome = Outcome.GONE
            elif outcome is Outcome.CUT and (position or self._num_answered) and not judge.status:
                outcome = Outcome.BEHIND
            elif outcome is Outcome.CUT and judge.status and exc is None:
                judge.faults.append("cut without an error event")
            self._report(call, judge, outcome, None)
        self.pending.clear()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes of an answer."""
        client = self._client
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ or error
            client.faults.append(f"the router's answer is not HTTP: {cause!r}")
            self._transport.close()
            return
        if not self.pending or self._has_left:
            return
        call, judge = self.pending[0]
        limit = call.ask.leaves_after_bytes
        if limit is not None and judge.num_bytes >= limit:
            self._leave_from(call)
        elif client.manner.reads_slowly_s and client.rng.random() < 0.5:
            self._transport.pause_reading()
            client.host.later(
                client.manner.reads_slowly_s * client.rng.random(), self._transport.resume_reading
            )

    # llhttp's side

    def on_message_begin(self) -> None:
        """llhttp: an answer begins."""
        self._headers, self._has_length = {}, False
        if not self.pending:
            self._client.faults.append("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header."""
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete."""
        self._has_length = bool({b"content-length", b"transfer-encoding"} & self._headers.keys())
        if self.pending:
            self.pending[0][1].head(self._parser.get_status_code(), self._headers)

    def on_body(self, data: bytes) -> None:
        """llhttp: some of the body."""
        if self.pending and not self._has_left:
            self.pending[0][1].body(data)

    def on_message_complete(self) -> None:
        """llhttp: the answer is complete."""
        if self.pending and not self._has_left:
            call, judge = self.pending.popleft()
            self._num_answered += 1
            wait_s = None
            if self._headers.get(b"x-should-retry") == b"false":
                wait_s = -1.0
            elif b"retry-after-ms" in self._headers:
                wait_s = float(self._headers[b"retry-after-ms"]) / 1000.0
            elif b"retry-after" in self._headers:
                wait_s = float(self._headers[b"retry-after"])
            if self._headers.get(b"connection") == b"close":
                self._client.lost(self)
                self._transport.close()
            self._report(call, judge, judge.end(is_proper=True), wait_s)

    def _leave_from(self, call: Call) -> None:
        if not any(call is pending for pending, _ in self.pending):
            return
        self._has_left = True
        self._client.log(self._client.name, "leaves", call.ask.number)
        if call.ask.leaves_by_reset:
            self._transport.reset()
        else:
            self._transport.close()

    def _report(self, call: Call, judge: Judge, outcome: Outcome, wait_s: float | None) -> None:
        for fault in judge.faults:
            self._client.faults.append(f"request {call.ask.number}: {fault}")
        self._client.log(self._client.name, "got", judge.num_bytes, f"{judge.checksum:08x}")
        self._client.over(call, outcome, judge.status, wait_s)
