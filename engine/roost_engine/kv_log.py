"""Log of KV events: what the pool tells, cut into numbered batches for whoever follows.

    pool --on_event--> append ... append --drain, once a step--> batch 0, batch 1, ...

A follower that joins late, or has lost a batch, takes a snapshot and goes on with the batch whose
number the snapshot carries.

Not here: sending and keeping batches, peers' encodings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_wire.kv_events import AllBlocksCleared, KvEvent, KvEventBatch, Tier, merge_events

if TYPE_CHECKING:
    from roost_engine.blocks import BlockPool


class KvEventLog:
    """Events of one pool since the last batch. To be drained by its owner, or it grows."""

    def __init__(self, epoch: int) -> None:
        """`epoch` is drawn at random by whoever starts the process."""
        self.epoch = epoch
        self._events: list[KvEvent] = []
        self._num_batches = 0

    def append(self, event: KvEvent) -> None:
        """Take an event in; to be given to the pool as `on_event`."""
        self._events.append(event)

    def drain(self, pool: BlockPool) -> KvEventBatch:
        """The next batch: all events since the last one. Without events it is a heartbeat."""
        events, self._events = merge_events(self._events), []
        batch = self._batch(pool, events)
        self._num_batches += 1
        return batch

    def snapshot(self, pool: BlockPool) -> KvEventBatch:
        """What is resident, as a batch to be read before the next one, whose number it has.

        O(cached blocks). Everything that happened must have been drained.
        """
        assert not self._events, "a snapshot would tell these events twice"
        return self._batch(pool, [AllBlocksCleared(), *merge_events(pool.snapshot())])

    def _batch(self, pool: BlockPool, events: list[KvEvent]) -> KvEventBatch:
        return KvEventBatch(
            epoch=self.epoch,
            sequence=self._num_batches,
            events=events,
            device_digest=pool.digest(Tier.DEVICE),
            host_digest=pool.digest(Tier.HOST),
        )
