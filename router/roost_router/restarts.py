"""When a worker that ended is started again. Pure.

At once, if it had served for a while. One that keeps ending early waits longer each time, so that a
defect in the start does not use the machine up:

    delay = 0, 0.1, 0.2, 0.4, … MAX_DELAY_S
"""

from __future__ import annotations

#: A worker that lived for so many seconds did not fail in its start.
STEADY_S = 10.0
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0


class Backoff:
    """The deaths of one slot's workers."""

    def __init__(self) -> None:
        self._num_early = 0

    def delay_s(self, lived_s: float) -> float:
        """Seconds until the next start, after a worker that lived for `lived_s` seconds."""
        if lived_s >= STEADY_S:
            self._num_early = 0
        num_before, self._num_early = self._num_early, self._num_early + 1
        if not num_before:
            return 0.0
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(num_before - 1, 16))
