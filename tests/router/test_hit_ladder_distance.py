"""Stack distances against caches that are really run, whole and sampled; what the sample weighs."""

from __future__ import annotations

import sys
from collections import OrderedDict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.index.text_chain import BLOCK_BYTES
from roost_router.reuse_distance import HORIZON_S, NEVER, ReuseSample

HASHES = [Random(9).getrandbits(64) for _ in range(64)]


def lru_misses(chains: list[list[int]], capacity_bytes: int) -> list[list[int]]:
    """The slow twin: for each chain the blocks that a cache of this size lacks when it comes."""
    held: OrderedDict[int, int] = OrderedDict()
    missed = []
    for chain in chains:
        missed.append([block for block in chain if block not in held])
        for place in reversed(range(len(chain))):  # the root is touched last: it goes last
            held[chain[place]] = BLOCK_BYTES[place]
            held.move_to_end(chain[place])
        while sum(held.values()) > capacity_bytes:
            held.popitem(last=False)
    return missed


def chains_of(paths: list[list[int]]) -> list[list[int]]:
    """Chains over a tree: a block is known by the whole path to it, as a chained hash is."""
    known: dict[tuple[int, ...], int] = {}
    rng = Random(3)
    return [
        [known.setdefault(tuple(path[: end + 1]), rng.getrandbits(64)) for end in range(len(path))]
        for path in paths
    ]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=60),
    st.integers(1, 12_000),
)
@settings(max_examples=60, deadline=None)
def test_a_cache_misses_exactly_what_is_further_than_its_size(paths, capacity_bytes):
    sample, chains = ReuseSample(128), chains_of(paths)
    missed = lru_misses(chains, capacity_bytes)

    for now, (chain, lacks) in enumerate(zip(chains, missed, strict=True)):
        found = sample.touch(chain, float(now))
        if sample.num_halvings:
            return  # the tree was too large to be held whole
        assert [b for b, _ in found] == BLOCK_BYTES[: len(chain)]
        told = [
            block
            for block, (_, distance) in zip(chain, found, strict=True)
            if distance == NEVER or distance > capacity_bytes
        ]
        assert told == lacks


def test_numbers_run_out_and_distances_stay_right():
    """Touches are numbered anew after 256 here; the answers do not show it."""
    chains = [HASHES[start : start + 5] for start in Random(4).choices(range(60), k=2_000)]
    sample, whole = ReuseSample(128), ReuseSample(100_000)

    for now, chain in enumerate(chains):
        assert sample.touch(chain, float(now)) == whole.touch(chain, float(now))


def zipf_chains(number: int) -> list[list[int]]:
    """Conversations of one to twelve blocks after a system prompt of eight that all share."""
    rng = Random(5)
    system = [rng.getrandbits(64) for _ in range(8)]
    talks = [[rng.getrandbits(64) for _ in range(rng.randrange(1, 13))] for _ in range(6_000)]
    weights = [1 / (rank + 1) for rank in range(len(talks))]
    return [system + talk for talk in rng.choices(talks, weights, k=number)]


def misses(sample: ReuseSample, chains: list[list[int]]) -> list[float]:
    """Estimated bytes that caches of 100 kB, 400 kB and any size miss."""
    found = [
        (num_bytes, 1 << 50 if distance == NEVER else distance)
        for now, chain in enumerate(chains)
        for num_bytes, distance in sample.touch(chain, now * 0.1)
    ]
    return [sum(n for n, distance in found if distance > c) for c in (1e5, 4e5, 1 << 40)]


def test_one_block_in_sixteen_tells_the_misses_of_all():
    chains = zipf_chains(10_000)
    asked = sum(sum(BLOCK_BYTES[: len(chain)]) for chain in chains)
    whole, sampled = ReuseSample(40_000), ReuseSample(1_200)

    exact, estimated = misses(whole, chains), misses(sampled, chains)

    assert (whole.num_halvings, sampled.num_halvings) == (0, 4)
    assert [e / asked for e in estimated] == pytest.approx([e / asked for e in exact], abs=0.02)


@pytest.mark.parametrize("number", [1, 500, 501, 5_000])
def test_the_sample_holds_no_more_than_it_may(number):
    sample, rng = ReuseSample(500), Random(6)

    for now in range(number):
        sample.touch([rng.getrandbits(64)], float(now))
        assert len(sample) <= 500

    assert bool(sample.num_halvings) == (number > 500)


def test_what_nobody_touched_for_an_hour_goes_before_the_rate_falls():
    sample, rng = ReuseSample(500), Random(7)
    old = [[rng.getrandbits(64)] for _ in range(400)]
    for chain in old:
        sample.touch(chain, 0.0)
    sample.touch(old[0], HORIZON_S)  # touched again, so it stays

    for _ in range(300):
        sample.touch([rng.getrandbits(64)], HORIZON_S + 0.001)

    assert (sample.num_halvings, len(sample)) == (0, 301)
    assert sample.touch(old[0], HORIZON_S + 1.0)[0][1] == 256 * 301
    assert sample.touch(old[1], HORIZON_S + 1.0)[0][1] == NEVER


def test_blocks_that_come_too_fast_are_sampled_less():
    slow, fast = ReuseSample(500), ReuseSample(500)
    for number in range(1_000):
        slow.touch(HASHES[:32], number * 0.2)
        fast.touch(HASHES[:32], number * 0.001)

    assert slow.num_halvings == 0
    assert fast.num_halvings > 0
    assert all(num_bytes == 256 << fast.num_halvings for num_bytes, _ in fast.touch(HASHES, 1.0))


def test_a_sample_that_is_made_smaller_keeps_to_it():
    sample, rng = ReuseSample(1_000), Random(8)
    for now in range(1_000):
        sample.touch([rng.getrandbits(64)], float(now))

    sample.resize(100)
    while not sample.touch([rng.getrandbits(64)], 1_000.0):
        pass

    assert len(sample) <= 100


def test_a_block_takes_about_200_bytes():
    sample, rng = ReuseSample(8_192), Random(10)
    for now in range(8_192):
        sample.touch([rng.getrandbits(64)], float(now))

    tables = sum(map(sys.getsizeof, (sample._touch, sample._at, sample._times, sample._pages)))
    ints = sum(sys.getsizeof(block) + sys.getsizeof(p) for block, p in sample._touch.items())
    assert len(sample) == 8_192
    assert (tables + ints) / 8_192 <= 200
