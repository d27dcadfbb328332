"""Pins: what stays, for how long, and what is refused."""

from __future__ import annotations

import pytest
from hand_engine import HandEngine, assert_right, prompt_of

from roost_engine.blocks import BlockPool
from roost_engine.pins import PinRefused, Pins


def cached(pool: BlockPool, tokens: list[int]) -> None:
    """Leave a prefix in the cache that nobody holds. Blocks are of one token."""
    table = pool.allocate(len(tokens))
    for index, token in enumerate(tokens):
        pool.register(table, index, [token])
    pool.release(table)


def num_hit(pool: BlockPool, tokens: list[int]) -> int:
    return len(pool.lookup(tokens, pool.chain(tokens)))


def test_a_pinned_prefix_survives_whatever_else_is_allocated() -> None:
    pool = BlockPool(8, 1)
    pins = Pins(pool)
    cached(pool, [1, 2, 3])
    assert pins.pin("a", [1, 2, 9], until_s=5.0) == 2

    pool.release(pool.allocate(6))

    assert pool.num_free == 6
    assert num_hit(pool, [1, 2, 3]) == 2
    pool.check(pins.block_tables)


def test_a_pin_ends_at_its_time_or_when_released() -> None:
    pool = BlockPool(8, 1)
    pins = Pins(pool)
    cached(pool, [1])
    cached(pool, [2])
    pins.pin("a", [1], until_s=5.0)
    pins.pin("b", [2], until_s=9.0)

    pins.expire(4.9)
    assert len(pins) == 2
    pins.expire(5.0)
    assert len(pins) == 1
    assert pins.release("b")
    assert not pins.release("b")

    assert pool.num_free == 8


def test_half_of_the_pool_may_be_pinned_and_no_block_more() -> None:
    pool = BlockPool(9, 1)
    pins = Pins(pool)
    cached(pool, [1, 2, 3, 4, 5])

    with pytest.raises(PinRefused, match="exceed the budget of 4"):
        pins.pin("a", [1, 2, 3, 4, 5], until_s=1.0)
    assert (pool.num_free, len(pins)) == (9, 0)

    assert pins.pin("a", [1, 2, 3, 4], until_s=1.0) == 4


def test_blocks_that_pins_share_are_counted_once() -> None:
    pool = BlockPool(8, 1)
    pins = Pins(pool)
    cached(pool, [1, 2, 3])
    cached(pool, [1, 2, 4])

    pins.pin("a", [1, 2, 3], until_s=1.0)
    pins.pin("b", [1, 2, 4], until_s=1.0)

    assert pins.num_blocks == 4
    pins.release("a")
    assert pins.num_blocks == 3
    pool.check(pins.block_tables)


def test_a_name_is_replaced_and_a_refusal_keeps_what_it_had() -> None:
    pool = BlockPool(6, 1)
    pins = Pins(pool)
    cached(pool, [1, 2, 3])
    pins.pin("a", [1, 2], until_s=1.0)

    with pytest.raises(PinRefused, match="no full block"):
        pins.pin("a", [7], until_s=9.0)
    assert pins.num_blocks == 2

    assert pins.pin("a", [1, 2, 3], until_s=9.0) == 3
    pins.expire(1.0)
    assert (len(pins), pins.num_blocks) == (1, 3)


def test_what_is_replaced_does_not_count_against_the_budget() -> None:
    pool = BlockPool(6, 1)
    pins = Pins(pool)
    cached(pool, [1, 2, 3])
    cached(pool, [7, 8, 9])
    pins.pin("a", [1, 2, 3], until_s=1.0)

    assert pins.pin("a", [7, 8, 9], until_s=1.0) == 3

    assert pool.num_free == 3
    pool.check(pins.block_tables)


def test_pins_of_forgotten_blocks_are_dropped() -> None:
    engine = HandEngine()
    engine.add("good", prompt_of(12))
    engine.run()
    pins = engine.scheduler.pins
    pins.pin("a", prompt_of(12), until_s=99.0)
    engine.model.spoils = {49}
    engine.add("bad", [*prompt_of(12), 49])

    engine.run()

    assert len(pins) == 0


def test_pins_give_way_where_a_request_could_not_run_beside_them() -> None:
    engine = HandEngine(num_blocks=8, block_size=4)
    for seed in (1, 2):
        engine.add(f"warm{seed}", prompt_of(8, seed), max_tokens=1)
    engine.run()
    pins = engine.scheduler.pins
    pins.pin("later", prompt_of(8, 1), until_s=20.0)
    pins.pin("sooner", prompt_of(8, 2), until_s=10.0)

    large = engine.add("large", prompt_of(18, 3), max_tokens=8)
    engine.step()
    assert (len(pins), engine.scheduler.counters.pins_broken) == (1, 1)
    engine.run()

    assert (len(pins), engine.scheduler.counters.pins_broken) == (0, 2)
    assert_right(large)


def test_a_running_request_comes_before_pins_only_if_it_is_alone() -> None:
    engine = HandEngine(num_blocks=8, block_size=4)
    engine.add("warm", prompt_of(16, 1), max_tokens=1)
    engine.run()
    pins = engine.scheduler.pins
    pins.pin("a", prompt_of(16, 1), until_s=20.0)

    requests = [engine.add(f"r{index}", prompt_of(4, index), max_tokens=9) for index in (2, 3)]
    engine.run()

    assert len(pins) == 1
    assert_right(*requests)
