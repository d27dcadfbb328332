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
#: Set by the router itself; a replica's or client's own value never passes as ours.
_OURS = frozenset(
    name.encode()
    for name in (
        names.REPLICA,
        names.MATCHED_TOKENS,
        names.CACHED_TOKENS,
        names.PROMPT_TOKENS,
        names.ATTEMPTS,
        names.REQUEST_ID,
    )
)
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def get_header(headers: Headers, name: str) -> bytes | None:
    """First value of `name` (lower case), or None."""
    wanted = name.encode()
    for key, value in headers:
        if key == wanted:
            return value
    return None


def valid_request_id(value: bytes | None) -> bool:
    """Whether a client's x-request-id is taken over: 1 to 128 visible ASCII characters."""
    return value is not None and _REQUEST_ID.fullmatch(value) is not None


def to_replica(headers: Headers) -> Headers:
    """The client's headers that pass on.

    Accept-Encoding does not: the router reads what comes back, and token streams gain nothing.
    """
    return [(key, value) for key, value in to_client(headers) if key != b"accept-encoding"]


def to_client(headers: Headers) -> Headers:
    """The headers that pass on: neither hop-by-hop, nor nominated, nor with an underscore."""
    drop = _HOP_BY_HOP | _OURS
    for key, value in headers:
        if key == b"connection":
            drop |= {token.strip().lower() for token in value.split(b",")}
    return [(key, value) for key, value in headers if key not in drop and b"_" not in key]


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
