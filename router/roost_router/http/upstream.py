"""Connections to one replica: dial, keep, reuse, and read an answer. Decides nothing.

An `Upstream` serves one request at a time. It parses the answer with llhttp, tells its
`Listener` what comes, and returns to its pool when the answer is complete and the connection
may be kept. Leaving early means closing: that is how a replica learns that nobody listens.

An answer without Content-Length and without chunks ends with the connection (RFC 9112 §6.3);
any other answer that ends with the connection is lost, and `on_lost` says so.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from roost_router.http.head import MAX_HEAD_BYTES, READ_BYTES, Headers, ResponseHead
from roost_router.http.known_heads import KnownHead, KnownHeads, read_known_response

#: Idle connections kept to a replica; more than any burst's tail, few enough to be cheap.
_MAX_IDLE = 128
#: Of the size of a chunk that is recognised without llhttp: no read brings more bytes.
_MAX_SIZE_DIGITS = 6


class Listener(Protocol):
    """Whoever waits for an answer."""

    def on_head(self, head: ResponseHead) -> None:
        """Status and headers came."""
        ...

    def on_answer(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer came at once: `on_head`, `on_body` and `on_end` in one."""
        ...

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        """Some of the body came, framing removed. `framed`: the same as one chunk, if it was."""
        ...

    def on_end(self) -> None:
        """The answer is complete."""
        ...

    def on_lost(self, reason: str) -> None:
        """The connection ended before the answer did."""
        ...


class Upstream:
    """One connection to a replica: an asyncio.Protocol, but for its base class."""

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._parser: httptools.HttpResponseParser | None = None  # made when a head is not known
        self._known: KnownHead[ResponseHead] | None = None  # the head of the answer before
        self._body_left = 0  # bytes of a body that llhttp does not read
        self._pieces: list[bytes] = []  # of a body, out of the present read
        self._is_between_chunks = False  # llhttp has read a chunk to its end, and nothing since
        self._is_paused = False
        self._has_begun = False
        self._headers: Headers = []
        self._head_bytes = 0
        self._unread_head_bytes = 0
        self._has_head = False
        self._has_length = False
        self._is_complete = False
        self._may_keep = False  # the replica keeps the connection open
        self._has_excess = False  # bytes came after the end of the answer
        self.num_requests = 0

    @property
    def was_stale(self) -> bool:
        """Whether this kept connection ended without a byte of the answer.

        The replica closed it meanwhile: that says nothing of the replica.
        """
        return self.num_requests > 1 and not self._has_begun

    @property
    def is_open(self) -> bool:
        """Whether a request could be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, listener: Listener, parts: list[bytes]) -> None:
        """Send a whole request; `listener` hears of the answer."""
        assert self._transport is not None
        assert self._listener is None
        self._listener = listener
        self._begin_answer()
        self.num_requests += 1
        self._transport.writelines(parts)

    def abandon(self) -> None:
        """Nobody waits for the answer any more: close, so that the replica stops working."""
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stop reading: the client is slower than the replica."""
        self._is_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._is_paused = False
        if self._transport is not None:
            self._transport.resume_reading()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is gone."""
        self._transport = None
        self._pool.forget(self)
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if exc is None and self._has_head and not self._has_length:
            listener.on_end()
        else:
            listener.on_lost(str(exc) if exc else "the replica closed the connection")

    def eof_received(self) -> None:
        """asyncio: the replica sends no more; nothing said, the transport closes."""

    def pause_writing(self) -> None:
        """asyncio: the replica does not take a request as fast; it waits in our buffer."""

    def resume_writing(self) -> None:
        """asyncio: it takes it again."""

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes from the replica."""
        listener = self._listener
        if listener is None:
            self.abandon()  # bytes that nobody asked for: the connection cannot be trusted
        elif self._body_left:
            self._read_body(listener, data)
        elif self._is_between_chunks and (start := _start_of_only_chunk(data)):
            listener.on_body(data[start:-2], data)
        elif self._has_begun:
            self._parse(data)
        else:
            self._has_begun = True
            found = self._find_known(data)
            if found is None:
                self._parse(data)
                if self._is_complete or self._has_head:
                    self._pool.heads.learn(data)
                return
            assert self._known is not None
            start, self._body_left = found
            self._has_head = self._has_length = self._may_keep = True
            if start + self._body_left == len(data):  # the usual case: one whole answer
                self._listener = None
                self._release(listener)
                listener.on_answer(self._known.head, data[start:])
                return
            listener.on_head(self._known.head)
            self._read_body(listener, data[start:])

    def _find_known(self, data: bytes) -> tuple[int, int] | None:
        """Where the body starts and how long it is, if `data` begins with a known head."""
        if self._known is not None:
            found = self._known.match(data)
            if found is not None:
                return found
        known = self._pool.heads.find(data)
        if known is None:
            return None
        self._known = known
        return known.match(data)

    def _read_body(self, listener: Listener, data: bytes) -> None:
        """Pass on the next bytes of a body of known length."""
        if self._listener is not listener:
            return  # it has left meanwhile
        left = self._body_left
        if len(data) > left:
            self._has_excess = bool(data[left:].strip(b"\r\n"))  # llhttp forgives those
            data = data[:left]
        self._body_left = left - len(data)
        if data:
            listener.on_body(data)
        if not self._body_left and self._listener is listener:
            self._finish()

    def _parse(self, data: bytes) -> None:
        """Let llhttp read `data`."""
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        head_was_pending = not self._has_head
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._pass_pieces()
            if not self._is_complete:
                self._lose(f"the replica's answer is not HTTP: {error!r}")
                return
            self._has_excess = True
        else:
            if self._pieces:
                self._pass_pieces()
        if self._is_between_chunks and not data.endswith(b"\n"):
            self._is_between_chunks = False  # it has begun to read the next size
        if head_was_pending and not self._has_head:
            self._unread_head_bytes += len(data)  # llhttp tells of a line only at its end
            if self._unread_head_bytes > MAX_HEAD_BYTES + READ_BYTES:
                self._lose("the head of the replica's answer is too large")
                return
        if self._is_complete:
            self._finish()

    def _pass_pieces(self) -> None:
        """What one read brought goes on at once: each write to a client is a system call."""
        pieces, self._pieces = self._pieces, []
        if pieces and self._listener is not None:
            self._listener.on_body(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    # llhttp's side. An answer ends only when all bytes that came with its end are read: whatever
    # follows it would otherwise reach the next request on this connection.

    def on_message_begin(self) -> None:
        """llhttp: an answer begins."""
        if self._is_complete:
            self._has_excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header or a trailer line."""
        if self._has_head:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("response head too large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200 or self._has_head:  # 1xx: interim, the real head follows
            return
        self._has_head = True
        self._has_length = status in {204, 304} or any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self._headers
        )
        if self._listener is not None:
            self._listener.on_head(ResponseHead(status, self._headers))

    def on_body(self, data: bytes) -> None:
        """llhttp: some of the body."""
        if not self._is_complete:
            self._pieces.append(data)

    def on_chunk_header(self) -> None:
        """llhttp: a chunk begins."""
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        """llhttp: a chunk ends, its line end included."""
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        """llhttp: the answer is complete."""
        assert self._parser is not None
        if self._has_head:
            self._is_complete = True
            self._may_keep = self._parser.should_keep_alive()  # llhttp forgets it after this
        else:
            self._headers = []  # of an interim answer

    def _finish(self) -> None:
        listener, self._listener = self._listener, None
        self._release(listener)
        if listener is not None:
            listener.on_end()

    def _release(self, listener: Listener | None) -> None:
        """The answer is complete: back to the pool, or close."""
        keep = self._may_keep and not self._has_excess
        if keep and self.is_open and listener is not None:
            if self._is_paused:
                self.resume()
            self._pool.keep(self)
        else:
            self.abandon()

    def _begin_answer(self) -> None:
        if not self._has_begun:
            return  # nothing has been read since the last time
        self._headers = []
        self._pieces = []
        self._is_between_chunks = False
        self._body_left = 0
        self._has_begun = False
        self._head_bytes = self._unread_head_bytes = 0
        self._has_head = self._has_length = self._is_complete = self._has_excess = False
        self._may_keep = False

    def _lose(self, reason: str) -> None:
        listener = self._listener
        self.abandon()
        if listener is not None:
            listener.on_lost(reason)


def _start_of_only_chunk(data: bytes) -> int:
    """Where the payload starts if `data` is exactly one chunk as we would write it, else 0.

    Not the last. Size in lower case, no leading zeros, no extension; llhttp reads the same. O(1).
    """
    start = data.find(b"\r\n", 0, _MAX_SIZE_DIGITS + 2) + 2
    num_bytes = len(data) - start - 2
    if start > 2 and num_bytes > 0 and data.startswith(b"%x\r\n" % num_bytes):
        return start if data.endswith(b"\r\n") else 0
    return 0


class UpstreamPool:
    """Connections to one replica, the most recently used first."""

    def __init__(
        self,
        url: str,
        loop: asyncio.AbstractEventLoop,
        connect_timeout_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: whom to believe over https; None: those that the system does."""
        parts = urlsplit(url)
        assert parts.hostname is not None  # RouterConfig has checked the URL
        self._loop = loop
        self._connect_timeout_s = connect_timeout_s
        self._address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        is_https = parts.scheme == "https"
        self._ssl = (tls or ssl.create_default_context()) if is_https else None
        self.heads = KnownHeads(read_known_response)
        self.host = parts.netloc.encode()
        self.base_path = parts.path.rstrip("/").encode()
        self._idle: deque[Upstream] = deque()

    def try_idle(self) -> Upstream | None:
        """A kept connection, or None."""
        while self._idle:
            upstream = self._idle.pop()
            if upstream.is_open:
                return upstream
        return None

    async def dial(self) -> Upstream:
        """A new connection. Raises OSError (TimeoutError is one)."""
        upstream = Upstream(self)
        protocol = cast("asyncio.Protocol", upstream)
        async with asyncio.timeout(self._connect_timeout_s):
            await self._loop.create_connection(lambda: protocol, *self._address, ssl=self._ssl)
        return upstream

    def keep(self, upstream: Upstream) -> None:
        """Take a connection back whose answer is complete."""
        self._idle.append(upstream)
        if len(self._idle) > _MAX_IDLE:
            self._idle.popleft().abandon()

    def forget(self, upstream: Upstream) -> None:
        """Drop a connection that closed while idle."""
        if upstream in self._idle:
            self._idle.remove(upstream)

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().abandon()
