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
REQUEST_ID = names.REQUEST_ID.encode()
#: Between the router and a replica of ours (roost_wire/resume.py); they never pass.
RESUMABLE = resume.RESUMABLE.encode()
SEED = resume.SEED.encode()
REQUEST_TIMEOUT = names.REQUEST_TIMEOUT.encode()
#: How often the client's SDK (OpenAI's, Anthropic's) has tried this request before.
RETRY_COUNT = b"x-stainless-retry-count"
#: Set by the router itself; a replica's or client's own value never passes as ours.
_OURS = frozenset(
    {REPLICA, MATCHED_TOKENS, CACHED_TOKENS, PROMPT_TOKENS, ATTEMPTS, REQUEST_ID, RESUMABLE, SEED}
)
_ENDS_HERE = _HOP_BY_HOP | _OURS
_REQUEST_ID = re.compile(names.REQUEST_ID_PATTERN.encode())


class RequestHead:
    """A client's request line and headers, and what follows from them alone.

    Without Content-Length: that is the body's. Known heads are shared between requests and connections: nothing here may be changed.
    """

    __slots__ = (
        "content_encoding",
        "headers",
        "is_http_1_0",
        "keep_alive",
        "lines",
        "method",
        "path",
        "request_id",
        "target",
    )

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        *,
        keep_alive: bool = True,
        is_http_1_0: bool = False,
    ) -> None:
        self.method = method
        self.target = _origin_form(target)  # path and query
        self.path = self.target.partition(b"?")[0]
        self.headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.keep_alive = keep_alive  # never for HTTP/1.0
        self.is_http_1_0 = is_http_1_0  # cannot read a chunked answer
        given = get_header(headers, REQUEST_ID)
        self.request_id = given if valid_request_id(given) else None
        self.content_encoding = get_header(headers, b"content-encoding")
        self.lines = head_lines(to_replica(headers))  # what passes on


class ResponseHead:
    """A replica's status and headers, and what follows from them alone.

    Without Content-Length, as in RequestHead, and shared as well: never to be changed.
    """

    __slots__ = ("cached_tokens", "content_type", "headers", "lines", "prompt_tokens", "status")

    def __init__(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.content_type = get_header(headers, b"content-type") or b""
        self.prompt_tokens = _count(get_header(headers, PROMPT_TOKENS))
        self.cached_tokens = _count(get_header(headers, CACHED_TOKENS))
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


def request_head(
    *, method: bytes, target: bytes, host: bytes, headers: Headers, body_bytes: int
) -> bytes:
    """A request head as it goes to a replica, blank line included."""
    lines = [method + b" " + target + b" HTTP/1.1", b"host: " + host]
    lines.extend(key + b": " + value for key, value in headers)
    lines.append(b"content-length: %d\r\n\r\n" % body_bytes)
    return b"\r\n".join(lines)


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


def _count(value: bytes | None) -> int | None:
    """A token count that a replica states in a header, or None."""
    return int(value) if value is not None and value.isdigit() and len(value) < 10 else None


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Unknown"
