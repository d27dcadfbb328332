"""Block pool: single behaviours, then random use against a model that forgets nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from roost_engine.batch import Direction
from roost_engine.blocks import BlockPool, OutOfBlocksError
from roost_wire.token_chain import block_hashes, next_block_hash


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A table for `tokens` with whatever is cached, all full blocks registered."""
    table = hits(pool, tokens)
    pool.acquire(table)
    table += pool.allocate(-(-len(tokens) // pool.block_size) - len(table))
    register_full(pool, table, tokens)
    return table


def register_full(pool: BlockPool, table: list[int], tokens: list[int]) -> None:
    size = pool.block_size
    for index in range(len(tokens) // size):
        pool.register(table, index, tokens[index * size : (index + 1) * size])


def hits(pool: BlockPool, tokens: list[int]) -> list[int]:
    return pool.lookup(tokens, pool.chain(tokens)).blocks


def test_the_chain_is_the_one_of_the_wire_contract() -> None:
    pool = BlockPool(4, 3)

    assert pool.chain([1, 2, 3, 4, 5, 6, 7]) == block_hashes([1, 2, 3, 4, 5, 6, 7], 3)


def test_a_released_prefix_is_found_again() -> None:
    pool = BlockPool(8, 2)
    table = fill(pool, [1, 2, 3, 4, 5])
    pool.release(table)

    assert pool.num_free == 8
    assert hits(pool, [1, 2, 3, 4, 9, 9]) == table[:2]
    assert hits(pool, [9, 9, 3, 4]) == []


def test_a_lookup_takes_no_reference_and_acquire_protects_from_eviction() -> None:
    pool = BlockPool(4, 1)
    table = fill(pool, [1, 2])
    pool.release(table)
    found = hits(pool, [1, 2])
    assert pool.num_free_among(found) == len(found)

    pool.acquire(found)
    others = pool.allocate(2)

    assert set(others).isdisjoint(found)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    pool.check([found, others])


def test_allocate_takes_nothing_when_too_little_is_free() -> None:
    pool = BlockPool(3, 2)
    pool.allocate(1)

    with pytest.raises(OutOfBlocksError):
        pool.allocate(3)

    assert pool.num_free == 2


def test_the_tail_of_a_chain_is_evicted_before_its_root() -> None:
    pool = BlockPool(4, 1)
    table = fill(pool, [1, 2, 3, 4])
    pool.release(table)

    taken = [pool.allocate(1)[0] for _ in range(3)]

    assert taken == table[:0:-1]
    assert hits(pool, [1, 2, 3, 4]) == table[:1]


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    pool = BlockPool(4, 1)
    older, newer = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(older)
    pool.release(newer)
    again = hits(pool, [1, 2])
    pool.acquire(again)
    pool.release(again)

    pool.allocate(2)

    assert hits(pool, [3, 4]) == []
    assert hits(pool, [1, 2]) == older


def test_blocks_without_hash_are_reused_before_anything_cached_is_evicted() -> None:
    pool = BlockPool(3, 2)
    table = fill(pool, [1, 2, 3])
    pool.release(table)
    assert pool.allocate(2)[0] == table[1]

    assert hits(pool, [1, 2]) == table[:1]


def test_a_duplicate_is_swapped_for_the_canonical_block_and_freed() -> None:
    pool = BlockPool(6, 2)
    first, second = pool.allocate(2), pool.allocate(2)
    register_full(pool, first, [1, 2, 3, 4])

    register_full(pool, second, [1, 2, 3, 4])

    assert second == first
    assert pool.num_free == 4
    assert hits(pool, [1, 2, 3, 4]) == first
    pool.check([first, second])


def test_registering_twice_changes_nothing() -> None:
    pool = BlockPool(2, 2)
    table = fill(pool, [1, 2])

    register_full(pool, table, [1, 2])

    pool.check([table])


def test_releasing_a_free_block_is_a_defect() -> None:
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.release(table)

    with pytest.raises(AssertionError, match="released twice"):
        pool.release(table)


def test_forgotten_blocks_and_their_successors_are_not_found_again() -> None:
    pool = BlockPool(8, 1)
    held, other = fill(pool, [1, 2, 3]), fill(pool, [1, 2, 9])
    pool.release(other)

    pool.forget(held[1:])

    assert hits(pool, [1, 2, 3]) == held[:1]
    assert hits(pool, [1, 2, 9]) == held[:1]
    pool.check([held])
    register_full(pool, held, [1, 2, 3])
    pool.release(held)
    pool.check([])


def test_forgotten_free_blocks_are_reused_first() -> None:
    pool = BlockPool(4, 1)
    older, newer = fill(pool, [1]), fill(pool, [2])
    pool.release(older)
    pool.release(newer)

    pool.forget(newer)

    assert pool.allocate(1) == newer


def test_usage_counts_referenced_blocks_only() -> None:
    pool = BlockPool(4, 1)
    table = fill(pool, [1])
    assert pool.usage == pytest.approx(0.25)

    pool.release(table)

    assert pool.usage == 0.0


def fill_tiered(pool: BlockPool, tokens: list[int]) -> list[int]:
    """As `fill`, restoring what lies on the host."""
    hit = pool.lookup(tokens, pool.chain(tokens))
    pool.acquire(hit.blocks)
    table = hit.blocks + pool.restore(hit.offloaded)
    table += pool.allocate(-(-len(tokens) // pool.block_size) - len(table))
    register_full(pool, table, tokens)
    return table


def test_an_evicted_chain_is_found_on_the_host_and_comes_back() -> None:
    pool = BlockPool(3, 1, num_host_blocks=3)
    pool.release(fill(pool, [1, 2, 3]))
    pool.release(pool.allocate(2))
    out = pool.take_copies()

    hit = pool.lookup([1, 2, 3], pool.chain([1, 2, 3]))
    assert (len(hit.blocks), len(hit.offloaded)) == (1, 2)
    table = fill_tiered(pool, [1, 2, 3])

    back = pool.take_copies()
    assert [copy.direction for copy in out + back] == [Direction.OUT] * 2 + [Direction.IN] * 2
    assert [copy.host_block for copy in back] == [copy.host_block for copy in reversed(out)]
    assert [copy.block for copy in back] == table[1:]
    assert pool.num_host_used == 0
    pool.check([table])


def test_a_restore_does_not_overwrite_what_it_reads() -> None:
    """Host and device are full: what is evicted for the restored blocks finds no slot."""
    pool = BlockPool(2, 1, num_host_blocks=2)
    pool.release(fill(pool, [1, 2]))
    pool.release(fill(pool, [3, 4]))
    pool.take_copies()

    table = fill_tiered(pool, [1, 2])

    assert [copy.direction for copy in pool.take_copies()] == [Direction.IN] * 2
    assert len(pool.lookup([3, 4], pool.chain([3, 4]))) == 0
    pool.check([table])


def test_a_block_computed_anew_takes_the_place_of_its_copy_on_the_host() -> None:
    pool = BlockPool(2, 1, num_host_blocks=2)
    pool.release(fill(pool, [1]))
    pool.release(pool.allocate(2))
    assert pool.num_host_used == 1

    table = pool.allocate(1)
    pool.register(table, 0, [1])

    assert pool.num_host_used == 0
    assert hits(pool, [1]) == table
    pool.check([table])


def test_restoring_takes_nothing_when_too_little_is_free() -> None:
    pool = BlockPool(2, 1, num_host_blocks=2)
    pool.release(fill(pool, [1, 2]))
    held = pool.allocate(2)
    hit = pool.lookup([1, 2], pool.chain([1, 2]))

    with pytest.raises(OutOfBlocksError):
        pool.restore(hit.offloaded)

    assert len(pool.lookup([1, 2], pool.chain([1, 2])).offloaded) == 2
    pool.check([held])


def test_forgetting_a_block_forgets_its_successors_on_the_host() -> None:
    pool = BlockPool(3, 1, num_host_blocks=3)
    pool.release(fill(pool, [1, 2, 3]))
    pool.release(pool.allocate(2))
    root = hits(pool, [1])

    pool.forget(root)

    assert (pool.num_host_used, len(pool.lookup([1, 2, 3], pool.chain([1, 2, 3])))) == (0, 0)
    pool.check([])


def test_clear_forgets_all_tiers_and_takes_nothing_from_holders() -> None:
    pool = BlockPool(4, 1, num_host_blocks=4)
    pool.release(fill(pool, [1, 2, 3]))
    pool.release(pool.allocate(3))
    held = fill(pool, [7, 8])

    pool.clear()

    assert (pool.num_host_used, hits(pool, [7, 8]), pool.digest()) == (0, [], 0)
    pool.check([held])
    pool.release(held)
    pool.check([])


@pytest.mark.parametrize("num_sharers", [1, 2])
def test_what_others_share_of_a_table_is_its_beginning(num_sharers: int) -> None:
    pool = BlockPool(12, 1)
    table = fill(pool, [1, 2, 3, 4, 5])
    for index in range(num_sharers):
        assert pool.num_shared(fill(pool, [1, 2, 3, 8, index])) == 3 + index

    assert pool.num_shared(table) == 3


def same_hash(parent_hash: int | None, block_tokens: Sequence[int]) -> int:
    return 7


def last_token_hash(parent_hash: int | None, block_tokens: Sequence[int]) -> int:
    """Forgets the parent: the same block after different prefixes has the same name."""
    return block_tokens[-1]


def test_a_collision_of_contents_is_no_hit_and_is_not_cached() -> None:
    pool = BlockPool(6, 2, hash_block=same_hash)
    victim = fill(pool, [1, 2])

    attacker = fill(pool, [8, 9])

    assert attacker != victim
    assert hits(pool, [8, 9]) == []
    assert hits(pool, [1, 2]) == victim
    pool.check([victim, attacker])


def test_a_collision_of_prefixes_is_no_hit_although_the_tokens_are_equal() -> None:
    """[1] [5] and [2] [5]: the second block has the same tokens and the same hash, other KV."""
    pool = BlockPool(6, 1, hash_block=last_token_hash)
    victim = fill(pool, [1, 5])

    assert hits(pool, [2, 5]) == []
    attacker = fill(pool, [2, 5])

    assert attacker[1] != victim[1]
    assert hits(pool, [2, 5]) == attacker[:1]
    assert hits(pool, [1, 5]) == victim
    pool.check([victim, attacker])


def test_nothing_after_an_uncached_block_is_cached() -> None:
    pool = BlockPool(8, 1, hash_block=lambda parent, tokens: tokens[-1] % 10)
    victim = fill(pool, [1])

    attacker = fill(pool, [11, 2, 3])

    assert hits(pool, [11, 2, 3]) == []
    assert [pool.is_cached(block) for block in attacker] == [False, False, False]
    pool.check([victim, attacker])


def weak_hash(parent_hash: int | None, block_tokens: Sequence[int]) -> int:
    return next_block_hash(parent_hash, block_tokens) % 5


class PoolMachine(RuleBasedStateMachine):
    """Random requests against a pool; the model knows what each block was last filled with."""

    tables = Bundle("tables")

    @initialize(
        num_blocks=st.integers(1, 12),
        num_host_blocks=st.integers(0, 8),
        size=st.integers(1, 3),
        weak=st.booleans(),
    )
    def create(self, num_blocks: int, num_host_blocks: int, size: int, weak: bool) -> None:
        self.pool = BlockPool(
            num_blocks,
            size,
            num_host_blocks=num_host_blocks,
            hash_block=weak_hash if weak else next_block_hash,
        )
        self.size = size
        self.host: dict[int, tuple[int, ...]] = {}  # host block -> the same
        self.filled: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.open: list[tuple[list[int], list[int]]] = []  # tokens, table

    def copy(self) -> None:
        """Execute the orders, before anything is written."""
        for order in self.pool.take_copies():
            if order.direction is Direction.OUT:
                self.host[order.host_block] = self.filled[order.block]
            else:
                self.filled[order.block] = self.host[order.host_block]

    def write(self, tokens: list[int], table: list[int], start: int) -> None:
        """Compute positions from `start`: fill their blocks, then register the full ones."""
        for index in range(start // self.size, len(table)):
            holders = sum(table[index] in other for _, other in self.open)
            assert holders <= 1, "a shared block is written to"
            self.filled[table[index]] = tuple(tokens[: (index + 1) * self.size])
        register_full(self.pool, table, tokens)

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def start(self, tokens: list[int]) -> object:
        pool = self.pool
        hit = pool.lookup(tokens, pool.chain(tokens))
        missing = -(-len(tokens) // self.size) - len(hit.blocks)
        if missing + pool.num_free_among(hit.blocks) > pool.num_free:
            return multiple()
        pool.acquire(hit.blocks)
        table = hit.blocks + pool.restore(hit.offloaded)
        num_hit = len(table)
        table += pool.allocate(missing - len(hit.offloaded))
        self.copy()
        for index, block in enumerate(table[:num_hit]):
            assert self.filled[block] == tuple(tokens[: (index + 1) * self.size])
        entry = (tokens, table)
        self.open.append(entry)
        self.write(tokens, table, num_hit * self.size)
        return entry

    @rule(entry=tables, token=st.integers(0, 1))
    def generate(self, entry: tuple[list[int], list[int]], token: int) -> None:
        tokens, table = entry
        if len(tokens) == len(table) * self.size:
            if self.pool.num_free == 0:
                return
            table += self.pool.allocate(1)
            self.copy()
        tokens.append(token)
        self.write(tokens, table, len(tokens) - 1)

    @rule(entry=consumes(tables))
    def fail(self, entry: tuple[list[int], list[int]]) -> None:
        """Afterwards no block of this request can be hit.

        Its tokens may be: another request computes them anew once the first blocks are forgotten.
        """
        tokens, table = entry
        self.pool.forget(table)
        assert not set(table) & set(hits(self.pool, tokens))
        self.close(entry)

    @rule(entry=consumes(tables))
    def finish(self, entry: tuple[list[int], list[int]]) -> None:
        self.close(entry)

    def close(self, entry: tuple[list[int], list[int]]) -> None:
        self.open = [other for other in self.open if other is not entry]
        self.pool.release(entry[1])

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        tables = [table for _, table in self.open]
        self.pool.check(tables)
        used = {block for table in tables for block in table}
        assert self.pool.num_free + len(used) == self.pool.num_blocks
        for tokens, table in self.open:
            for index, block in enumerate(table):
                assert self.filled[block] == tuple(tokens[: (index + 1) * self.size])


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolAgainstModel = PoolMachine.TestCase
