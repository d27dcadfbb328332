"""Log of KV events: what the pool tells, cut into numbered batches for whoever follows.

    pool --on_event--> append ... append --drain, once a step--> batch 0, batch 1, ...

A follower that joins late, or has lost a batch, takes a snapshot in place of the batch whose number
it carries, the last one, and of all before it.

Not here: when to drain (kv_teller.py), sending and keeping batches (kv_publisher.py), encodings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_wire.kv_events import AllBlocksCleared, KvEvent, KvEventBatch, Tier, merge_events

if TYPE_CHECKING:
    from roost_engine.blocks import BlockPool
    from roost_wire.told_load import ToldLoad


class KvEventLog:
    """Events of one pool since the last batch. To be drained by its owner, or it grows."""

    def __init__(self, epoch: int) -> None:
        """`epoch` is drawn at random by whoever starts the process."""
        self.epoch = epoch
        self._events: list[KvEvent] = []
        self._num_batches = 0

    @property
    def has_events(self) -> bool:
        """Whether the next batch is more than a heartbeat."""
        return bool(self._events)

    def append(self, event: KvEvent) -> None:
        """Take an event in; to be given to the pool as `on_event`."""
        self._events.append(event)

    def drain(self, pool: BlockPool, load: ToldLoad | None = None) -> KvEventBatch:
        """The next batch: all events since the last one. Without events it is a heartbeat."""
        events, self._events = merge_events(self._events), []
        self._num_batches += 1
        return self._batch(pool, load, events)

    def snapshot(self, pool: BlockPool, load: ToldLoad | None = None) -> KvEventBatch:
        """What is resident, as a batch to be read in place of the last one, whose number it has.

        O(cached blocks). Something must have been drained, and everything that happened.
        """
        assert self._num_batches, "there is no batch in whose place it could be read"
        assert not self._events, "a snapshot would tell these events twice"
        return self._batch(pool, load, [AllBlocksCleared(), *merge_events(pool.snapshot())])

    def _batch(self, pool: BlockPool, load: ToldLoad | None, events: list[KvEvent]) -> KvEventBatch:
        return KvEventBatch(
            rank=0,  # Dynamo drops batches without one
            epoch=self.epoch,
            sequence=self._num_batches - 1,
            events=events,
            device_digest=pool.digest(Tier.DEVICE),
            host_digest=pool.digest(Tier.HOST),
            load=load,
        )
