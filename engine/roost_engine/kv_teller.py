"""When KV events leave the engine: after each step that had some, else once a second.

The engine thread asks `due` after each step and while it sleeps; what is due it hands to the event
loop, and never waits for a socket. Pure: `now` is an argument.

A snapshot is asked for on the event loop and made by the engine thread, after everything before it
was told.

Not here: encoding, sockets (kv_publisher.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from roost_wire.kv_events import KvEventBatch

if TYPE_CHECKING:
    from roost_engine.blocks import BlockPool
    from roost_engine.kv_log import KvEventLog

#: Followers take a replica for silent when they have missed a few.
HEARTBEAT_S = 1.0

Told = tuple[Callable[[KvEventBatch], None], KvEventBatch]


class KvTeller:
    """One pool's log and who hears of it."""

    def __init__(self, log: KvEventLog) -> None:
        self._log = log
        self._next_heartbeat_s = float("-inf")
        self._wants_snapshot = False
        self.on_batch: Callable[[KvEventBatch], None] = _ignore
        self.on_snapshot: Callable[[KvEventBatch], None] = _ignore

    def ask_snapshot(self) -> None:
        """Let the next `due` have a snapshot. May be called from another thread."""
        self._wants_snapshot = True

    def due(self, pool: BlockPool, now: float) -> list[Told]:
        """What must be told now, and to whom; usually O(1)."""
        wants_snapshot, self._wants_snapshot = self._wants_snapshot, False
        if not (wants_snapshot or self._log.has_events or now >= self._next_heartbeat_s):
            return []
        self._next_heartbeat_s = now + HEARTBEAT_S
        told: list[Told] = [(self.on_batch, self._log.drain(pool))]
        if wants_snapshot:
            told.append((self.on_snapshot, self._log.snapshot(pool)))
        return told


def _ignore(_batch: KvEventBatch) -> None:
    """Nobody listens yet."""
