"""When a refused client should come back: an estimate from the queue and the recent speed.

    seconds = (waiting / 2 + 1) / (requests that ended per second, of the last 64)

That is when half of those waiting now have been taken. Earlier, a full queue would mostly refuse
again; the whole queue's time would leave places empty. The rate falls while nothing ends, so a
stuck engine is asked less and less often. Between 1 and 60 seconds.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Final

LEAST_S: Final = 1
MOST_S: Final = 60

_NUM_REMEMBERED: Final = 64


class EndRate:
    """Remembers when requests ended. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def note(self, now: float) -> None:
        """A request ended."""
        self._ends.append(now)

    def retry_after_s(self, num_waiting: int, now: float) -> int:
        """Whole seconds; the least where too little has been seen to tell."""
        if len(self._ends) < 2:
            return LEAST_S
        elapsed_s = now - self._ends[0]
        estimate = (num_waiting / 2 + 1) * elapsed_s / (len(self._ends) - 1)
        return min(MOST_S, max(LEAST_S, ceil(estimate)))
