"""A client that asks for one stream and sees exactly what the wire brings, for fault tests.

Raw sockets and llhttp, no retries of its own: a reset, a missing last chunk and a clean end are
three things to it. Connections can be kept from one request to the next, as SDKs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import httptools
import msgspec

from roost_loadtest.fault_answer import Answer, Ending, Expected, Verdict

HOST = "127.0.0.1"
PATH = "/v1/chat/completions"

_T = TypeVar("_T")


class Outcome(msgspec.Struct, frozen=True):
    """One request as its client saw it. Times are time.monotonic(), in seconds."""

    verdict: Verdict
    detail: str
    status: int
    text: str
    sent_at: float
    ended_at: float
    arrivals: tuple[float, ...]  # of events with text
    num_events: int  # all of them: role, finish, usage and [DONE] too
    headers: Mapping[str, str]
    finish_reason: str | None
    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def gap_s(self) -> float:
        """The longest time between two pieces of text; 0 with less than two."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((after - before for before, after in pairs), default=0.0)


class Client:
    """One connection to 127.0.0.1 at a time; not for two requests at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.num_connections = 0

    async def ask(
        self,
        body: Mapping[str, Any] | bytes,
        expected: Expected | None = None,
        *,
        patience_s: float = 60.0,
        keep: bool = False,
        leave: Callable[[Answer], bool] | None = None,
        leave_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Send `body` and read its answer to the end, whatever the end is.

        patience_s: how long the client bears silence; an event breaks it, a comment does not.
        keep: leave the connection open for the next request if the server does.
        leave: asked after every piece; True closes the connection in the middle.
        leave_after_s: close it so long after the request was sent.
        """
        answer = Answer()
        parser = _Parser(answer)
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        sent_at = time.monotonic()
        parser.last_event_at = sent_at
        leave_at = None if leave_after_s is None else sent_at + leave_after_s
        try:
            await self._connect()
            assert self._writer is not None
            self._writer.write(_request(raw, headers or {}, keep=keep))
            ending = await self._read(parser, patience_s, leave, leave_at)
        except ConnectionRefusedError:
            ending = Ending.REFUSED
        except OSError:
            ending = Ending.BROKEN
        if ending is not Ending.COMPLETE or not keep or not parser.should_keep:
            await self.close()
        verdict, detail = answer.judge(ending, expected)
        usage = answer.usages[-1] if answer.usages else None
        return Outcome(
            verdict=verdict,
            detail=detail or parser.error_text(),
            status=answer.status,
            text=answer.text,
            sent_at=sent_at,
            ended_at=time.monotonic(),
            arrivals=tuple(answer.arrivals),
            num_events=answer.num_events,
            headers=parser.headers,
            finish_reason=answer.finish_reasons[-1] if answer.finish_reasons else None,
            completion_tokens=usage.completion_tokens if usage else 0,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
        )

    async def close(self) -> None:
        """Close the connection, if there is one."""
        if self._writer is not None:
            self._writer.transport.abort()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None

    async def _connect(self) -> None:
        if self._reader is not None and not self._reader.at_eof():
            return
        await self.close()
        self._reader, self._writer = await asyncio.open_connection(HOST, self._port)
        self.num_connections += 1

    async def _read(
        self,
        parser: _Parser,
        patience_s: float,
        leave: Callable[[Answer], bool] | None,
        leave_at: float | None,
    ) -> Ending:
        assert self._reader is not None
        while not parser.is_complete:
            now = time.monotonic()
            give_up_at = parser.last_event_at + patience_s
            until = give_up_at if leave_at is None else min(give_up_at, leave_at)
            try:
                data = await asyncio.wait_for(self._reader.read(65536), until - now)
            except TimeoutError:
                return Ending.SILENCE if until == give_up_at else Ending.LEFT
            if not data:
                return Ending.COMPLETE if parser.ends_by_close else Ending.BROKEN
            try:
                parser.feed(data)
            except httptools.HttpParserError:
                return Ending.BROKEN
            if leave is not None and leave(parser.answer):
                return Ending.LEFT
        return Ending.COMPLETE


class _Parser:
    """llhttp's callbacks into an Answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.is_complete = False
        self.should_keep = False
        self.headers: dict[str, str] = {}
        self.last_event_at = 0.0
        self._error_body = b""
        self._parser = httptools.HttpResponseParser(self)

    @property
    def ends_by_close(self) -> bool:
        """Whether this message ends where the connection does."""
        framed = {"content-length", "transfer-encoding"} & set(self.headers)
        return bool(self.answer.status) and not framed

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def error_text(self) -> str:
        """The beginning of an error's body."""
        return self._error_body[:200].decode("utf-8", "replace")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        now = time.monotonic()
        if self.answer.status != 200:
            self._error_body += data
        if self.answer.feed(data, now):
            self.last_event_at = now

    def on_message_complete(self) -> None:
        self.is_complete = True
        self.should_keep = self._parser.should_keep_alive()


def _request(body: bytes, headers: Mapping[str, str], *, keep: bool) -> bytes:
    lines = {
        "host": HOST,
        "content-type": "application/json",
        "connection": "keep-alive" if keep else "close",
        "content-length": str(len(body)),
    } | dict(headers)
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + body


async def at_once(calls: Sequence[Callable[[], Awaitable[_T]]], concurrency: int) -> list[_T]:
    """Run calls, at most `concurrency` at a time, in order of their list; all results."""
    gate = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[_T]]) -> _T:
        async with gate:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls))
