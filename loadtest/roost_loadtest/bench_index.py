"""Benchmark: what it costs to know from KV events who holds what.

    lookup    a prompt of many token blocks over many replicas, by token chain and by text
    events    blocks stored and removed a second
    memory    of each block and holder
    churn     replicas that fill, evict and restart under a cap: does memory stay flat?

Each figure stands beside its goal; a ratio below 1 is better than it.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from array import array
from collections import deque
from functools import partial
from random import Random
from statistics import median

from roost_loadtest.local_processes import resident_bytes
from roost_loadtest.median_us import median_us
from roost_router.index.text_chain import chain_bytes, text_chain
from roost_router.index.token_index import TokenIndex
from roost_router.index.token_knowledge import TokenKnowledge, hash_prompt
from roost_wire.kv_events import BlockRemoved, BlockStored, KvEvent, Tier
from roost_wire.token_chain import block_hashes

_SIZE = 16
_GOAL_LOOKUP_US = 5.0
_GOAL_BYTES = 24.0
_GOAL_BLOCKS_PER_S = 250_000.0


def bench_index(*, num_holders: int, num_blocks: int, rounds: int, churn_s: float) -> None:
    """Print all four tables."""
    _bench_lookup(num_holders, num_blocks, rounds)
    _bench_events(rounds)
    _bench_memory()
    _bench_churn(churn_s)


# lookup


def _bench_lookup(num_holders: int, num_blocks: int, rounds: int) -> None:
    rng = Random(1)
    knowledge = TokenKnowledge(1 << 32, 1 << 28)
    index = knowledge.index
    holders = [index.open_holder(hashes_are_chain=True) for _ in range(num_holders)]
    everyone = (1 << num_holders) - 1
    for _ in range(200):  # others' prompts, so that a lookup misses the CPU's caches
        index.apply(rng.choice(holders), _prompt(rng, 1000))
    print(f"\nlookup: {num_blocks} blocks, {num_holders} replicas, {len(index)} blocks in the map")
    print(f"{'who holds it':<34} {'by chain':>10} {'by text':>10} {'to goal':>8}")
    cases: list[tuple[str, list[int]]] = [
        ("nobody", []),
        ("all of it: one", [num_blocks]),
        ("all of it: everyone", [num_blocks] * num_holders),
        ("a third: everyone", [num_blocks // 3] * num_holders),
        ("two depths", [num_blocks * (1 + n % 2) // 3 for n in range(num_holders)]),
        ("sixteen depths", [num_blocks * (1 + n % 16) // 17 for n in range(num_holders)]),
    ]
    for name, depths in cases:
        text = rng.randbytes(num_blocks * _SIZE * 4)
        tokens = array("I", text)
        event = _stored(tokens)
        for holder, depth in zip(holders, depths, strict=False):
            index.apply(holder, _first(event, depth))
        texts, chain = text_chain(text), array("Q", event.block_hashes)
        certain = [chain_bytes(place + 1) // 4 for place in range(len(texts))]
        knowledge.bind(texts, hash_prompt(tokens, knowledge.block_sizes(), None, None), certain)
        binding = knowledge.binding(_SIZE)
        assert binding is not None
        by_chain = median_us(partial(index.lookup, chain, everyone), rounds)
        by_text = median_us(partial(binding.lookup, index, texts, everyone), rounds)
        print(
            f"{name:<34} {by_chain:>7.1f} µs {by_text:>7.1f} µs {by_chain / _GOAL_LOOKUP_US:>8.2f}"
        )


# events


def _bench_events(rounds: int) -> None:
    print(f"\nevents, a process\n{'':<34} {'blocks/s':>12} {'to goal':>8}")
    rows: list[tuple[str, int, bool]] = [
        ("chains of 100, hashed anew", 100, False),
        ("chains of 100, our engine's", 100, True),
        ("blocks one by one, hashed anew", 1, False),
        ("blocks one by one, our engine's", 1, True),
    ]
    for name, num_blocks, is_ours in rows:
        rates = [_event_rate(num_blocks, is_ours, seed) for seed in range(max(1, rounds // 20))]
        rate = median(rates)
        print(f"{name:<34} {rate:>12,.0f} {_GOAL_BLOCKS_PER_S / rate:>8.2f}")


def _event_rate(num_blocks: int, is_ours: bool, seed: int) -> float:
    """Blocks a second, half of them stored, half removed again, last first."""
    rng, index = Random(seed), TokenIndex(1 << 30)
    holders = [index.open_holder(hashes_are_chain=is_ours) for _ in range(8)]
    events: list[tuple[int, KvEvent]] = []
    for number in range(10_000 // 100):
        holder, whole = holders[number % 8], _prompt(rng, 100)
        parts = [_part(whole, at, num_blocks) for at in range(0, 100, num_blocks)]
        events += [(holder, part) for part in parts]
    removals: list[tuple[int, KvEvent]] = [
        (holder, BlockRemoved(event.block_hashes[::-1], event.tier))
        for holder, event in reversed(events)
        if isinstance(event, BlockStored)
    ]
    started = time.perf_counter()
    for holder, event in (*events, *removals):
        index.apply(holder, event)
    return 20_000 / (time.perf_counter() - started)


# memory


def _bench_memory() -> None:
    print("\nmemory of a block and holder; of what is counted, what Python asks its allocator for")
    print(
        f"{'holders of each block':<32} {'above map':>12} {'to goal':>8} {'in all':>8} {'asked':>5}"
    )
    for copies in (1, 4, 16):
        rng, pairs = Random(3), 0
        tracemalloc.start()
        index = TokenIndex(1 << 32)
        holders = [index.open_holder(hashes_are_chain=True) for _ in range(64)]
        while pairs < 300_000:
            event = _prompt(rng, 200)
            for holder in rng.sample(holders, copies):
                index.apply(holder, event)
            pairs += 200 * copies
        asked = tracemalloc.get_traced_memory()[0] / index.num_bytes
        tracemalloc.stop()
        above, whole = index.num_holder_bytes / pairs, index.num_bytes / pairs
        print(
            f"{copies:<32} {above:>10.1f} B {above / _GOAL_BYTES:>8.2f}"
            f" {whole:>6.0f} B {asked:>5.2f}"
        )


# churn


def _bench_churn(seconds: float) -> None:
    """Replicas of 20,000 blocks that evict the oldest chain; one restarts now and then."""
    cap = 32 << 20
    rng, index = Random(4), TokenIndex(cap)
    held: dict[int, deque[BlockStored]] = {
        index.open_holder(hashes_are_chain=True): deque() for _ in range(16)
    }
    prefixes = [_prompt(rng, 20) for _ in range(50)]
    print(
        f"\nchurn under a cap of {cap / 1e6:.1f} MB, 16 replicas of 20,000 blocks, {seconds:.0f} s"
    )
    print(f"{'after':>8} {'blocks told':>12} {'counted':>10} {'of cap':>8} {'process':>10}")
    started, told, shown = time.perf_counter(), 0, 0
    while shown < 8:
        holder = rng.choice(list(held))
        told += _live_a_little(rng, index, held, holder, prefixes)
        if rng.random() < 1 / 2000:
            index.retire(holder)
            del held[holder]
            held[index.open_holder(hashes_are_chain=True)] = deque()
        passed = time.perf_counter() - started
        if passed >= (shown + 1) * seconds / 8:
            shown += 1
            print(
                f"{passed:>6.0f} s {told:>12,} {index.num_bytes / 1e6:>7.1f} MB "
                f"{index.num_bytes / cap:>8.3f} {resident_bytes(os.getpid()) / 1e6:>7.1f} MB"
            )


def _live_a_little(
    rng: Random,
    index: TokenIndex,
    held: dict[int, deque[BlockStored]],
    holder: int,
    prefixes: list[BlockStored],
) -> int:
    """A new prompt after a shared prefix, and evictions until it fits; blocks told."""
    prefix = rng.choice(prefixes)
    rest = _prompt(rng, rng.randrange(20, 200))
    tokens = array("I", prefix.token_ids) + array("I", rest.token_ids)
    event, chains = _stored(tokens), held[holder]
    index.apply(holder, event)
    chains.append(event)
    told = len(event.block_hashes)
    while sum(len(chain.block_hashes) for chain in chains) > 20_000:
        oldest = chains.popleft()
        index.apply(holder, BlockRemoved(oldest.block_hashes[:19:-1], Tier.DEVICE))
        told += len(oldest.block_hashes) - 20
    return told


# events to apply


def _prompt(rng: Random, num_blocks: int) -> BlockStored:
    return _stored(array("I", rng.randbytes(4 * _SIZE * num_blocks)))


def _stored(tokens: array[int]) -> BlockStored:
    chain = tuple(block_hashes(tokens, _SIZE))
    return BlockStored(chain, None, tuple(tokens), _SIZE, Tier.DEVICE)


def _first(event: BlockStored, num_blocks: int) -> BlockStored:
    return _part(event, 0, num_blocks)


def _part(event: BlockStored, at: int, num_blocks: int) -> BlockStored:
    """Some of an event's blocks, as an event of their own."""
    parent = event.block_hashes[at - 1] if at else None
    return BlockStored(
        event.block_hashes[at : at + num_blocks],
        parent,
        event.token_ids[at * _SIZE : (at + num_blocks) * _SIZE],
        _SIZE,
        event.tier,
    )
