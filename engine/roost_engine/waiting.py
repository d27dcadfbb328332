"""The line of requests that wait for blocks: by priority, then by arrival.

A preempted request comes back to its own place, which is before everybody of its priority who
arrived later. So a request is overtaken by those of better priority only, and, while it waits
for a shared prefix (sharing.py), by those who do not.

A request with a deadline that has produced nothing here yet is dropped when it passes. One that was
preempted after its first token is not: its client has an answer under way.

Not here: who is admitted (scheduler.py).
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from roost_engine.request import Request

#: (priority, number of arrival): lower goes first. Unique.
Place = tuple[int, int]


class WaitingLine:
    """Waiting requests in order of their places. A change moves O(n) pointers."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._requests: list[Request] = []
        self._impatient: dict[Place, Request] = {}  # of those in line, who have a deadline
        self._deadlines: list[tuple[float, Place]] = []  # heap; also of some that left the line
        self._uncached: dict[Place, int] = {}
        #: Of all in line, what was not cached when they came.
        self.num_uncached_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, place: Place, request: Request, uncached_tokens: int) -> None:
        """Let a request wait at its place; so many of its tokens are to be computed."""
        index = bisect_left(self._places, place)
        self._places.insert(index, place)
        self._requests.insert(index, request)
        self._uncached[place] = uncached_tokens
        self.num_uncached_tokens += uncached_tokens
        has_produced = len(request.token_ids) > request.num_given_tokens
        if request.deadline_s is not None and not has_produced:
            self._impatient[place] = request
            heappush(self._deadlines, (request.deadline_s, place))

    def remove(self, place: Place) -> None:
        """Take out the request at this place, which is in line."""
        index = bisect_left(self._places, place)
        assert self._places[index] == place
        self.num_uncached_tokens -= self._uncached.pop(place)
        del self._places[index], self._requests[index]
        self._impatient.pop(place, None)

    def try_get(self, index: int) -> Request | None:
        """The request with so many before it, None behind the end."""
        return self._requests[index] if index < len(self._requests) else None

    def overdue(self, now: float) -> list[Request]:
        """Requests whose deadline has passed; they stay in line until they are removed.

        O(1) if there are none, O(log n) for each that is due or has left.
        """
        overdue: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, place = heappop(self._deadlines)
            request = self._impatient.pop(place, None)
            if request is not None:
                overdue.append(request)
        return overdue
