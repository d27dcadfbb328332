"""What may go wrong with one answer of a replica, or with its whole host."""

from __future__ import annotations

from enum import Enum
from random import Random

import msgspec


class Kind(Enum):
    """How an answer ends or is held up."""

    NONE = "none"
    # before the head
    RESET_EARLY = "reset before the head"
    CLOSE_EARLY = "close before the head"
    HANG_EARLY = "hang before the head"
    STATUS = "an error status"
    BAD_HEAD = "a head that is not HTTP"
    # in the middle of the answer
    RESET = "reset"
    CLOSE = "close"
    CLEAN_END = "clean end"
    DONE_EARLY = "[DONE] too early"
    ERROR_EVENT = "error event"
    HANG = "hang"
    STALL = "stall"
    BAD_CHUNK = "a chunk that is none"
    # of the host
    FREEZE = "freeze"
    KILL = "kill"
    VANISH = "network gone"
    # harmless
    INTERIM = "an interim answer first"
    EXCESS = "bytes after the end"
    LAST = "connection: close"


BEFORE_HEAD = (
    Kind.RESET_EARLY,
    Kind.CLOSE_EARLY,
    Kind.HANG_EARLY,
    Kind.STATUS,
    Kind.BAD_HEAD,
)
MID_STREAM = (
    Kind.RESET,
    Kind.CLOSE,
    Kind.CLEAN_END,
    Kind.DONE_EARLY,
    Kind.ERROR_EVENT,
    Kind.HANG,
    Kind.BAD_CHUNK,
)
OF_HOST = (Kind.FREEZE, Kind.KILL, Kind.VANISH)
HARMLESS = (Kind.INTERIM, Kind.EXCESS, Kind.LAST, Kind.STALL)

STATUSES = (429, 500, 502, 503, 504)

BAD_HEADS = (
    b"HTTP/1.1 2xx OK\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
    b"\x00\x01\x02\x03",
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 400_000 + b"\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
)


class Fault(msgspec.Struct, frozen=True):
    """One fault of one answer."""

    kind: Kind = Kind.NONE
    #: Where in the answer's parts, 0 to 1.
    place: float = 0.0
    #: Whether the last part before it is only half sent.
    is_inside_part: bool = False
    status: int = 500
    #: For what comes to an end: a stall, a freeze, the time until a killed process is back.
    duration_s: float = 0.0
    #: Variant where a kind has several.
    variant: int = 0


NO_FAULT = Fault()


def draw(rng: Random, kinds: tuple[Kind, ...], *, duration_s: float = 5.0) -> Fault:
    """A fault of one of `kinds`."""
    return Fault(
        kind=rng.choice(kinds),
        place=rng.random(),
        is_inside_part=rng.random() < 0.4,
        status=rng.choice(STATUSES),
        duration_s=duration_s * (0.1 + 0.9 * rng.random()),
        variant=rng.randrange(len(BAD_HEADS)),
    )
