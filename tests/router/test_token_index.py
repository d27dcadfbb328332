"""The token index against its slow twin, and at its limits."""

from __future__ import annotations

import tracemalloc
from array import array
from collections import Counter
from random import Random

import pytest

from roost_router.index.packed_table import KEY_MASK, PackedTable
from roost_router.index.token_identity import chain_root, follow, local_hashes
from roost_router.index.token_index import TokenIndex
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from roost_wire.token_chain import block_hashes, join_local, local_hash

SIZE = 16
#: A block in its engine's eyes: the path to it, each step a content and a variant. Variants are
#: blocks of equal tokens that an engine calls differently, as pages of bigrams are.
Node = tuple[tuple[int, int], ...]
Content = tuple[int, ...]


def tokens_of(content: Content, size: int = SIZE) -> list[int]:
    return [number * 100 + place for number in content for place in range(size)]


def chain_of(content: Content, size: int = SIZE) -> array[int]:
    return array("Q", block_hashes(tokens_of(content, size), size))


def content_of(node: Node) -> Content:
    return tuple(number for number, _ in node)


def name_of(seed: int, node: Node) -> int:
    """An engine's own hash of a block."""
    return Random(repr((seed, node))).getrandbits(64)


def stored(seed: int, node: Node, first: int, tier: Tier = Tier.DEVICE) -> BlockStored:
    """The blocks of `node` from the place `first` on."""
    names = [name_of(seed, node[: place + 1]) for place in range(len(node))]
    return BlockStored(
        tuple(names[first:]),
        names[first - 1] if first else None,
        tuple(tokens_of(content_of(node[first:]))),
        SIZE,
        tier,
    )


def removed(seed: int, *nodes: Node, tier: Tier = Tier.DEVICE) -> BlockRemoved:
    return BlockRemoved(tuple(name_of(seed, node) for node in nodes), tier)


def path(*content: int) -> Node:
    return tuple((number, 0) for number in content)


def by_holder(levels: list[tuple[int, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for matched, mask in levels:
        assert matched > 0
        for holder in range(mask.bit_length()):
            if mask >> holder & 1:
                assert holder not in found
                found[holder] = matched
    return found


class Twin:
    """One holder by brute force: copies of each block, by tier."""

    def __init__(self, *, counts_copies: bool) -> None:
        self.counts_copies = counts_copies
        self.copies: Counter[tuple[Node, Tier]] = Counter()

    def resident(self) -> set[Node]:
        return {node for (node, _), number in self.copies.items() if number}

    def named(self) -> set[Node]:
        """Blocks that can be a parent: resident, or before one that is."""
        return {node[:end] for node in self.resident() for end in range(1, len(node) + 1)}

    def store(self, node: Node, first: int, tier: Tier) -> None:
        if first and node[:first] not in self.named():
            return
        for end in range(first + 1, len(node) + 1):
            key = (node[:end], tier)
            self.copies[key] = self.copies[key] + 1 if self.counts_copies else 1

    def remove(self, node: Node, tier: Tier) -> None:
        self.copies[node, tier] = max(0, self.copies[node, tier] - 1)

    def matched(self, content: Content) -> int:
        there = {content_of(node) for node in self.resident()}
        for end in range(1, len(content) + 1):
            if content[:end] not in there:
                return end - 1
        return len(content)


class Fleet:
    """Holders in the index, and a twin for each."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.index = TokenIndex(1 << 30)
        self.twins: dict[int, tuple[int, Twin]] = {}
        for _ in range(3):
            self.open()

    def open(self) -> None:
        counts_copies = self.rng.random() < 0.5
        holder = self.index.open_holder(counts_copies=counts_copies)
        self.twins[holder] = (self.rng.getrandbits(32), Twin(counts_copies=counts_copies))

    def step(self) -> None:
        rng = self.rng
        holder = rng.choice(list(self.twins))
        seed, twin = self.twins[holder]
        node = tuple((rng.randrange(2), int(rng.random() < 0.2)) for _ in range(rng.randint(1, 6)))
        tier = rng.choice(list(Tier))
        what = rng.random()
        if what < 0.5:
            first = rng.randrange(len(node))
            self.index.apply(holder, stored(seed, node, first, tier))
            twin.store(node, first, tier)
        elif what < 0.97:
            known = sorted(twin.resident()) or [node]
            nodes = [rng.choice(known) for _ in range(rng.randint(1, 4))]
            self.index.apply(holder, removed(seed, *nodes, tier=tier))
            for one in nodes:
                twin.remove(one, tier)
        elif what < 0.985:
            self.index.apply(holder, AllBlocksCleared())
            twin.copies.clear()
        else:
            self.index.retire(holder)
            del self.twins[holder]
            self.open()

    def check(self) -> None:
        content = tuple(self.rng.randrange(2) for _ in range(6))
        found = by_holder(self.index.lookup(chain_of(content), sum(1 << h for h in self.twins)))

        expected = {holder: twin.matched(content) for holder, (_, twin) in self.twins.items()}
        assert {holder: matched for holder, matched in expected.items() if matched} == found
        for holder, (_, twin) in self.twins.items():
            assert self.index.num_blocks(holder) == len(twin.resident())


@pytest.mark.parametrize("part", range(4))
def test_any_history_matches_the_slow_twin(part):
    for seed in range(part * 25, part * 25 + 25):
        fleet = Fleet(Random(seed))
        for step in range(80):
            fleet.step()
            if step % 3 == 0:
                fleet.check()


def test_nothing_is_left_once_everything_was_removed_or_retired():
    fleet = Fleet(Random(7))
    empty = fleet.index.num_bytes
    for _ in range(300):
        fleet.step()
    for holder, (seed, twin) in fleet.twins.items():
        for (node, tier), number in list(twin.copies.items()):
            for _ in range(number):
                fleet.index.apply(holder, removed(seed, node, tier=tier))
        assert fleet.index.num_blocks(holder) == 0
    for _ in range(50):  # retired blocks are swept with events
        fleet.index.apply(next(iter(fleet.twins)), removed(0, path(1)))

    assert len(fleet.index) == 0
    assert fleet.index._groups == {}
    assert fleet.index._hole_depths == fleet.index._unplaced == {}
    assert all(len(held.table) == 0 for held in fleet.index._held.values())
    fleet.index._place_ghosts()
    grown = fleet.index.num_bytes - empty
    assert grown <= sum(part.__sizeof__() for part in fleet.index._parts)


def test_engines_with_hashes_of_their_own_share_one_chain():
    index = TokenIndex(1 << 20)
    ours, vllm, other = (index.open_holder(hashes_are_chain=h) for h in (True, False, False))
    node = path(1, 2, 3)
    chain = chain_of((1, 2, 3))

    index.apply(ours, BlockStored(tuple(chain), None, tuple(tokens_of((1, 2, 3))), SIZE, Tier.HOST))
    index.apply(vllm, stored(5, node[:2], 0))
    index.apply(other, stored(6, node[:1], 0))

    assert by_holder(index.lookup(chain, 0b111)) == {ours: 3, vllm: 2, other: 1}
    assert by_holder(index.lookup(chain, 0b100)) == {other: 1}
    assert index.lookup([], 0b111) == []
    assert len(index) == 3


def test_hashes_of_tokens_stand_for_the_tokens():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    locals_ = tuple(local_hash(tokens_of((number,))) for number in (4, 5))

    index.apply(holder, BlockStored((1, 2), None, (), SIZE, Tier.DEVICE, local_hashes=locals_))

    assert index.lookup(chain_of((4, 5)), 1) == [(2, 1)]


def test_adapter_and_salt_tell_equal_tokens_apart():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    tokens = tuple(tokens_of((1,)))
    for number, (lora, salt) in enumerate([("a", None), ("a", "s"), (None, "s")]):
        event = BlockStored((number,), None, tokens, SIZE, Tier.DEVICE, lora, salt)
        index.apply(holder, event)

    assert index.lookup(chain_of((1,)), 1) == []
    for lora, salt in [("a", None), ("a", "s"), (None, "s")]:
        chain = list(follow(chain_root(lora, salt), local_hashes(tokens, SIZE)))
        assert index.lookup(chain, 1) == [(1, 1)]
    assert chain_root("a", "") == chain_root("a", None) != chain_root(None, "a")
    assert chain_root("", None) is None


def test_many_hashes_at_once_are_those_of_the_wire_contract():
    tokens = [Random(3).getrandbits(32) for _ in range(16 * 5 + 3)]

    assert list(follow(None, local_hashes(tokens, 16))) == block_hashes(tokens, 16)
    root = chain_root("adapter", None)
    assert list(follow(root, local_hashes(tokens[:16], 16))) == [
        join_local(root, local_hash(tokens[:16]))
    ]


def test_a_block_behind_a_missing_one_counts_again_when_it_returns():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    index.apply(holder, stored(1, path(1, 2, 3, 4), 0))

    index.apply(holder, removed(1, path(1, 2)))
    without = index.lookup(chain_of((1, 2, 3, 4)), 1)
    index.apply(holder, stored(1, path(1, 2), 1))

    assert without == [(1, 1)]
    assert index.lookup(chain_of((1, 2, 3, 4)), 1) == [(4, 1)]


def test_blocks_with_an_unknown_parent_are_left_out_and_counted():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()

    index.apply(holder, stored(1, path(1, 2, 3), 1))

    assert (index.num_blocks(holder), index.num_orphans(holder)) == (0, 2)
    assert index.is_whole(holder)


@pytest.mark.parametrize(
    "event",
    [
        BlockStored((1,), None, tuple(range(32)), 32, Tier.DEVICE),  # another block size
        BlockStored((1,), None, tuple(range(15)), 16, Tier.DEVICE),
        BlockStored((1, 2), None, (), 16, Tier.DEVICE, local_hashes=(1,)),
        BlockStored((1,), None, (), 0, Tier.DEVICE),
    ],
)
def test_what_an_engine_may_not_say_is_not_noted(event):
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    index.apply(holder, stored(1, path(9), 0))

    index.apply(holder, event)

    assert index.num_blocks(holder) == 1
    assert not index.is_whole(holder)


def test_an_event_that_names_a_block_twice_leaves_nothing_behind():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    index.apply(holder, BlockStored((5, 5), None, tuple(tokens_of((1, 2))), SIZE, Tier.DEVICE))

    index.apply(holder, BlockRemoved((5,), Tier.DEVICE))

    assert (index.num_blocks(holder), len(index), len(index._held[holder].table)) == (0, 0, 0)


def test_a_block_with_more_children_than_can_be_counted_stays_right():
    index = TokenIndex(1 << 28)
    holder = index.open_holder()
    index.apply(holder, stored(1, path(1), 0))
    parent = name_of(1, path(1))
    names = range(10, 10 + (1 << 14) + 5)
    for name in names:
        tokens = tuple(tokens_of((name,)))
        index.apply(holder, BlockStored((name,), parent, tokens, SIZE, Tier.DEVICE))

    index.apply(holder, removed(1, path(1)))
    cut = index.lookup(chain_of((1, 12)), 1)
    index.apply(holder, BlockRemoved(tuple(names[:-1]), Tier.DEVICE))
    index.apply(holder, stored(1, path(1), 0))

    assert cut == []
    assert index.num_blocks(holder) == 2
    assert index.lookup(chain_of((1, names[-1])), 1) == [(2, 1)]


# pages of fewer than 16 tokens


def pages(start: int, end: int, parent: int | None, page: int = 1) -> BlockStored:
    """Pages of the text whose tokens are 0, 1, 2, ...; named by the token after their last."""
    names = tuple(1000 + number for number in range(start + page, end + 1, page))
    return BlockStored(names, parent, tuple(range(start, end)), page, Tier.DEVICE)


@pytest.mark.parametrize(("page", "block"), [(1, 16), (2, 16), (5, 20), (8, 16), (15, 30)])
def test_small_pages_are_joined_to_blocks(page, block):
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    end = page * (3 * block // page + 1)
    for start in range(0, end, page):  # SGLang tells page by page
        index.apply(holder, pages(start, start + page, 1000 + start if start else None, page))

    assert index.holders_by_block_size() == {block: 1}
    assert index.lookup(block_hashes(list(range(200)), block), 1) == [(3, 1)]


def test_a_branch_may_leave_a_block_anywhere():
    for place in range(1, 40):
        index = TokenIndex(1 << 20)
        holder = index.open_holder()
        index.apply(holder, pages(0, 40, None))
        tokens = [*range(place), *range(500, 540)]
        branch = BlockStored(
            tuple(range(5000, 5040)), 1000 + place, tuple(tokens[place:]), 1, Tier.DEVICE
        )

        index.apply(holder, branch)

        assert index.lookup(block_hashes(tokens, 16), 1) == [(len(tokens) // 16, 1)]
        assert index.lookup(block_hashes(list(range(40)), 16), 1) == [(2, 1)]


def test_pages_that_are_removed_take_their_block_with_them():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    index.apply(holder, pages(0, 40, None))

    for number in range(20, 40):  # a leaf of the radix tree, first page first
        index.apply(holder, BlockRemoved((1001 + number,), Tier.DEVICE))
    left = index.lookup(block_hashes(list(range(40)), 16), 1)
    index.apply(holder, pages(20, 40, 1020))

    assert left == [(1, 1)]
    assert index.lookup(block_hashes(list(range(40)), 16), 1) == [(2, 1)]


def test_pages_without_a_known_page_before_them_are_left_out():
    index = TokenIndex(1 << 20)
    holder = index.open_holder()
    index.apply(holder, pages(0, 16, None))

    index.apply(holder, pages(20, 40, 1020))
    index.apply(holder, BlockStored((1,), None, (), 1, Tier.DEVICE, local_hashes=(1,)))

    assert index.num_orphans(holder) == 20
    assert not index.is_whole(holder)  # hashes of single tokens cannot be joined


# memory


def long_prompt(rng: Random, num_blocks: int) -> BlockStored:
    names = tuple(rng.getrandbits(64) for _ in range(num_blocks))
    tokens = tuple(rng.choices(range(50_000), k=num_blocks * SIZE))
    return BlockStored(names, None, tokens, SIZE, Tier.DEVICE)


def test_a_block_costs_a_holder_no_more_than_24_bytes_above_the_map():
    index, rng = TokenIndex(1 << 30), Random(1)
    holders = [index.open_holder() for _ in range(4)]
    for _ in range(100):
        event = long_prompt(rng, 100)
        for holder in holders:
            index.apply(holder, event)

    assert 22 < index.num_holder_bytes / (4 * 100 * 100) <= 24


@pytest.mark.interpreted
def test_memory_is_counted_and_the_cap_holds():
    """What tracemalloc sees is less by what the allocator rounds up."""
    rng, cap = Random(2), 1_000_000
    events = [long_prompt(rng, 60) for _ in range(200)]
    tracemalloc.start()
    try:
        index = TokenIndex(cap)
        holders = [index.open_holder() for _ in range(8)]
        for number, event in enumerate(events):
            index.apply(holders[number % 8], event)
        traced = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert cap * 0.99 <= index.num_bytes <= cap * 1.01
    assert 0.85 * cap <= traced <= cap
    assert not any(index.is_whole(holder) for holder in holders)


def test_at_the_cap_what_is_known_stays_true_and_room_is_used_again():
    index, rng = TokenIndex(200_000), Random(3)
    first, second = index.open_holder(), index.open_holder()
    events = [long_prompt(rng, 50) for _ in range(60)]
    for event in events:
        index.apply(first, event)
    index.apply(second, events[-1])
    chains = [block_hashes(event.token_ids, SIZE) for event in events]
    assert index.lookup(chains[0], 0b11) == [(50, 1 << first)]
    assert index.lookup(chains[-1], 0b11) == []
    assert not index.is_whole(second)

    index.retire(first)
    third = index.open_holder()
    for _ in range(50):
        index.apply(third, events[-1])

    assert index.lookup(chains[-1], 1 << third) == [(50, 1 << third)]
    assert index.lookup(chains[0], (1 << third) | (1 << first)) == []


def test_the_cap_holds_for_small_pages_too():
    index = TokenIndex(150_000)
    holder, parent = index.open_holder(), None
    for start in range(0, 20_000, 50):
        index.apply(holder, pages(start, start + 50, parent))
        parent = 1000 + start + 50

    assert not index.is_whole(holder)
    assert 140_000 <= index.num_bytes <= 151_500


def test_retiring_does_not_look_at_blocks():
    """What was held is swept later; whoever asks about it meanwhile does not see it."""
    index, rng = TokenIndex(1 << 24), Random(4)
    old, new = index.open_holder(), index.open_holder()
    for _ in range(20):
        index.apply(old, long_prompt(rng, 50))

    index.retire(old)
    before = len(index)
    assert index.open_holder() not in (old, new)
    for _ in range(1000):
        index.apply(new, AllBlocksCleared())

    assert before == 1000
    assert len(index) == 0
    assert index.open_holder() == old


# the table below


def test_the_packed_table_is_a_dict():
    rng = Random(5)
    table, model = PackedTable(3), dict[int, bytes]()
    for _ in range(6000):
        key = rng.randrange(600) * 0x0101_0101 & KEY_MASK  # bytes that occur in each other
        value = rng.randbytes(3)
        what = rng.random()
        if what < 0.6:
            assert table.try_add(key, value) == (key not in model)
            model.setdefault(key, value)
        elif key in model and what < 0.8:
            table.set(key, value)
            model[key] = value
        elif key in model:
            table.pop(key)
            del model[key]
        assert table.get(key) == model.get(key)
        assert len(table) == len(model)

    taken: list[bytes] = []
    while table.has_buckets:
        taken += table.take_bucket()
    assert sorted(taken) == sorted(model.values())


def test_the_packed_table_finds_no_key_inside_other_records():
    table = PackedTable(16)
    key = int.from_bytes(b"abcdef", "little")
    table.try_add(1, b"..abcdef........")

    assert table.get(key) is None
    assert table.try_add(key, b"value of sixteen")
    assert table.get(key) == b"value of sixteen"


def test_all_of_one_holder_is_cleared_and_of_others_nothing():
    index, rng = TokenIndex(1 << 20), Random(6)
    one, other = index.open_holder(), index.open_holder()
    event = long_prompt(rng, 3)
    index.apply(one, event)
    index.apply(other, event)

    index.apply(one, AllBlocksCleared())

    assert index.lookup(block_hashes(event.token_ids, SIZE), 0b11) == [(3, 1 << other)]
