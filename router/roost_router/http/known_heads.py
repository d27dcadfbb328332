"""Heads that were read before: llhttp reads a head once, its repetitions are recognised. Pure.

On a kept connection a client's head repeats byte for byte, except for the digits of its
Content-Length; so do a replica's. Reading it anew costs two dozen callbacks. Instead, the bytes
before and after the digits are compared with those of a head that llhttp has accepted.

Why this is as strict as llhttp. A head becomes known only when

 1. the ordinary path has accepted two messages that began with it, each at the boundary of a
    message, and
 2. a fresh llhttp parser, given this head alone with the digit 1, finds that it ends at its last
    byte, not before; that it has one Content-Length, which is the digit at our place, and no
    Transfer-Encoding, Upgrade or Expect; that it is HTTP/1.1 and keeps the connection.

llhttp is a state machine: between the same bytes on either side, digits lead it to the same
states, and only the number differs. So the same head with other digits parses the same, with
that number. Ten digits at most are taken, far from an overflow. Everything else, a byte more or
less, another spelling, a chunked body, goes to llhttp. Both paths stand at the boundary of a
message when they hand over, where llhttp keeps no memory of the messages before.

Memory: at most `_MAX_KNOWN` heads of at most MAX_KNOWN_BYTES, shared by all connections.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar

import httptools

from roost_router.http.head import Headers, RequestHead, ResponseHead

#: Longer heads are read by llhttp every time.
MAX_KNOWN_BYTES = 4096
_MAX_KNOWN = 512
#: Heads seen once. A head that differs with every request (a trace id) never gets further.
_MAX_SEEN = 1024
_MAX_DIGITS = 10
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,10})\r\n", re.IGNORECASE)
#: Their presence changes what follows the head, or what is owed before it.
_NEVER = frozenset({b"transfer-encoding", b"upgrade", b"expect"})

Head = TypeVar("Head")


class KnownHead(Generic[Head]):
    """One head: all its bytes but the digits, and what it says."""

    __slots__ = ("_after", "_before", "_digits_at", "_fixed_bytes", "head")

    def __init__(self, before: bytes, after: bytes, head: Head) -> None:
        self._before = before
        self._after = after
        self._digits_at = len(before)
        self._fixed_bytes = len(before) + len(after)
        self.head = head

    def match(self, data: bytes) -> tuple[int, int] | None:
        """If `data` begins with this head: where its body starts, and its Content-Length."""
        if not data.startswith(self._before):
            return None
        at = self._digits_at
        end = data.find(b"\r", at, at + _MAX_DIGITS + 1)
        if not data.startswith(self._after, end):
            return None
        digits = data[at:end]
        if not digits.isdigit():  # bytes: ASCII only, and not empty
            return None
        return self._fixed_bytes + end - at, int(digits)


class KnownHeads(Generic[Head]):
    """The heads that repeat, of all clients or of one replica."""

    def __init__(self, read: Callable[[bytes], Head | None]) -> None:
        self._read = read  # a whole head, read in isolation; None: not to be known
        self._known: dict[tuple[bytes, bytes], KnownHead[Head] | None] = {}  # None: never known
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, data: bytes) -> KnownHead[Head] | None:
        """The known head that `data` begins with. O(head)."""
        cut = _cut(data)
        return self._known.get(cut) if cut is not None else None

    def learn(self, data: bytes) -> None:
        """llhttp accepted a message that begins with `data`, at the boundary of a message."""
        cut = _cut(data)
        if cut is None or cut in self._known:
            return
        fingerprint = hash(cut)
        if fingerprint not in self._seen:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen.add(fingerprint)
            return
        before, after = cut
        head = self._read(before + b"1" + after)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()  # connections keep the one they use
        self._known[cut] = None if head is None else KnownHead(before, after, head)


def _cut(data: bytes) -> tuple[bytes, bytes] | None:
    """The head at the start of `data`, before and after the digits of its Content-Length."""
    end = data.find(b"\r\n\r\n", 0, MAX_KNOWN_BYTES)
    if end < 0:
        return None
    found = _LENGTH.search(data, 0, end + 2)
    if found is None:
        return None
    start, stop = found.span(1)
    return data[:start], data[stop : end + 4]


class _Collector:
    """Listens to a fresh parser."""

    parser: httptools.HttpRequestParser | httptools.HttpResponseParser

    def __init__(self) -> None:
        self.target = b""
        self.headers: Headers = []
        self.heard = ""  # H: the head is complete, E: the message is
        self.keep_alive = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.heard += "H"

    def on_message_complete(self) -> None:
        self.heard += "E"
        self.keep_alive = self.parser.should_keep_alive()  # llhttp forgets it after this


def read_known_request(data: bytes) -> RequestHead | None:
    """Read `data`, a request's head with Content-Length 1, in isolation."""
    collector = _Collector()
    parser = collector.parser = httptools.HttpRequestParser(collector)
    if not _is_plain(collector, data):
        return None
    return RequestHead(parser.get_method(), collector.target, collector.headers)


def read_known_response(data: bytes) -> ResponseHead | None:
    """Read `data`, the head of a replica's 200 with Content-Length 1, in isolation."""
    collector = _Collector()
    parser = collector.parser = httptools.HttpResponseParser(collector)
    if not _is_plain(collector, data) or parser.get_status_code() != 200:
        return None
    return ResponseHead(200, collector.headers)


def _is_plain(collector: _Collector, data: bytes) -> bool:
    """Whether `data` is exactly one head, of a kind that may be known."""
    parser = collector.parser
    heard = []
    try:
        for piece in (data[:-1], data[-1:], b"x"):
            parser.feed_data(piece)
            heard.append(collector.heard)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return False
    lengths = [value for name, value in collector.headers if name == b"content-length"]
    return (
        heard == ["", "H", "HE"]
        and collector.keep_alive
        and parser.get_http_version() == "1.1"
        and lengths == [b"1"]
        and not any(name in _NEVER for name, _ in collector.headers)
    )
