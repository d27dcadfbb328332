"""Heads of requests and responses: which headers pass, and how a head is written. Pure.

Both directions are rebuilt rather than copied: framing (Content-Length, Transfer-Encoding) is
ours, hop-by-hop headers end here, and so does whatever the Connection header names (RFC 9110
§7.6.1). Headers with an underscore are dropped: WSGI-like servers read `Content_Length` as
Content-Length, a known way to smuggle a request. Everything else passes unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from roost_wire import headers as names
from roost_wire import resume
from roost_wire.told_load import ToldLoad, read_header

#: Longest head taken from either side: aiohttp's and nginx's limits are of this order.
MAX_HEAD_BYTES = 64 * 1024
#: The most that one read may bring (uvloop's buffer).
READ_BYTES = 256 * 1024

Headers = list[tuple[bytes, bytes]]  # names in lower case, in order of arrival

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
REPLICA = names.REPLICA.encode()
MATCHED_TOKENS = names.MATCHED_TOKENS.encode()
CACHED_TOKENS = names.CACHED_TOKENS.encode()
PROMPT_TOKENS = names.PROMPT_TOKENS.encode()
ATTEMPTS = names.ATTEMPTS.encode()
LOAD = names.LOAD.encode()
REQUEST_ID = names.REQUEST_ID.encode()
#: Between the router and a replica of ours (roost_wire/resume.py); they never pass.
RESUMABLE = resume.RESUMABLE.encode()
SEED = resume.SEED.encode()
REQUEST_TIMEOUT = names.REQUEST_TIMEOUT.encode()
#: How often the client's SDK (OpenAI's, Anthropic's) has tried this request before.
RETRY_COUNT = b"x-stainless-retry-count"
#: Set by the router itself; a replica's or client's own value never passes as ours.
_OURS = frozenset(
    {
        REPLICA,
        MATCHED_TOKENS,
        CACHED_TOKENS,
        PROMPT_TOKENS,
        ATTEMPTS,
        LOAD,
        REQUEST_ID,
        RESUMABLE,
        SEED,
    }
)
_ENDS_HERE = _HOP_BY_HOP | _OURS
_REQUEST_ID = re.compile(names.REQUEST_ID_PATTERN.encode())
_REPLICA_HEAD = (
    b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b" + REQUEST_ID + b": %b\r\n%bcontent-length: %d\r\n\r\n"
)
_RESUMABLE_LINE = RESUMABLE + b": 1\r\n"
_CLIENT_HEAD = b"".join(
    (
        b"HTTP/1.1 %d %b\r\n%b",
        REQUEST_ID + b": %b\r\n",
        REPLICA + b": %b\r\n",
        MATCHED_TOKENS + b": %d\r\n",
        ATTEMPTS + b": %d\r\n%b\r\n",
    )
)


class RequestHead:
    """A client's request line and headers, and what follows from them alone.

    Without Content-Length: that is the body's. Known heads are shared between requests and
    connections: nothing here may be changed.
    """

    __slots__ = (
        "content_encoding",
        "headers",
        "is_http_1_0",
        "is_retry",
        "keep_alive",
        "lines",
        "method",
        "path",
        "request_id",
        "target",
        "tenant",
        "timeout",
    )

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        *,
        keep_alive: bool = True,
        is_http_1_0: bool = False,
        tenant: str = "",
    ) -> None:
        """`tenant`: whose key it came with; "" where none is asked for."""
        self.method = method
        self.tenant = tenant
        self.target = _origin_form(target)  # path and query
        self.path = self.target.partition(b"?")[0]
        self.headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.keep_alive = keep_alive  # never for HTTP/1.0
        self.is_http_1_0 = is_http_1_0  # cannot read a chunked answer
        given = get_header(headers, REQUEST_ID)
        self.request_id = given if valid_request_id(given) else None
        self.content_encoding = get_header(headers, b"content-encoding")
        self.is_retry = get_header(headers, RETRY_COUNT) not in {None, b"0"}
        self.timeout = get_header(headers, REQUEST_TIMEOUT)
        self.lines = head_lines(to_replica(headers))  # what passes on


class ResponseHead:
    """A replica's status and headers, and what follows from them alone.

    Without Content-Length, as in RequestHead, and shared as well: never to be changed.
    """

    __slots__ = (
        "cached_tokens",
        "headers",
        "is_stream",
        "lines",
        "load",
        "prompt_tokens",
        "seed",
        "status",
    )

    def __init__(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = [pair for pair in headers if pair[0] != b"content-length"]
        content_type = get_header(headers, b"content-type") or b""
        self.is_stream = content_type.startswith(b"text/event-stream")
        self.prompt_tokens = _number(get_header(headers, PROMPT_TOKENS), 9)
        self.cached_tokens = _number(get_header(headers, CACHED_TOKENS), 9)
        self.seed = _number(get_header(headers, SEED), 20)
        load = get_header(headers, LOAD)
        self.load: ToldLoad | None = None if load is None else read_header(load)
        self.lines = head_lines(to_client(headers))  # what passes on


def get_header(headers: Headers, name: bytes) -> bytes | None:
    """First value of `name` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def valid_request_id(value: bytes | None) -> bool:
    """Whether a client's x-request-id is taken over: 1 to 128 visible ASCII characters."""
    return value is not None and _REQUEST_ID.fullmatch(value) is not None


def to_replica(headers: Headers) -> Headers:
    """The client's headers that pass on.

    Accept-Encoding does not: the router reads what comes back, and token streams gain nothing.
    """
    return [pair for pair in to_client(headers) if pair[0] != b"accept-encoding"]


def to_client(headers: Headers) -> Headers:
    """The headers that pass on: neither hop-by-hop, nor nominated, nor with an underscore."""
    drop = _ENDS_HERE
    connection = get_header(headers, b"connection")
    if connection is not None and connection.lower() not in {b"keep-alive", b"close"}:
        for key, value in headers:
            if key == b"connection":
                drop |= {token.strip().lower() for token in value.split(b",")}
    return [pair for pair in headers if pair[0] not in drop and b"_" not in pair[0]]


def head_lines(headers: Headers) -> bytes:
    """Header lines as they stand in a head, each with its line end."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def replica_head(
    head: RequestHead,
    *,
    base_path: bytes,
    host: bytes,
    request_id: bytes,
    is_resumable: bool,
    body_bytes: int,
) -> bytes:
    """A request's head as it goes to a replica, blank line included."""
    return _REPLICA_HEAD % (
        head.method,
        base_path,
        head.target,
        host,
        head.lines,
        request_id,
        _RESUMABLE_LINE if is_resumable else b"",
        body_bytes,
    )


def client_head(
    head: ResponseHead,
    *,
    request_id: bytes,
    replica: bytes,
    matched_tokens: int,
    attempts: int,
    cached_tokens: int | None,
    framing: bytes,
    keep_alive: bool,
) -> bytes:
    """A replica's head as it goes to the client. `framing`: whole header lines with their ends."""
    if cached_tokens is not None:
        framing = b"%b: %d\r\n%b" % (CACHED_TOKENS, cached_tokens, framing)
    if not keep_alive:
        framing += b"connection: close\r\n"
    return _CLIENT_HEAD % (
        head.status,
        _reason(head.status),
        head.lines,
        request_id,
        replica,
        matched_tokens,
        attempts,
        framing,
    )


def response_head(
    status: int, headers: Headers, *, framing: Iterable[bytes], keep_alive: bool
) -> bytes:
    """A response head as it goes to the client. `framing`: whole header lines, if any."""
    lines = [b"HTTP/1.1 %d %s" % (status, _reason(status))]
    lines.extend(key + b": " + value for key, value in headers)
    lines.extend(framing)
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _origin_form(target: bytes) -> bytes:
    """Path and query of a target that may name scheme and host as well (RFC 9112 §3.2.2)."""
    if target.startswith((b"http://", b"https://")):
        _, slash, path = target.partition(b"://")[2].partition(b"/")
        return slash + path or b"/"
    return target


def _number(value: bytes | None, max_digits: int) -> int | None:
    """A number that a replica states in a header, or None."""
    if value is None or len(value) > max_digits or not value.removeprefix(b"-").isdigit():
        return None
    return int(value)


def _reason(status: int) -> bytes:
    if status == 200:
        return b"OK"
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Unknown"
