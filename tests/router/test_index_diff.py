"""What is told of changes is enough to have what is known here elsewhere."""

from __future__ import annotations

from random import Random

import pytest

from roost_router.index.prefix_index import Floor, PrefixIndex, Touch
from roost_router.index.token_index import DEVICE_TIER, HOST_TIER, TokenIndex
from roost_router.shared.index_diff import (
    MAX_DEPTH,
    MAX_WAITING,
    Step,
    TextView,
    TokenView,
    View,
    by_tier,
)
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier

MANY = 1 << 40


def chain_of(*tags: int) -> list[int]:
    """Hashes of a chain: block i is the same in all chains whose first i + 1 tags are."""
    return [Random(str(tags[: end + 1])).getrandbits(64) for end in range(len(tags))]


class Elsewhere:
    """What somebody has who hears steps only."""

    def __init__(self) -> None:
        self.device: dict[int, int] = {}
        self.host: dict[int, int] = {}

    def hear(self, steps: list[Step]) -> None:
        for tier, batch in by_tier(steps).items():
            where = self.device if tier is Tier.DEVICE else self.host
            for block in batch.removed:
                where.pop(block, None)
            where.update(zip(batch.added, batch.depths, strict=True))

    def hear_all(self, view: View, most: int = 7) -> None:
        while steps := view.take(most):
            self.hear(steps)


def texts_held(index: PrefixIndex, holder: int) -> dict[int, int]:
    return {
        block: touch.first + place
        for touch in index.touches(holder)
        for place, block in enumerate(touch.blocks)
    }


@pytest.mark.parametrize("seed", range(20))
def test_texts_are_the_same_elsewhere(seed):
    rng = Random(seed)
    index = PrefixIndex()
    holder, other = index.open_holder(MANY), index.open_holder(MANY)
    elsewhere = Elsewhere()
    view: TextView | None = None
    for stamp in range(1, 301):
        chain = chain_of(*(rng.randrange(2) for _ in range(rng.randrange(1, 9))))
        kind = rng.random()
        if kind < 0.5:
            index.add(rng.choice([holder, other]), chain, stamp - rng.choice([0, 0, 5]))
        elif kind < 0.6:
            index.set_capacity(holder, 256 * rng.randrange(30))
            index.trim(holder)
        elif kind < 0.65:
            index.forget_older(holder, stamp - rng.randrange(60))
        elif kind < 0.7:
            index.merge(holder, [Touch(stamp, 0, chain)], Floor(stamp - 90, 0))
        elif view is not None:
            steps = view.take(rng.randrange(1, 9))
            if rng.random() < 0.3:
                view.put_back(steps)
            else:
                elsewhere.hear(steps)
        else:
            view = TextView(index, holder)
    assert view is not None
    elsewhere.hear_all(view)
    assert elsewhere.device == texts_held(index, holder)
    assert not elsewhere.host
    assert not view.is_over


def tokens_held(index: TokenIndex, holder: int, tier: int) -> set[int]:
    table = index._held[holder].table
    return {
        int.from_bytes(value[:8], "little")
        for place in range(table.num_buckets)
        for _, value in table.bucket(place)
        if value[14] & tier
    }


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_the_same_elsewhere_in_each_tier(seed):
    rng = Random(seed)
    index = TokenIndex(1 << 24)
    holder, other = (index.open_holder(hashes_are_chain=True) for _ in range(2))
    elsewhere = Elsewhere()
    depths: dict[int, int] = {}
    view: TokenView | None = None
    for step in range(600):
        chain = chain_of(*(rng.randrange(2) for _ in range(rng.randrange(1, 9))))
        depths |= {block: place for place, block in enumerate(chain)}
        tier = rng.choice([Tier.DEVICE, Tier.DEVICE, Tier.HOST])
        kind = rng.random()
        if kind < 0.4:
            tokens = (0,) * 16 * len(chain)
            event = BlockStored(tuple(chain), None, tokens, 16, tier)
            index.apply(rng.choice([holder, other]), event)
        elif kind < 0.7:
            index.apply(holder, BlockRemoved((rng.choice(chain),), tier))
        elif view is not None:
            steps = view.take(rng.randrange(1, 9))
            if rng.random() < 0.3:
                view.put_back(steps)
            else:
                elsewhere.hear(steps)
        elif step > 100:
            view = TokenView(index, holder)
    assert view is not None
    elsewhere.hear_all(view)
    assert set(elsewhere.device) == tokens_held(index, holder, DEVICE_TIER)
    assert set(elsewhere.host) == tokens_held(index, holder, HOST_TIER)
    both = elsewhere.device | elsewhere.host
    assert both == {block: depths[block] for block in both}
    assert not view.is_over


def stored(names: list[int], tokens: list[int], parent: int | None = None) -> BlockStored:
    return BlockStored(tuple(names), parent, tuple(tokens), 16, Tier.DEVICE)


def test_a_block_that_is_there_twice_is_gone_with_the_second():
    index = TokenIndex(1 << 24)
    holder = index.open_holder()
    view, elsewhere = TokenView(index, holder), Elsewhere()
    for name in (1, 2):
        index.apply(holder, stored([name], [5] * 16))
    elsewhere.hear_all(view)
    assert len(elsewhere.device) == 1

    index.apply(holder, BlockRemoved((1,), Tier.DEVICE))
    elsewhere.hear_all(view)
    assert len(elsewhere.device) == 1

    index.apply(holder, BlockRemoved((2,), Tier.DEVICE))
    elsewhere.hear_all(view)
    assert not elsewhere.device


def test_what_is_read_while_the_table_grows_is_whole():
    index = TokenIndex(1 << 26)
    holder = index.open_holder(hashes_are_chain=True)
    rng = Random(1)
    view, elsewhere = None, Elsewhere()
    names: list[int] = []
    for number in range(3000):
        name = rng.getrandbits(64)
        index.apply(holder, stored([name], [number] * 16, names[-1] if number % 50 else None))
        names.append(name)
        if number == 500:
            view = TokenView(index, holder)
        if view is not None and not number % 20:
            elsewhere.hear(view.take(5))
    assert view is not None
    elsewhere.hear_all(view)
    assert elsewhere.device == {name: number % 50 for number, name in enumerate(names)}


def test_a_long_chain_is_told_whole_in_bounded_pieces():
    index = TokenIndex(1 << 26)
    holder = index.open_holder(hashes_are_chain=True)
    names = Random(1).sample(range(1 << 62), 3 * MAX_DEPTH)
    index.apply(holder, stored(names, [1] * 16 * len(names)))
    view, elsewhere = TokenView(index, holder), Elsewhere()

    elsewhere.hear(view.take(8))
    assert 0 < len(view._depths) <= 8 + MAX_DEPTH
    elsewhere.hear_all(view)

    told = [elsewhere.device[name] for name in names]
    assert told == [min(place, MAX_DEPTH) for place in range(len(names))]


def test_parents_are_added_first_and_removed_last():
    steps = [Step(n, n, depth, tiers) for n, (depth, tiers) in enumerate([(3, 1), (0, 1), (2, 1)])]
    gone = [Step(n, n, depth, 0) for n, depth in enumerate([0, 2, 1], start=10)]

    batches = by_tier(steps + gone)

    assert batches[Tier.DEVICE] == ([1, 2, 0], [0, 2, 3], [11, 12, 10])
    assert batches[Tier.HOST].added == []


def test_a_view_is_over_with_its_holder():
    texts, tokens = PrefixIndex(), TokenIndex(1 << 24)
    views: list[View] = []
    for retire in (texts.retire, tokens.retire):
        index = texts if retire == texts.retire else tokens
        holder = texts.open_holder(MANY) if index is texts else tokens.open_holder()
        view = TextView(texts, holder) if index is texts else TokenView(tokens, holder)
        assert not view.is_over
        retire(holder)
        views.append(view)
    assert texts.open_holder(MANY) == 0  # the same number again
    assert [view.is_over for view in views] == [True, True]
    for view in views:
        view.close()


def test_a_cache_that_is_cleared_ends_the_view():
    index = TokenIndex(1 << 24)
    holder = index.open_holder()
    view = TokenView(index, holder)
    index.apply(holder, AllBlocksCleared())
    assert view.is_over


def test_a_view_that_waits_for_too_long_is_over():
    index = PrefixIndex()
    holder = index.open_holder(MANY)
    view = TextView(index, holder)
    for start in range(0, MAX_WAITING, 400):
        index.add(holder, list(range(start, start + 400)), start + 1)
    assert not view.is_over
    index.add(holder, [MAX_WAITING], MAX_WAITING + 1)
    assert view.is_over


def test_a_view_that_is_closed_notes_nothing():
    index = PrefixIndex()
    holder = index.open_holder(MANY)
    view = TextView(index, holder)
    view.close()
    index.add(holder, [1, 2], 1)
    assert view.take(9) == []
