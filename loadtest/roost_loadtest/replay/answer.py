"""What a streamed answer tells while it comes, read no further than needed. Pure.

Only its first token, its last piece and its end are looked at. An answer is whole with a finish
reason and `[DONE]`; whatever the status was, anything less is one that was cut.
"""

from __future__ import annotations

import re

import msgspec

#: Of a finish reason, usage and [DONE] at a stream's end.
_TAIL_BYTES = 2048
_TOKEN = re.compile(rb'"(?:content|text|reasoning_content)": ?"[^"]')
_FINISH = re.compile(rb'"finish_reason": ?"')


class Usage(msgspec.Struct, frozen=True):
    """In tokens; 0 where the server does not tell."""

    prompt: int
    cached: int
    output: int


class Answer:
    """A streamed answer on its way. Moments are whatever clock its owner has."""

    __slots__ = ("_tail", "first_s", "last_s")

    def __init__(self) -> None:
        self.first_s: float | None = None  # its first token
        self.last_s: float | None = None  # its last piece so far
        self._tail = b""

    def feed(self, data: bytes, now: float) -> None:
        """The next piece of the body, cut anywhere. O(its bytes)."""
        seen = self._tail + data
        if self.first_s is None and _TOKEN.search(seen):
            self.first_s = now
        self.last_s = now
        self._tail = seen[-_TAIL_BYTES:]

    @property
    def is_whole(self) -> bool:
        """Whether it ended as it must."""
        return b"data: [DONE]" in self._tail and _FINISH.search(self._tail) is not None

    @property
    def usage(self) -> Usage:
        """What it cost, as its end says."""
        return Usage(*(_last(name, self._tail) for name in _COUNTS))

    @property
    def excerpt(self) -> str:
        """Its end, or all of a short one, for error messages."""
        return self._tail[-200:].decode(errors="replace")


_COUNTS = [
    re.compile(rb'"%b": ?(\d+)' % name)
    for name in (b"prompt_tokens", b"cached_tokens", b"completion_tokens")
]


def _last(pattern: re.Pattern[bytes], tail: bytes) -> int:
    found = pattern.findall(tail)
    return int(found[-1]) if found else 0
