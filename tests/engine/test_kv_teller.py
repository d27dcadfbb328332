"""When KV events leave the engine."""

from __future__ import annotations

import pytest
from resident_set import ResidentSet, fill

from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.kv_log import KvEventLog
from roost_engine.kv_teller import HEARTBEAT_S, KvTeller
from roost_engine.request import Request, SamplingParams
from roost_engine.scheduler import Scheduler
from roost_wire.kv_events import AllBlocksCleared, KvEventBatch
from roost_wire.told_load import ToldLoad


@pytest.fixture
def log() -> KvEventLog:
    return KvEventLog(epoch=3)


@pytest.fixture
def pool(log: KvEventLog) -> BlockPool:
    return BlockPool(8, 2, on_event=log.append)


@pytest.fixture
def scheduler(pool: BlockPool) -> Scheduler:
    config = SchedulerConfig(max_step_tokens=4, max_running=1, max_model_len=16)
    return Scheduler(config, pool, frozenset())


def due(teller: KvTeller, scheduler: Scheduler, now: float) -> list[KvEventBatch]:
    return [batch for _, batch in teller.due(scheduler, now)]


def ask(scheduler: Scheduler, name: str, num_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=3)
    scheduler.add(Request(name, list(range(num_tokens)), sampling, 0.0))


def test_events_are_told_at_once_and_else_a_heartbeat_each_second(
    log: KvEventLog, scheduler: Scheduler
) -> None:
    teller = KvTeller(log)

    assert [batch.events for batch in due(teller, scheduler, 10.0)] == [[]]
    assert due(teller, scheduler, 10.0 + HEARTBEAT_S - 0.01) == []
    fill(scheduler.pool, [1, 2])
    (told,) = due(teller, scheduler, 10.5)
    assert len(told.events) == 1
    assert due(teller, scheduler, 10.5 + HEARTBEAT_S - 0.01) == []
    (heartbeat,) = due(teller, scheduler, 10.5 + HEARTBEAT_S)
    assert (heartbeat.sequence, heartbeat.events) == (2, [])


def test_a_snapshot_comes_once_after_all_that_happened_before_it(
    log: KvEventLog, pool: BlockPool, scheduler: Scheduler
) -> None:
    teller = KvTeller(log)
    batches: list[KvEventBatch] = []
    snapshots: list[KvEventBatch] = []
    teller.on_batch, teller.on_snapshot = batches.append, snapshots.append
    fill(pool, [1, 2, 3, 4])
    teller.ask_snapshot()
    teller.ask_snapshot()
    for listener, batch in teller.due(scheduler, 0.0) + teller.due(scheduler, 0.1):
        listener(batch)

    (batch,), (snapshot,) = batches, snapshots
    assert batch.sequence == snapshot.sequence == 0
    assert snapshot.events[0] == AllBlocksCleared()
    follower = ResidentSet()
    for event in snapshot.events:
        follower.apply(event)
    follower.check_equals(pool)


def test_the_load_is_told_when_another_number_of_requests_runs_or_waits(
    log: KvEventLog, scheduler: Scheduler
) -> None:
    teller = KvTeller(log)
    (first,) = due(teller, scheduler, 0.0)
    assert first.load == ToldLoad(0, 0, 0, 16, 0)
    assert not teller.is_load_news(scheduler)

    ask(scheduler, "one", 6)
    ask(scheduler, "two", 5)
    assert teller.is_load_news(scheduler)
    (arrived,) = due(teller, scheduler, 0.1)
    assert arrived.load == ToldLoad(0, 2, 0, 16, 11)
    step = scheduler.schedule()  # four of its six tokens; it has blocks for all
    (started,) = due(teller, scheduler, 0.2)
    assert started.load == ToldLoad(1, 1, 6, 16, 11)
    scheduler.update(step, [])
    assert not teller.is_load_news(scheduler)  # and yet: two blocks are full
    (batch,) = due(teller, scheduler, 0.3)
    assert batch.events
    assert batch.load == ToldLoad(1, 1, 6, 16, 7)  # two of its tokens are left

    scheduler.abort("two")
    scheduler.abort("one")
    (ended,) = due(teller, scheduler, 0.4)
    assert ended.load == ToldLoad(0, 0, 0, 16, 0)
    assert due(teller, scheduler, 0.4 + HEARTBEAT_S - 0.01) == []
