"""Prefix index against a model of forty lines: one ordered dict a holder, looked up linearly."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from roost_router.index import prefix_index
from roost_router.index.prefix_index import Floor, PrefixIndex
from roost_router.index.text_chain import BLOCK_BYTES, TEXT_BLOCK_BYTES, chain_bytes

# Chains drawn from a small tree, so that prefixes are shared, extended and evicted a lot.
CHAINS = [
    [hash((name[: i + 1], "block")) for i in range(len(name))]
    for name in ("aaaa", "aabb", "aabbcc", "abab", "b", "bb", "bbbbbbbb", "bbbc", "ccccc", "cab")
]


class Model:
    """Who holds what, the slow way: stamps and places of blocks, and a floor."""

    def __init__(self):
        self.held: dict[int, dict[int, tuple[int, int]]] = {}  # block: (stamp, -place)
        self.expected: dict[int, list[tuple[list[int], int]]] = {}
        self.floor: dict[int, tuple[int, int]] = {}
        self.capacity: dict[int, int] = {}

    def open(self, holder, capacity):
        self.held[holder], self.expected[holder] = {}, []
        self.floor[holder], self.capacity[holder] = (-1, 0), capacity

    def add(self, holder, blocks, stamp, first=0):
        held = self.held[holder]
        for place, block in enumerate(blocks, first):
            if (stamp, -place) > self.floor[holder]:
                held[block] = max(held.get(block, (stamp, -place)), (stamp, -place))

    def drop(self, holder, floor):
        self.floor[holder] = floor = max(floor, self.floor[holder])
        held = self.held[holder]
        self.held[holder] = {block: key for block, key in held.items() if key > floor}

    def evict(self, holder):
        oldest = sorted(self.held[holder].values())
        num_over = len(oldest) - self.capacity[holder]
        if num_over > 0:
            self.drop(holder, oldest[num_over - 1])

    def depths(self, chain, holders, *, wholly=False):
        """`wholly`: what was held of an expected prompt when it was placed is there, too."""
        found = {}
        for holder in holders:
            there = set(self.held[holder])
            for expected, num_held in self.expected[holder]:
                there.update(expected if wholly else expected[num_held:])
            depth = 0
            while depth < len(chain) and chain[depth] in there:
                depth += 1
            if depth:
                found[holder] = depth
        return found


class IndexMachine(RuleBasedStateMachine):
    """With no slack for outdated entries, so that they are thinned out again and again.

    Even stamps come in order, odd ones late.
    """

    def __init__(self):
        super().__init__()
        self.slack, prefix_index._SLACK_BLOCKS = prefix_index._SLACK_BLOCKS, 0
        self.index, self.model, self.stamp = PrefixIndex(), Model(), 0
        self.late: set[int] = set()

    def teardown(self):
        prefix_index._SLACK_BLOCKS = self.slack

    @rule(capacity=st.integers(1, 12))
    def open_holder(self, capacity):
        if len(self.model.held) < 5:
            holder = self.index.open_holder(capacity * TEXT_BLOCK_BYTES)
            assert holder not in self.model.held
            self.model.open(holder, capacity)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model.held)))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), chain=st.sampled_from(CHAINS), again=st.booleans())
    def add(self, data, chain, again):
        holder = self.pick(data)
        self.stamp += 2
        for _ in range(1 + again):
            self.index.add(holder, chain, self.stamp)
        self.model.add(holder, chain, self.stamp)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), chain=st.sampled_from(CHAINS), back=st.integers(0, 6))
    def add_late(self, data, chain, back):
        holder, stamp = self.pick(data), self.stamp - 2 * back - 1
        if stamp not in self.late:
            self.late.add(stamp)
            self.index.add(holder, chain, stamp)
            self.model.add(holder, chain, stamp)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def merge(self, data):
        holder, other = self.pick(data), self.pick(data)
        self.index.merge(holder, self.index.touches(other), self.index.floor(other))
        self.model.drop(holder, self.model.floor[other])
        for block, (stamp, place) in self.model.held[other].items():
            self.model.add(holder, [block], stamp, -place)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), chain=st.sampled_from(CHAINS))
    def expect(self, data, chain):
        holder = self.pick(data)
        matched = self.model.depths(chain, [holder]).get(holder, 0)
        num_held = self.index.num_held(holder, chain, matched)
        assert num_held == sum(block in self.model.held[holder] for block in chain)
        self.index.expect(holder, chain, num_held)
        self.model.expected[holder].append((chain, num_held))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def unexpect(self, data):
        holder = self.pick(data)
        expected = self.model.expected[holder]
        if expected:
            self.index.unexpect(holder, *expected.pop(data.draw(st.integers(0, len(expected) - 1))))

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), back=st.integers(-1, 12), keep=st.integers(0, 4))
    def drop_below(self, data, back, keep):
        holder, floor = self.pick(data), Floor(self.stamp - back, keep)
        before = len(self.model.held[holder])
        self.model.drop(holder, (floor.stamp, -floor.keep))
        assert before - len(self.model.held[holder]) == self.index.drop_below(holder, floor)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def trim(self, data):
        holder = self.pick(data)
        assert self.index.trim(holder) == (
            len(self.model.held[holder]) > self.model.capacity[holder]
        )
        self.model.evict(holder)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), capacity=st.integers(1, 12))
    def set_capacity(self, data, capacity):
        holder = self.pick(data)
        self.index.set_capacity(holder, capacity * TEXT_BLOCK_BYTES)
        self.model.capacity[holder] = capacity

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def retire(self, data):
        holder = self.pick(data)
        self.index.retire(holder)
        del self.model.held[holder], self.model.capacity[holder], self.model.expected[holder]

    @invariant()
    def agrees_with_the_model(self):
        holders = sorted(self.model.held)
        mask = sum(1 << holder for holder in holders)
        for chain in CHAINS:
            found = self.index.lookup(chain, mask)
            least = self.model.depths(chain, holders)
            most = self.model.depths(chain, holders, wholly=True)  # more only if that was dropped
            for holder in holders:
                assert least.get(holder, 0) <= found.get(holder, 0) <= most.get(holder, 0)
        for holder in holders:
            held = len(self.model.held[holder])
            assert held == self.index.num_blocks(holder)
            stamps = {block: key[0] for block, key in self.model.held[holder].items()}
            assert list(stamps.values()) == self.index.stamps(holder, list(stamps))
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

    index.expect(holder, chain[:61], 60)
    assert {holder: 61} == index.lookup(chain, 1 << holder)
    assert index.num_bytes(holder) == chain_bytes(60)
    index.unexpect(holder, chain[:61], 60)
    assert {holder: 60} == index.lookup(chain, 1 << holder)

    index.set_capacity(holder, chain_bytes(60) - 1)
    assert index.num_bytes(holder) == chain_bytes(60)
    index.trim(holder)
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
