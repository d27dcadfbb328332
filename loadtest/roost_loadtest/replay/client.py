"""An open-loop client: requests leave when they were due, whatever came of earlier ones.

Time counts from the moment when a request was due, so a client that is late, or a connection that
must first be made, is in the figures and not hidden by them. How late it was is kept apart: a run
in which the client was the bottleneck says nothing about routers.

    Chain    requests of one conversation: each further one a think time after the answer before
    Outcome  what came of one request

Not here: what is sent (prompts.py), when an answer is whole (answer.py), what it all amounts to
(figures.py).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

import httptools
import msgspec

from roost_loadtest.replay.answer import Answer, Usage


class Ask(msgspec.Struct):
    """One request: how to make its bytes, and the seconds a user thinks before it."""

    make: Callable[[], bytes]
    think_s: float = 0.0


class Chain(msgspec.Struct):
    """Requests of which each waits for the answer to the one before. Seconds from the start."""

    starts_s: float
    asks: list[Ask]


class Outcome(msgspec.Struct, kw_only=True):
    """What came of a request; seconds of the wall, from the start of the run."""

    due_s: float
    sent_s: float = -1.0  # begun to be sent
    first_s: float = -1.0  # first token, of a whole answer
    ended_s: float = -1.0
    status: int = 0
    error: str = ""  # empty: a whole answer
    usage: Usage = Usage(0, 0, 0)

    @property
    def truncated(self) -> bool:
        """A stream that began and did not end as it must."""
        return bool(self.error) and self.status == 200


async def drive(
    port: int,
    chains: Sequence[Chain],
    *,
    patience_s: float,
    on_progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Play all chains against 127.0.0.1:`port`; an outcome for each request, in order of arrival.

    A request that is not answered `patience_s` seconds after it was due has failed.
    `on_progress` gets the requests that have ended.
    """
    run = _Run(port, patience_s, on_progress)
    async with asyncio.TaskGroup() as tasks:
        for chain in chains:
            run.begin(chain, tasks)
    run.close()
    return sorted(run.outcomes, key=lambda outcome: outcome.due_s)


class _Run:
    """One run: its clock, its connections, what came of its requests so far."""

    def __init__(
        self, port: int, patience_s: float, on_progress: Callable[[int], None] | None
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._loop = asyncio.get_running_loop()
        self._started_s = time.monotonic()  # uvloop's clock has whole milliseconds
        self._port = port
        self._patience_s = patience_s
        self._on_progress = on_progress
        self._num_ended = 0
        self._idle: list[_Connection] = []

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def begin(self, chain: Chain, tasks: asyncio.TaskGroup) -> None:
        """Ask, when it is time."""
        tasks.create_task(self._play(chain))

    async def _play(self, chain: Chain) -> None:
        due_s = chain.starts_s
        for place, ask in enumerate(chain.asks):
            due_s = due_s if place == 0 else self.now() + ask.think_s
            await asyncio.sleep(max(0.0, due_s - self.now()))
            await self._ask(ask, Outcome(due_s=due_s))
            self._num_ended += 1
            if self._on_progress is not None:
                self._on_progress(self._num_ended)

    async def _ask(self, ask: Ask, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        request = ask.make()
        outcome.sent_s = self.now()
        try:
            async with asyncio.timeout(self._patience_s):
                kept = self._kept_connection()
                if kept is None or not await self._tried(kept, request, outcome):
                    await self._converse(await self._connect(), request, outcome)
        except TimeoutError:
            outcome.error = f"no whole answer within {self._patience_s:g} s"
        except (OSError, httptools.HttpParserError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended_s = self.now()

    async def _tried(self, kept: _Connection, request: bytes, outcome: Outcome) -> bool:
        """Ask on a kept connection; False if it was closed under the request, as kept ones may."""
        try:
            await self._converse(kept, request, outcome)
        except ConnectionResetError:
            if outcome.status:
                raise
            return False
        return True

    async def _converse(self, connection: _Connection, request: bytes, outcome: Outcome) -> None:
        try:
            await connection.ask(request, outcome)
        except BaseException:
            connection.close()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()

    def _kept_connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        _, connection = await self._loop.create_connection(
            lambda: _Connection(self.now), "127.0.0.1", self._port
        )
        return connection

    def close(self) -> None:
        """Cut idle connections."""
        for connection in self._idle:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.is_usable = True
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_usable = False
        self._end(ConnectionResetError(f"the connection was lost: {exc or 'closed'}"))

    def close(self) -> None:
        """Cut it."""
        self.is_usable = False
        self._transport.abort()

    async def ask(self, request: bytes, outcome: Outcome) -> None:
        """Send and wait for the end of the answer; OSError when the connection is lost."""
        self._outcome, self._answer = outcome, Answer()
        acknowledge_at_once(self._transport)
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        if self._answer.first_s is None:
            acknowledge_at_once(self._transport)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.is_usable = False
            self._end(error)

    def on_headers_complete(self) -> None:
        self._outcome.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._answer.feed(data, self._now())

    def on_message_complete(self) -> None:
        self.is_usable = self.is_usable and self._parser.should_keep_alive()
        outcome, answer = self._outcome, self._answer
        if outcome.status != 200:
            outcome.error = f"status {outcome.status}: {answer.excerpt}"
        elif not answer.is_whole or answer.first_s is None:
            outcome.error = "the stream ended without a finish reason and [DONE]"
        else:
            outcome.first_s, outcome.usage = answer.first_s, answer.usage
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)


def acknowledge_at_once(transport: asyncio.BaseTransport) -> None:
    """Do not delay the next acknowledgement (tcp(7): not permanent, so again and again).

    A router that leaves Nagle's algorithm on waits for it up to 40 ms with what it has to send.
    Where answers take seconds that never shows; speeded up it would, times the speed-up.
    """
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
