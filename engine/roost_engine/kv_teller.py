"""When KV events leave the engine: after each step that had some, or another load; else once a
second.

The engine thread asks `due` after each step and while it sleeps; what is due it hands to the event
loop, and never waits for a socket. Pure: `now` is an argument.

The load is news when another number of requests runs or waits; how much memory they use changes
with each step, and is told along. A step may take seconds, so news of the load is told before it,
too: two batches a step at most.

A snapshot is asked for on the event loop and made by the engine thread, after everything before it
was told.

Not here: encoding, sockets (kv_publisher.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from roost_wire.kv_events import KvEventBatch

if TYPE_CHECKING:
    from roost_engine.kv_log import KvEventLog
    from roost_engine.scheduler import Scheduler

#: Followers take a replica for silent when they have missed a few.
HEARTBEAT_S = 1.0

Told = tuple[Callable[[KvEventBatch], None], KvEventBatch]


class KvTeller:
    """One pool's log and who hears of it."""

    def __init__(self, log: KvEventLog) -> None:
        self._log = log
        self._next_heartbeat_s = float("-inf")
        self._wants_snapshot = False
        self._num_requests = (0, 0)  # running and waiting, as last told
        self.on_batch: Callable[[KvEventBatch], None] = _ignore
        self.on_snapshot: Callable[[KvEventBatch], None] = _ignore

    def ask_snapshot(self) -> None:
        """Let the next `due` have a snapshot. May be called from another thread."""
        self._wants_snapshot = True

    def is_load_news(self, scheduler: Scheduler) -> bool:
        """Whether the load is not what was told last."""
        return (scheduler.num_running, scheduler.num_waiting) != self._num_requests

    def due(self, scheduler: Scheduler, now: float) -> list[Told]:
        """What must be told now, and to whom; usually O(1). `scheduler`: of the log's pool."""
        wants_snapshot, self._wants_snapshot = self._wants_snapshot, False
        is_news = self._log.has_events or self.is_load_news(scheduler)
        if not (wants_snapshot or is_news or now >= self._next_heartbeat_s):
            return []
        self._next_heartbeat_s = now + HEARTBEAT_S
        self._num_requests = (scheduler.num_running, scheduler.num_waiting)
        pool, load = scheduler.pool, scheduler.load
        told: list[Told] = [(self.on_batch, self._log.drain(pool, load))]
        if wants_snapshot:
            told.append((self.on_snapshot, self._log.snapshot(pool, load)))
        return told


def _ignore(_batch: KvEventBatch) -> None:
    """Nobody listens yet."""
