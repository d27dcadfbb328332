"""KV events: replaying them gives the resident set, after any use of the pool."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from resident_set import ResidentSet, fill

from roost_engine.blocks import BlockPool
from roost_engine.kv_log import KvEventLog
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    Tier,
    merge_events,
)
from roost_wire.token_chain import block_hashes


@pytest.mark.parametrize("num_host_blocks", [0, 3, 64])
def test_replaying_the_events_gives_the_resident_set_at_any_moment(num_host_blocks: int) -> None:
    """Thousands of random operations, one check after each; the reader sees batches only."""
    rng = random.Random(num_host_blocks)
    log = KvEventLog(epoch=7)
    pool = BlockPool(24, 2, num_host_blocks=num_host_blocks, on_event=log.append)
    reader, tables = ResidentSet(), list[list[int]]()
    moves = 0

    def start() -> None:
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 16))]
        hit = pool.lookup(tokens, pool.chain(tokens))
        if len(tokens) // 2 + 1 <= pool.num_free:
            tables.append(fill(pool, tokens))
        nonlocal moves
        moves += len(hit.offloaded)

    def finish() -> None:
        if tables:
            pool.release(tables.pop(rng.randrange(len(tables))))

    def fail() -> None:
        if tables:
            pool.forget(tables[-1])
            pool.release(tables.pop())

    operations: list[Callable[[], None]] = [start] * 8 + [finish] * 8 + [fail]
    for number in range(4000):
        pool.clear() if rng.random() < 0.002 else rng.choice(operations)()
        batch = log.drain(pool)
        for event in batch.events:
            reader.apply(event)
        assert (batch.epoch, batch.sequence) == (7, number)
        assert batch.device_digest == reader.digest(Tier.DEVICE)
        assert batch.host_digest == reader.digest(Tier.HOST)
        reader.check_equals(pool)
        pool.check(tables)

    assert reader.num_events > 1000
    assert (moves > 100) == (num_host_blocks > 0)


def test_a_snapshot_stands_for_the_last_batch_and_all_before_it() -> None:
    log = KvEventLog(epoch=1)
    pool = BlockPool(8, 2, num_host_blocks=8, on_event=log.append)
    for start in range(0, 40, 10):
        pool.release(fill(pool, list(range(start, start + 9))))
    assert pool.num_host_used > 0
    last = log.drain(pool)

    late = ResidentSet()
    snapshot = log.snapshot(pool)
    for event in snapshot.events:
        late.apply(event)
    late.check_equals(pool)
    fill(pool, [1, 2, 3])
    following = log.drain(pool)
    for event in following.events:
        late.apply(event)

    late.check_equals(pool)
    assert (last.sequence, snapshot.sequence, following.sequence) == (0, 0, 1)
    assert snapshot.events[0] == AllBlocksCleared()


def test_a_heartbeat_has_no_events_but_a_number_and_the_digests() -> None:
    log = KvEventLog(epoch=1)
    pool = BlockPool(4, 1, on_event=log.append)
    fill(pool, [5, 6])
    first, second = log.drain(pool), log.drain(pool)

    assert (second.sequence, second.events) == (1, [])
    assert second.device_digest == first.device_digest != 0


def test_a_prefill_is_told_as_one_run_of_its_chain() -> None:
    log = KvEventLog(epoch=1)
    pool = BlockPool(4, 2, on_event=log.append)
    fill(pool, [1, 2, 3, 4, 5])

    assert log.drain(pool).events == [
        BlockStored(tuple(block_hashes([1, 2, 3, 4], 2)), None, (1, 2, 3, 4), 2, Tier.DEVICE)
    ]


def test_a_block_that_moves_is_stored_there_before_it_is_removed_here() -> None:
    events: list[KvEvent] = []
    pool = BlockPool(1, 1, num_host_blocks=1, on_event=events.append)
    pool.release(fill(pool, [1]))
    events.clear()
    pool.allocate(1)

    (name,) = block_hashes([1], 1)
    assert events == [
        BlockStored((name,), None, (1,), 1, Tier.HOST),
        BlockRemoved((name,), Tier.DEVICE),
    ]


def stored(block_hash: int, parent: int | None, tier: Tier = Tier.DEVICE) -> BlockStored:
    return BlockStored((block_hash,), parent, (block_hash,), 1, tier)


@pytest.mark.parametrize(
    ("events", "merged"),
    [
        ([], 0),
        ([stored(1, None), stored(2, 1), stored(3, 2)], 1),
        ([stored(1, None), stored(2, None)], 2),
        ([stored(1, None), stored(2, 1, Tier.HOST)], 2),
        ([BlockRemoved((1,), Tier.HOST), BlockRemoved((2,), Tier.HOST)], 1),
        ([BlockRemoved((1,), Tier.HOST), BlockRemoved((2,), Tier.DEVICE)], 2),
        ([stored(1, None), BlockRemoved((1,), Tier.DEVICE), stored(1, None)], 3),
        ([AllBlocksCleared(), AllBlocksCleared()], 2),
    ],
)
def test_only_what_continues_is_merged(events: list[KvEvent], merged: int) -> None:
    result = merge_events(events)

    assert len(result) == merged
    names = [getattr(event, "block_hashes", ()) for event in result]
    assert [name for hashes in names for name in hashes] == [
        name for event in events for name in getattr(event, "block_hashes", ())
    ]
