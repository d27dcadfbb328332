"""A client's connection: read requests, hand them over one at a time, write answers.

Knows HTTP/1.1 and its limits, decides nothing else. Any malformed byte answers 400 and closes:
after it, nobody can know where the next request begins. Requests that a client pipelines wait
in order, within bounds; reading never pauses while one is served, for a paused socket cannot
tell that its client has left. While the client's own buffer is full, none is served.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections import deque
from typing import NoReturn

import httptools

from roost_router.errors import (
    BadRequestError,
    BodyTooLargeError,
    ClientTimeoutError,
    HeadTooLargeError,
    RouterError,
)
from roost_router.http.head import (
    MAX_HEAD_BYTES,
    READ_BYTES,
    Headers,
    RequestHead,
    response_head,
)
from roost_router.http.known_heads import KnownHead, KnownHeads, read_known_request
from roost_router.http.patience import For, Patience, Waiting
from roost_router.http.serving import Answering, Request, Service

MAX_HEADERS = 128
#: Requests that may wait behind the one being served; their bodies together may be as large as
#: one body.
_MAX_PIPELINED = 64
#: Pieces of a body kept apart before they are copied together: a body has few, unless a client
#: sends it by the byte to make us hold an object for each.
_MAX_PIECES = 16
#: What a head says depends on its bytes alone, so all connections share what was read.
_KNOWN_HEADS = KnownHeads(read_known_request)


class Downstream:
    """One connection from a client: an asyncio.Protocol, but for its base class."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = None  # made when a head is not known
        self._heads: KnownHeads[RequestHead] | None = _KNOWN_HEADS  # None after the last request
        self._known: KnownHead[RequestHead] | None = None  # the head of the request before
        self._waiting: deque[Request] = deque()
        self._active: Answering | None = None
        self._is_closing = False  # no further request is read
        self._is_paused = False  # the client does not read what was written
        self._waiting_bytes = 0  # bodies of waiting requests
        self._body_left = 0  # bytes of a body that llhttp does not read
        self._has_begun = False  # some of a request has come
        self._num_served = 0  # requests
        self._num_written = 0  # bytes
        self._patience = Patience()
        self._rejection: RouterError | None = None  # why a callback ended llhttp's reading
        self._is_upgrade = False  # whose head asked for another protocol, see _ignore_upgrade
        self._reset()

    @property
    def num_served(self) -> int:
        """Requests that were begun."""
        return self._num_served

    @property
    def is_idle(self) -> bool:
        """Whether no request is being served, waiting, or half read."""
        return self._active is None and not self._waiting and not self._has_begun

    def write(self, data: bytes) -> None:
        """Send bytes of the answer."""
        if self._transport is not None:
            self._num_written += len(data)
            self._transport.write(data)

    def finish(self, *, keep_alive: bool) -> None:
        """The answer is complete; serve the next request or close.

        `keep_alive`: what the answer's head said. A client that was not told that the connection
        ends may be sending already.
        """
        self._active = None
        if not keep_alive:
            self._leave()
        elif self._waiting:
            self._serve_next()
        elif self._is_closing:
            self.close()

    def close(self) -> None:
        """Close once all is written."""
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection: the client must not take what it got for a whole answer.

        What is written already is flushed (a last error event must arrive); the missing end of
        the chunked body is what tells the client.
        """
        self._active = None
        self.close()

    def check(self, now: float) -> None:
        """End what takes the client too long; see patience.py. `now` in seconds, monotonic."""
        if self._transport is None:
            return
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent:
            num_unsent += _num_unacknowledged(self._transport)
        waiting = self._waiting_for(num_unsent)
        if not self._patience.is_over(waiting, self._service.limits, now):
            return
        if waiting.what in {For.HEAD, For.BODY}:
            self.refuse(ClientTimeoutError(waiting.what.value))
        else:
            self._transport.abort()

    def _waiting_for(self, num_unsent: int) -> Waiting:
        num_served = self._num_served
        if num_unsent:
            return Waiting(For.WRITE, num_served, self._num_written - num_unsent)
        if self._active is not None or self._waiting:
            return Waiting(For.ANSWER, num_served, 0)
        if self._is_closing:
            return Waiting(For.LINGER, num_served, 0)
        if self._has_head or self._body_left:
            return Waiting(For.BODY, num_served, self._body_bytes)
        if self._has_begun:
            return Waiting(For.HEAD, num_served, 0)
        return Waiting(For.IDLE if num_served else For.FIRST, num_served, 0)

    def refuse(self, error: RouterError) -> None:
        """Answer an error outside any exchange, and close.

        First only our side: a client may still be sending, and closing with bytes of its unread
        would reset the connection, and the answer with it (RFC 9112 §9.6). What still comes is
        dropped, for LINGER_S at most.
        """
        self._is_closing = True
        body = error.body()
        headers = [(b"content-type", b"application/json")]
        framing = [b"content-length: %d" % len(body)]
        self.write(response_head(error.status, headers, framing=framing, keep_alive=False) + body)
        self._half_close()

    def _leave(self) -> None:
        """End after an answer that said so. In a drain the client may not have asked for it."""
        if self._service.is_draining:
            self._is_closing = True
            self._waiting.clear()
            self._half_close()
        else:
            self.close()

    def _half_close(self) -> None:
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: a client connected."""
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        self._transport.set_write_buffer_limits(self._service.limits.write_buffer_bytes)
        address = transport.get_extra_info("peername")
        error = self._service.opened(self, address[0] if address else None)
        if error is not None:
            self.refuse(error)
            self.close()  # its place counts: it does not linger

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """asyncio: the client is gone."""
        self._transport = None
        self._is_closing = True
        self._service.closed(self)
        self._waiting.clear()
        active, self._active = self._active, None
        if active is not None:
            active.client_gone()

    def eof_received(self) -> None:
        """asyncio: the client sends no more; nothing said, the transport closes."""

    def pause_writing(self) -> None:
        """asyncio: the client reads too slowly."""
        self._is_paused = True
        if self._active is not None:
            self._active.pause()

    def resume_writing(self) -> None:
        """asyncio: the client has caught up."""
        self._is_paused = False
        if self._active is not None:
            self._active.resume()
        elif self._waiting:
            self._serve_next()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes from the client."""
        while data and not self._is_closing:
            if self._body_left:
                data = self._read_body(data)
                continue
            found = None if self._has_begun else self._find_known(data)
            if found is None or found[1] > self._service.max_body_bytes:
                self._parse(data)
                return
            assert self._known is not None
            start, length = found
            if start + length == len(data):  # the usual case: one whole request, sliced once
                self._take(Request(self._known.head, data[start:]))
                return
            data = data[start:]
            if length:
                self._has_begun = True
                self._body_left = length
            else:
                self._take(Request(self._known.head, b""))

    def _find_known(self, data: bytes) -> tuple[int, int] | None:
        """Where the body starts and how long it is, if `data` begins with a known head."""
        if self._heads is None:
            return None
        if self._known is not None:
            found = self._known.match(data)
            if found is not None:
                return found
        known = self._heads.find(data)
        if known is None:
            return None
        self._known = known
        return known.match(data)

    def _parse(self, data: bytes) -> None:
        """Let llhttp read `data`."""
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        is_start, head_was_pending = not self._has_begun, not self._has_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            self._stop(self._rejection or BadRequestError(str(error)))
        except httptools.HttpParserError as error:
            self._stop(BadRequestError(f"the request is not valid HTTP/1.1: {error}"))
        else:
            if is_start and self._heads is not None:
                self._heads.learn(data)
            if head_was_pending and not self._has_head:
                self._bound_unread_head(len(data))

    # llhttp's side; an exception raised here ends feed_data

    def on_message_begin(self) -> None:
        """llhttp: a request begins."""
        self._reset()
        self._has_begun = True

    def on_url(self, url: bytes) -> None:
        """llhttp: some of the target."""
        self._target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header line, or a trailer (dropped)."""
        self._count_head(len(name) + len(value))
        if not self._has_head:
            self._headers.append((name.lower(), value))
            if len(self._headers) > MAX_HEADERS:
                self._reject(HeadTooLargeError(f"more than {MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete; judge the announced size before the body comes."""
        assert self._parser is not None
        self._has_head = True
        version, num_hosts = self._parser.get_http_version(), 0
        for name, value in self._headers:
            if name == b"host":
                num_hosts += 1
            elif name == b"content-length":
                if int(value) > self._service.max_body_bytes:
                    self._reject(BodyTooLargeError(self._service.max_body_bytes))
            elif name == b"expect":
                if value.lower() == b"100-continue" and self._active is None:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif name == b"transfer-encoding" and (
                # llhttp takes any list that ends in "chunked": what is below would be passed on.
                value.strip(b" ").lower() != b"chunked" or version == "1.0"
            ):
                self._reject(BadRequestError("the only Transfer-Encoding is chunked, in HTTP/1.1"))
        if num_hosts != 1 and (num_hosts or version == "1.1"):
            self._reject(BadRequestError("a request has exactly one Host header"))
        if version not in {"1.0", "1.1"}:
            self._reject(BadRequestError(f"HTTP/{version} is not spoken here; use HTTP/1.1"))

    def on_body(self, data: bytes) -> None:
        """llhttp: some of the body."""
        self._extend_body(data)
        if self._body_bytes > self._service.max_body_bytes:
            self._reject(BodyTooLargeError(self._service.max_body_bytes))

    def on_message_complete(self) -> None:
        """llhttp: a request is complete, or, with an Upgrade header, its head is."""
        assert self._parser is not None
        if not self._parser.should_upgrade():
            request = self._request()
            self._reset()
            self._enqueue(request)

    def _request(self) -> Request:
        """The request that llhttp has read."""
        assert self._parser is not None
        is_http_1_0 = self._parser.get_http_version() == "1.0"
        keep_alive = self._parser.should_keep_alive() and not is_http_1_0
        if not keep_alive:
            self._heads = None  # llhttp judges what a client sends after its last request
        head = RequestHead(
            self._parser.get_method(),
            self._target,
            self._headers,
            keep_alive=keep_alive,
            is_http_1_0=is_http_1_0,
        )
        return Request(head, self._take_body())

    def _take(self, request: Request) -> None:
        """A request that llhttp has not read is complete."""
        try:
            self._enqueue(request)
        except RouterError as error:
            self._stop(error)

    def _reject(self, error: RouterError) -> NoReturn:
        """End `feed_data`; llhttp's wrapper drops what a callback raises."""
        self._rejection = error
        raise error

    def _enqueue(self, request: Request) -> None:
        """Serve `request`, now or after those before it. Raises BadRequestError: too many."""
        if self._active is None and not self._waiting and not self._is_paused:
            self._serve(request)
            return
        self._waiting_bytes += len(request.body)
        if len(self._waiting) >= _MAX_PIPELINED or (
            self._waiting and self._waiting_bytes > self._service.max_body_bytes
        ):
            self._reject(BadRequestError("too many pipelined requests"))
        self._waiting.append(request)

    def _extend_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if len(self._pieces) < _MAX_PIECES:
            self._pieces.append(data)
        else:
            self._tail += data

    def _take_body(self) -> bytes:
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join([*pieces, self._tail])

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serve a request that asks for another protocol as HTTP/1.1 (RFC 9110 §7.8), its last.

        llhttp stops at such a head, so a body of known length is read here. Java's HttpClient
        sends its first request this way.
        """
        self._is_upgrade = True
        lengths = [int(value) for name, value in self._headers if name == b"content-length"]
        if any(name == b"transfer-encoding" for name, _ in self._headers):
            self._stop(BadRequestError("a chunked body cannot come with an Upgrade header"))
        elif lengths and lengths[0]:
            self._body_left = lengths[0]
            self._read_body(rest)
        else:
            self._end_upgraded()

    def _read_body(self, data: bytes) -> bytes:
        """Take the rest of a body of known length; returns what comes after it."""
        piece = data[: self._body_left]
        self._extend_body(piece)
        self._body_left -= len(piece)
        if self._body_left:
            return b""
        if self._is_upgrade:
            self._end_upgraded()
        else:
            assert self._known is not None
            request = Request(self._known.head, self._take_body())
            self._reset()
            self._take(request)
        return data[len(piece) :]

    def _end_upgraded(self) -> None:
        self._is_closing = True
        request = self._request()
        self._reset()
        self._take(request)
        if self.is_idle:
            self.close()

    def _serve_next(self) -> None:
        """Serve the first waiting request, unless the client does not read its answers."""
        if not self._is_paused:
            request = self._waiting.popleft()
            self._waiting_bytes -= len(request.body)
            self._serve(request)

    def _serve(self, request: Request) -> None:
        self._num_served += 1
        exchange = self._service.answer(self, request)
        self._active = exchange
        exchange.start()

    def _stop(self, error: RouterError) -> None:
        """Refuse what was read; after answers that are under way, only stop reading."""
        self._is_closing = True
        if self._active is None and not self._waiting:
            self.refuse(error)

    def _bound_unread_head(self, num_bytes: int) -> None:
        """Bound a header line that does not end: llhttp tells of it only when it does."""
        self._unread_head_bytes += num_bytes
        if self._unread_head_bytes > MAX_HEAD_BYTES + READ_BYTES:
            self._stop(HeadTooLargeError(f"the request head exceeds {MAX_HEAD_BYTES} bytes"))

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._reject(HeadTooLargeError(f"the request head exceeds {MAX_HEAD_BYTES} bytes"))

    def _reset(self) -> None:
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._unread_head_bytes = 0
        self._has_begun = False
        self._has_head = False
        self._pieces: list[bytes] = []
        self._tail = bytearray()  # what comes after _MAX_PIECES pieces
        self._body_bytes = 0


def _num_unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes in the kernel that the client has not taken; 0 where the system does not tell.

    A kernel asks for more only when a third of its buffer, which grows to megabytes, is free: a
    client that reads steadily but slowly would look as if it had stopped.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
