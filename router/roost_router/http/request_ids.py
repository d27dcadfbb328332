"""Request ids: 128 random bits each, drawn many at a time. Pure.

One system call a request would cost more than writing the whole head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

_ID_BYTES: Final = 16
_NUM_DRAWN: Final = 256


class RequestIds:
    """Makes ids for requests that came without a usable one."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._ids: Iterator[bytes] = iter(())

    def next(self) -> bytes:
        """A fresh id: "req-" and 32 hexadecimal digits."""
        for request_id in self._ids:
            return request_id
        drawn = self._random_bytes(_ID_BYTES * _NUM_DRAWN).hex().encode()
        step = 2 * _ID_BYTES
        self._ids = iter([b"req-" + drawn[at : at + step] for at in range(0, len(drawn), step)])
        return next(self._ids)
