"""A client's connection: read requests, hand them over one at a time, write answers.

Knows HTTP/1.1 and its limits, decides nothing else. Any malformed byte answers 400 and closes:
after it, nobody can know where the next request begins. Requests that a client pipelines wait
in order, within bounds; reading never pauses while one is served, for a paused socket cannot
tell that its client has left. While the client's own buffer is full, none is served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import httptools
import msgspec

from roost_router.errors import BadRequestError, BodyTooLargeError, RouterError
from roost_router.http.head import MAX_HEAD_BYTES, READ_BYTES, Headers, response_head

MAX_HEADERS = 128
#: Requests that may wait behind the one being served; their bodies together may be as large as
#: one body.
_MAX_PIPELINED = 64


class Request(msgspec.Struct):
    """One request as it was read."""

    method: bytes
    target: bytes  # path and query, as sent
    headers: Headers
    body: bytes
    keep_alive: bool  # never for HTTP/1.0
    is_http_1_0: bool  # cannot read a chunked answer


class Answering(Protocol):
    """A request being served."""

    def start(self) -> None:
        """Begin; ends with `Downstream.finish`."""
        ...

    def client_gone(self) -> None:
        """Stop: nobody will read the answer."""
        ...

    def pause(self) -> None:
        """The client's buffer is full."""
        ...

    def resume(self) -> None:
        """The client's buffer has room again."""
        ...


class Service(Protocol):
    """What a connection needs of the router."""

    max_body_bytes: int
    is_draining: bool

    def opened(self, client: Downstream) -> None:
        """A client connected."""
        ...

    def closed(self, client: Downstream) -> None:
        """A client is gone."""
        ...

    def answer(self, client: Downstream, request: Request) -> Answering:
        """Make the exchange that will serve `request`."""
        ...


class Downstream(asyncio.Protocol):
    """One connection from a client."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._active: Answering | None = None
        self._body: bytes | bytearray = b""
        self._is_closing = False  # no further request is read
        self._is_paused = False  # the client does not read what was written
        self._waiting_bytes = 0  # bodies of waiting requests
        self._body_left = 0  # bytes of a body that llhttp does not read, see _ignore_upgrade
        self._reset()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being served, waiting, or half read."""
        return self._active is None and not self._waiting and not self._has_begun

    def write(self, data: bytes) -> None:
        """Send bytes of the answer."""
        if self._transport is not None:
            self._transport.write(data)

    def finish(self, *, keep_alive: bool) -> None:
        """The answer is complete; serve the next request or close."""
        self._active = None
        if not keep_alive or self._service.is_draining:
            self.close()
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

    def refuse(self, error: RouterError) -> None:
        """Answer an error outside any exchange, and close."""
        self._is_closing = True
        body = error.body()
        headers = [(b"content-type", b"application/json")]
        framing = [b"content-length: %d" % len(body)]
        self.write(response_head(error.status, headers, framing=framing, keep_alive=False) + body)
        self.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: a client connected."""
        self._transport = transport  # type: ignore[assignment]
        self._service.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """asyncio: the client is gone."""
        self._transport = None
        self._is_closing = True
        self._service.closed(self)
        self._waiting.clear()
        active, self._active = self._active, None
        if active is not None:
            active.client_gone()

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
        if self._is_closing:
            return
        if self._body_left:
            self._read_body(data)
            return
        head_was_pending = not self._has_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._stop(cause if isinstance(cause, RouterError) else BadRequestError(str(error)))
        except httptools.HttpParserError as error:
            self._stop(BadRequestError(f"the request is not valid HTTP/1.1: {error}"))
        else:
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
                raise HeadTooLargeError(f"more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete; judge the announced size before the body comes."""
        self._has_head = True
        version, num_hosts = self._parser.get_http_version(), 0
        for name, value in self._headers:
            if name == b"host":
                num_hosts += 1
            elif name == b"content-length":
                if int(value) > self._service.max_body_bytes:
                    raise BodyTooLargeError(self._service.max_body_bytes)
            elif name == b"expect":
                if value.lower() == b"100-continue" and self._active is None:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif name == b"transfer-encoding" and version == "1.0":
                raise BadRequestError("HTTP/1.0 has no chunked bodies")
        if num_hosts != 1 and (num_hosts or version == "1.1"):
            raise BadRequestError("a request has exactly one Host header")
        if version not in {"1.0", "1.1"}:
            raise BadRequestError(f"HTTP/{version} is not spoken here; use HTTP/1.1")

    def on_body(self, data: bytes) -> None:
        """llhttp: some of the body."""
        if len(self._body) + len(data) > self._service.max_body_bytes:
            raise BodyTooLargeError(self._service.max_body_bytes)
        self._extend_body(data)

    def on_message_complete(self) -> None:
        """llhttp: a request is complete, or, with an Upgrade header, its head is."""
        if self._parser.should_upgrade():
            return
        self._enqueue()

    def _enqueue(self) -> None:
        self._waiting_bytes += len(self._body)
        if len(self._waiting) >= _MAX_PIPELINED or (
            self._waiting and self._waiting_bytes > self._service.max_body_bytes
        ):
            raise BadRequestError("too many pipelined requests")
        is_http_1_0 = self._parser.get_http_version() == "1.0"
        request = Request(
            method=self._parser.get_method(),
            target=_origin_form(self._target),
            headers=self._headers,
            body=bytes(self._body),
            keep_alive=self._parser.should_keep_alive() and not is_http_1_0,
            is_http_1_0=is_http_1_0,
        )
        self._waiting.append(request)
        self._reset()
        if self._active is None:
            self._serve_next()

    def _extend_body(self, data: bytes) -> None:
        if not self._body:
            self._body = data  # the usual case: one piece, never copied
        elif isinstance(self._body, bytearray):
            self._body += data
        else:
            self._body = bytearray(self._body + data)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serve a request that asks for another protocol as HTTP/1.1 (RFC 9110 §7.8), its last.

        llhttp stops at such a head, so a body of known length is read here. Java's HttpClient
        sends its first request this way.
        """
        lengths = [int(value) for name, value in self._headers if name == b"content-length"]
        if any(name == b"transfer-encoding" for name, _ in self._headers):
            self._stop(BadRequestError("a chunked body cannot come with an Upgrade header"))
        elif lengths and lengths[0]:
            self._body_left = lengths[0]
            self._read_body(rest)
        else:
            self._end_upgraded()

    def _read_body(self, data: bytes) -> None:
        piece = data[: self._body_left]
        self._extend_body(piece)
        self._body_left -= len(piece)
        if not self._body_left:
            self._end_upgraded()

    def _end_upgraded(self) -> None:
        self._is_closing = True
        try:
            self._enqueue()
        except RouterError as error:
            self._stop(error)
        if self.is_idle:
            self.close()

    def _serve_next(self) -> None:
        """Serve the first waiting request, unless the client does not read its answers."""
        if self._is_paused:
            return
        request = self._waiting.popleft()
        self._waiting_bytes -= len(request.body)
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
            raise HeadTooLargeError(f"the request head exceeds {MAX_HEAD_BYTES} bytes")

    def _reset(self) -> None:
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._unread_head_bytes = 0
        self._has_begun = False
        self._has_head = False
        self._body = b""


class HeadTooLargeError(BadRequestError):
    """Too many or too long header lines."""

    status = 431
    code = "head_too_large"


def _origin_form(target: bytes) -> bytes:
    """Path and query of a target that may name scheme and host as well (RFC 9112 §3.2.2)."""
    if target.startswith((b"http://", b"https://")):
        _, slash, path = target.partition(b"://")[2].partition(b"/")
        return slash + path or b"/"
    return target
