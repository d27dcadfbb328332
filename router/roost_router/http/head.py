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
#: Set by the router itself; a replica's or client's own value never passes as ours.
_OURS = frozenset({REPLICA, MATCHED_TOKENS, CACHED_TOKENS, PROMPT_TOKENS, ATTEMPTS, REQUEST_ID})
_ENDS_HERE = _HOP_BY_HOP | _OURS
_REQUEST_ID = re.compile(names.REQUEST_ID_PATTERN.encode())


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


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Unknown"
