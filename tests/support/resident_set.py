"""What a follower of KV events believes, the slow twin of every index; a pool to follow."""

from __future__ import annotations

from functools import reduce
from operator import xor

from roost_engine.blocks import BlockPool
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, Tier
from roost_wire.token_chain import block_hashes


class ResidentSet:
    """Hashes by tier. Every event must make sense where it comes."""

    def __init__(self) -> None:
        self.hashes: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        self.num_events = 0

    def apply(self, event: KvEvent) -> None:
        self.num_events += 1
        match event:
            case AllBlocksCleared():
                for hashes in self.hashes.values():
                    hashes.clear()
            case BlockRemoved():
                for block_hash in event.block_hashes:
                    self.hashes[event.tier].remove(block_hash)
            case BlockStored():
                self._check_names(event)
                known = self.hashes[Tier.DEVICE] | self.hashes[Tier.HOST]
                assert event.parent_hash is None or event.parent_hash in known, "no parent"
                for block_hash in event.block_hashes:
                    assert block_hash not in self.hashes[event.tier], "stored twice"
                    self.hashes[event.tier].add(block_hash)

    def digest(self, tier: Tier) -> int:
        return reduce(xor, self.hashes[tier], 0)

    def check_equals(self, pool: BlockPool) -> None:
        """The replayed set is what the pool holds, block by block and by its digests."""
        held: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        for cached in pool._cache:
            held[cached.tier].add(cached.hash)
        assert held == self.hashes
        for tier in Tier:
            assert pool.digest(tier) == self.digest(tier)

    def _check_names(self, event: BlockStored) -> None:
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        if event.parent_hash is None:
            assert tuple(block_hashes(event.token_ids, event.block_size)) == event.block_hashes


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Hit what is cached, compute the rest; the table, held."""
    size = pool.block_size
    hit = pool.lookup(tokens, pool.chain(tokens))
    pool.acquire(hit.blocks)
    try:
        restored = pool.restore(hit.offloaded)
        table = hit.blocks + restored
        table += pool.allocate(-(-len(tokens) // size) - len(table))
    except Exception:
        pool.release(hit.blocks)
        raise
    for index in range(len(tokens) // size):
        pool.register(table, index, tokens[index * size : (index + 1) * size])
    return table
