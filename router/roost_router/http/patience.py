"""How long a client's connection may take for what it is at. Pure.

    waiting for        ends after                      counted from
    FIRST  a request   head_timeout_s                  the connection's start
    IDLE   the next    keepalive_s                     the end of the answer before
    HEAD   its end     head_timeout_s                  its first byte, however many follow
    BODY   its end     body_stall_s                    its last byte
                       body_stall_s + bytes / 512/s    its start: a trickle is no progress
    WRITE  the client  write_stall_s                   the last byte that it took
    LINGER its end     LINGER_S                        our last answer, see Downstream.refuse
    ANSWER a replica   never: deadlines are the exchange's

No connection has a timer. The service shows each connection's state to its `Patience` about once
a second; what did not change between two looks has waited since the first of them. So a limit is
kept to a second, never early, and a busy connection pays nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, Protocol

LINGER_S: Final = 2.0
#: nginx, Apache (mod_reqtimeout) and IIS ask for 240 to 500 bytes a second.
MIN_BODY_BYTES_PER_S: Final = 512


class Limits(Protocol):
    """Options of the router that bound connections, in seconds."""

    @property
    def head_timeout_s(self) -> float: ...  # noqa: D102

    @property
    def keepalive_s(self) -> float: ...  # noqa: D102

    @property
    def body_stall_s(self) -> float: ...  # noqa: D102

    @property
    def write_stall_s(self) -> float: ...  # noqa: D102


class For(Enum):
    """What a connection waits for."""

    FIRST = "first request"
    IDLE = "next request"
    HEAD = "request head"
    BODY = "request body"
    WRITE = "client to read"
    LINGER = "client to close"
    ANSWER = "answer"


class Waiting(NamedTuple):
    """A connection's state at one look."""

    what: For
    num_served: int  # requests before: tells one wait from the next of its kind
    num_bytes: int  # that came or went in this wait, where they count as progress


class Patience:
    """What one connection has been waiting for, and since when."""

    __slots__ = ("_moved_at", "_since", "_waiting")

    def __init__(self) -> None:
        self._waiting: Waiting | None = None
        self._since = self._moved_at = 0.0

    def is_over(self, waiting: Waiting, limits: Limits, now: float) -> bool:
        """Whether `waiting` has lasted too long. O(1)."""
        before = self._waiting
        if before != waiting:
            self._waiting = waiting
            self._moved_at = now
            if before is None or before[:2] != waiting[:2]:
                self._since = now
        waited_s = now - self._moved_at
        match waiting.what:
            case For.ANSWER:
                return False
            case For.BODY:
                due_s = limits.body_stall_s + waiting.num_bytes / MIN_BODY_BYTES_PER_S
                return waited_s >= limits.body_stall_s or now - self._since >= due_s
            case For.WRITE:
                return waited_s >= limits.write_stall_s
            case For.IDLE:
                return waited_s >= limits.keepalive_s
            case For.LINGER:
                return waited_s >= LINGER_S
            case For.FIRST | For.HEAD:
                return waited_s >= limits.head_timeout_s
