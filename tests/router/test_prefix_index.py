"""Prefix index against a model of forty lines: one ordered dict a holder, looked up linearly."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from roost_router.index import prefix_index
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import BLOCK_BYTES, TEXT_BLOCK_BYTES, chain_bytes

# Chains drawn from a small tree, so that prefixes are shared, extended and evicted a lot.
CHAINS = [
    [hash((name[: i + 1], "block")) for i in range(len(name))]
    for name in ("aaaa", "aabb", "aabbcc", "abab", "b", "bb", "bbbbbbbb", "bbbc", "ccccc", "cab")
]


class Model:
    """Who holds what, the slow way."""

    def __init__(self):
        self.held: dict[int, dict[int, int]] = {}
        self.capacity: dict[int, int] = {}

    def add(self, holder, chain, stamp):
        for block in reversed(chain):
            self.held[holder].pop(block, None)
            self.held[holder][block] = stamp

    def evict(self, holder):
        held = self.held[holder]
        while len(held) > self.capacity[holder]:
            del held[next(iter(held))]

    def depths(self, chain, holders):
        found = {}
        for holder in holders:
            depth = 0
            while depth < len(chain) and chain[depth] in self.held[holder]:
                depth += 1
            if depth:
                found[holder] = depth
        return found


class IndexMachine(RuleBasedStateMachine):
    """With no slack for outdated entries, so that they are thinned out again and again."""

    def __init__(self):
        super().__init__()
        self.slack, prefix_index._SLACK_BLOCKS = prefix_index._SLACK_BLOCKS, 0
        self.index, self.model, self.stamp = PrefixIndex(), Model(), 0
        self.last: dict[int, tuple[list[int], int, int]] = {}

    def teardown(self):
        prefix_index._SLACK_BLOCKS = self.slack

    @rule(capacity=st.integers(1, 12))
    def open_holder(self, capacity):
        if len(self.model.held) < 5:
            holder = self.index.open_holder(capacity * TEXT_BLOCK_BYTES)
            assert holder not in self.model.held
            self.model.held[holder], self.model.capacity[holder] = {}, capacity

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model.held)))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), chain=st.sampled_from(CHAINS))
    def add(self, data, chain):
        holder = self.pick(data)
        depth = self.model.depths(chain, [holder]).get(holder, 0)
        self.stamp += 1
        self.index.add(holder, chain, self.stamp)
        self.model.add(holder, chain, self.stamp)
        self.last[holder] = (chain, depth, self.stamp)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def undo(self, data):
        holder = self.pick(data)
        if holder in self.last:
            chain, depth, stamp = self.last.pop(holder)
            self.index.undo(holder, chain, depth, stamp)
            held = self.model.held[holder]
            for block in chain[depth:]:
                if held.get(block) == stamp:
                    del held[block]

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), back=st.integers(0, 6))
    def forget_older(self, data, back):
        holder = self.pick(data)
        limit = self.stamp - back
        held = self.model.held[holder]
        gone = [block for block, stamp in held.items() if stamp <= limit]
        for block in gone:
            del held[block]
        assert len(gone) == self.index.forget_older(holder, limit)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def trim(self, data):
        holder = self.pick(data)
        self.index.trim(holder)
        self.model.evict(holder)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), capacity=st.integers(1, 12))
    def set_capacity(self, data, capacity):
        holder = self.pick(data)
        self.index.set_capacity(holder, capacity * TEXT_BLOCK_BYTES)
        self.model.capacity[holder] = capacity
        self.model.evict(holder)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def retire(self, data):
        holder = self.pick(data)
        self.index.retire(holder)
        del self.model.held[holder], self.model.capacity[holder]
        self.last.pop(holder, None)

    @invariant()
    def agrees_with_the_model(self):
        holders = sorted(self.model.held)
        mask = sum(1 << holder for holder in holders)
        for chain in CHAINS:
            assert self.model.depths(chain, holders) == self.index.lookup(chain, mask)
        for holder in holders:
            held = len(self.model.held[holder])
            assert held == self.index.num_blocks(holder)
            assert held * TEXT_BLOCK_BYTES == self.index.num_bytes(holder)

    @invariant()
    def residency_is_prefix_closed(self):
        for held in self.model.held.values():
            for chain in CHAINS:
                resident = [block in held for block in chain]
                assert resident == sorted(resident, reverse=True)


TestPrefixIndex = IndexMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_lookup_tells_every_holder_its_own_depth():
    index = PrefixIndex()
    chain = list(range(100, 164))
    depths = [1, 2, 63, 64, 64, 0]
    for stamp, depth in enumerate(depths):
        index.add(index.open_holder(100 * TEXT_BLOCK_BYTES), chain[:depth], stamp)

    found = index.lookup(chain, 0b111111)

    assert found == {0: 1, 1: 2, 2: 63, 3: 64, 4: 64}
    assert index.lookup(chain, 0b100100) == {2: 63}
    assert index.lookup([], 0b1) == {}


def test_a_chain_longer_than_the_capacity_keeps_its_head():
    index = PrefixIndex()
    holder = index.open_holder(3 * TEXT_BLOCK_BYTES)

    index.add(holder, [1, 2, 3, 4, 5], 1)
    index.trim(holder)

    assert {holder: 3} == index.lookup([1, 2, 3, 4, 5], 1 << holder)


def test_a_retired_holder_is_swept_and_its_number_comes_back():
    index = PrefixIndex()
    old = index.open_holder(10 * TEXT_BLOCK_BYTES)
    index.add(old, [1, 2, 3, 4, 5, 6], 1)

    index.retire(old)
    new = index.open_holder(10 * TEXT_BLOCK_BYTES)
    assert new != old
    assert index.lookup([1, 2, 3], 1 << new) == {}
    index.add(new, [1, 2], 2)
    index.add(new, [1, 2], 3)

    assert repr(index) == "<PrefixIndex 2 blocks | holders 1: 2>"
    assert old == index.open_holder(10 * TEXT_BLOCK_BYTES)


def test_stamps_are_those_of_the_last_touch():
    index = PrefixIndex()
    holder = index.open_holder(10 * TEXT_BLOCK_BYTES)
    index.add(holder, [1, 2, 3], 1)
    index.add(holder, [1, 2], 2)

    assert index.stamps(holder, [1, 2, 3]) == [2, 2, 1]
    with pytest.raises(KeyError):
        index.stamps(holder, [9])


def test_blocks_count_with_their_bytes():
    index, chain = PrefixIndex(), list(range(100, 200))
    holder = index.open_holder(chain_bytes(60))

    index.add(holder, chain, 1)
    assert index.num_bytes(holder) == chain_bytes(100)
    index.trim(holder)
    assert index.num_blocks(holder) == 60
    assert index.num_bytes(holder) == chain_bytes(60)

    index.add(holder, chain[:61], 2)
    index.undo(holder, chain[:61], 60, 2)
    assert index.num_bytes(holder) == chain_bytes(60)

    index.set_capacity(holder, chain_bytes(60) - 1)
    assert index.num_bytes(holder) == chain_bytes(60) - BLOCK_BYTES[59]


def test_one_prompt_touched_for_ever_takes_no_more_memory():
    index, chain = PrefixIndex(), list(range(100, 150))
    holder = index.open_holder(1 << 30)
    index.add(holder, list(range(1000, 1100)), 1)
    for stamp in range(2, 2000):
        index.add(holder, chain, stamp)

    assert index._held[holder].num_touched <= 2 * 150 + 1024 + 50
    assert index.num_blocks(holder) == 150
    assert index.forget_older(holder, 1) == 100
    assert {holder: 50} == index.lookup(chain, 1 << holder)
    assert index.forget_older(holder, 1999) == 50
    assert index.num_bytes(holder) == len(index) == 0
