"""Stamps that order what all routers of a cluster do. Pure.

    stamp = microseconds since 1970 << 10 | the router's number

A stamp is greater than all that were made or seen before (a hybrid logical clock, Kulkarni et al.
2014): clocks that differ by milliseconds shift the order of prompts in the cluster by as much, and
never that of a prompt and what was placed because of it.
"""

from __future__ import annotations

from typing import Final

NUMBER_BITS: Final = 10
#: Above every stamp until the year 2109.
NEVER: Final = 1 << 62
_US: Final = 1e6


class Stamps:
    """One router's."""

    def __init__(self, number: int = 0, unix_at_zero: float = 0.0) -> None:
        """`number`: told apart from other routers by its last bits. `unix_at_zero`: seconds since
        1970 when `now` is 0; it matters only beside other routers.
        """
        self._number: Final = number & ((1 << NUMBER_BITS) - 1)
        self._unix_at_zero: Final = unix_at_zero
        self._last = 0  # without the number

    def next(self, now: float) -> int:
        """A stamp greater than all others that are known."""
        at = int((now + self._unix_at_zero) * _US)
        self._last = last = at if at > self._last else self._last + 1
        return last << NUMBER_BITS | self._number

    def saw(self, stamp: int) -> None:
        """Another router made this one. What cannot be a stamp is ignored."""
        at = stamp >> NUMBER_BITS
        if self._last < at < NEVER >> NUMBER_BITS:
            self._last = at
