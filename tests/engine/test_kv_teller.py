"""When KV events leave the engine."""

from __future__ import annotations

import pytest
from resident_set import ResidentSet, fill

from roost_engine.blocks import BlockPool
from roost_engine.kv_log import KvEventLog
from roost_engine.kv_teller import HEARTBEAT_S, KvTeller
from roost_wire.kv_events import AllBlocksCleared, KvEventBatch


@pytest.fixture
def log() -> KvEventLog:
    return KvEventLog(epoch=3)


@pytest.fixture
def pool(log: KvEventLog) -> BlockPool:
    return BlockPool(8, 2, on_event=log.append)


def due(teller: KvTeller, pool: BlockPool, now: float) -> list[KvEventBatch]:
    return [batch for _, batch in teller.due(pool, now)]


def test_events_are_told_at_once_and_else_a_heartbeat_each_second(
    log: KvEventLog, pool: BlockPool
) -> None:
    teller = KvTeller(log)

    assert [batch.events for batch in due(teller, pool, 10.0)] == [[]]
    assert due(teller, pool, 10.0 + HEARTBEAT_S - 0.01) == []
    fill(pool, [1, 2])
    (told,) = due(teller, pool, 10.5)
    assert len(told.events) == 1
    assert due(teller, pool, 10.5 + HEARTBEAT_S - 0.01) == []
    (heartbeat,) = due(teller, pool, 10.5 + HEARTBEAT_S)
    assert (heartbeat.sequence, heartbeat.events) == (2, [])


def test_a_snapshot_comes_once_after_all_that_happened_before_it(
    log: KvEventLog, pool: BlockPool
) -> None:
    teller = KvTeller(log)
    batches: list[KvEventBatch] = []
    snapshots: list[KvEventBatch] = []
    teller.on_batch, teller.on_snapshot = batches.append, snapshots.append
    fill(pool, [1, 2, 3, 4])
    teller.ask_snapshot()
    teller.ask_snapshot()
    for listener, batch in teller.due(pool, 0.0) + teller.due(pool, 0.1):
        listener(batch)

    (batch,), (snapshot,) = batches, snapshots
    assert batch.sequence == snapshot.sequence == 0
    assert snapshot.events[0] == AllBlocksCleared()
    follower = ResidentSet()
    for event in snapshot.events:
        follower.apply(event)
    follower.check_equals(pool)
