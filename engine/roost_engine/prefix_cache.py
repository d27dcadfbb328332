"""Which full blocks can be found, by what name, and in which tier of memory they lie.

A chain of cached blocks is a prompt's prefix, each block pointing at the one before it:

    root <- block 1 <- block 2 <- block 3          device | host
    ------- device -------|---- host ----              (a chain leaves the device tail first)

Exactness. A hash is a name, not a proof (roost_wire.token_chain). A cached block therefore
stores its tokens *and* its parent, and `find` walks from the root: step i is a hit only if the
tokens are equal and the block's parent is the very block hit at step i-1. By induction a hit is
the KV of exactly the tokens asked for, whatever collides. A block whose name is taken by other
content is not cached, and neither is anything after it.

Every change of residency is told as a KV event and folded into the digests (roost_wire.kv_events).

Invariants (`check` verifies them):
    * one block per hash over all tiers; a block lies in exactly one tier;
    * the parent of a cached block is cached; that of a block on the device is on the device;
    * the map is ordered parents first (a block enters after its parent and leaves before it);
    * a tier's digest is the XOR of the hashes that lie in it.

Not here: memory and who holds it (blocks.py), which block leaves next (free_list.py, offload.py).
"""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

import msgspec

from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from roost_wire.token_chain import block_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from roost_wire.kv_events import KvEvent


class CachedBlock(msgspec.Struct, eq=False, gc=False):
    """A full block of a chain; changed by PrefixCache only.

    Hidden from the garbage collector, which would visit tens of thousands of them time and again:
    they point only to their ancestors, so there are no cycles to find.
    """

    hash: int
    tokens: tuple[int, ...]
    parent: CachedBlock | None
    block_id: int  # counts within its tier
    tier: Tier = Tier.DEVICE

    def __repr__(self) -> str:
        return f"<CachedBlock {self.hash:#x} {self.tier.value} {self.block_id}>"


class PrefixCache:
    """Names of resident blocks. Decides nothing: blocks.py says what enters, moves and leaves."""

    def __init__(
        self,
        block_size: int,
        hash_block: Callable[[int | None, Sequence[int]], int],
        on_event: Callable[[KvEvent], None] | None,
    ) -> None:
        """`on_event` is called with each change, in order; None: nobody listens."""
        self._block_size = block_size
        self._hash_block = hash_block
        self._on_event = on_event
        self._blocks: dict[int, CachedBlock] = {}
        self._device_digest = self._host_digest = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[CachedBlock]:
        """All cached blocks, parents before children."""
        return iter(self._blocks.values())

    def digest(self, tier: Tier) -> int:
        """XOR of all hashes that lie in this tier."""
        return self._device_digest if tier is Tier.DEVICE else self._host_digest

    def chain(self, token_ids: Sequence[int]) -> list[int]:
        """Hashes of all full blocks of `token_ids`, for `find`. O(tokens)."""
        return block_hashes(token_ids, self._block_size, hash_block=self._hash_block)

    def find(self, token_ids: Sequence[int], hashes: Sequence[int]) -> list[CachedBlock]:
        """The longest cached prefix of `token_ids`: blocks on the device, then on the host.

        `hashes` is `chain(token_ids)`, possibly cut short to bound the hit. O(blocks hit).
        """
        found: list[CachedBlock] = []
        parent: CachedBlock | None = None
        size = self._block_size
        for index, block_hash in enumerate(hashes):
            cached = self._blocks.get(block_hash)
            if cached is None or cached.parent is not parent:
                break
            if cached.tokens != tuple(token_ids[index * size : (index + 1) * size]):
                break
            found.append(cached)
            parent = cached
        return found

    def name(
        self, parent: CachedBlock | None, tokens: Sequence[int]
    ) -> tuple[int, CachedBlock | None]:
        """The hash of such a block, and the block that has this name now."""
        block_hash = self._hash_block(parent.hash if parent is not None else None, tokens)
        return block_hash, self._blocks.get(block_hash)

    def add(
        self, block_hash: int, tokens: tuple[int, ...], parent: CachedBlock | None, block_id: int
    ) -> CachedBlock:
        """Make a block on the device findable; its name is free."""
        assert block_hash not in self._blocks
        cached = CachedBlock(block_hash, tokens, parent, block_id)
        self._blocks[block_hash] = cached
        self._enter(cached)
        return cached

    def move(self, cached: CachedBlock, tier: Tier, block_id: int) -> None:
        """Note that a block lies elsewhere now. Told as stored there, then removed here."""
        left = cached.tier
        cached.tier, cached.block_id = tier, block_id
        self._enter(cached)
        self._leave(cached, left)

    def remove(self, cached: CachedBlock) -> None:
        """Make a block unfindable; it has no children."""
        del self._blocks[cached.hash]
        self._leave(cached, cached.tier)

    def clear(self) -> None:
        """Make every block unfindable, told as one event."""
        self._blocks.clear()
        self._device_digest = self._host_digest = 0
        if self._on_event is not None:
            self._on_event(AllBlocksCleared())

    def snapshot(self) -> list[KvEvent]:
        """Events that lead from the empty set to what is resident now. O(cached blocks)."""
        return [self._stored(cached) for cached in self]

    def check(self) -> None:
        """Verify the invariants; AssertionError names the broken one. O(cached blocks)."""
        seen: set[int] = set()
        for block_hash, cached in self._blocks.items():
            parent = cached.parent
            assert cached.hash == block_hash, f"{cached!r} has two names"
            assert len(cached.tokens) == self._block_size, f"{cached!r} is cached but not full"
            assert self.name(parent, cached.tokens)[0] == block_hash, f"{cached!r} is misnamed"
            if parent is not None:
                assert parent.hash in seen, f"{cached!r} comes before its parent, or outlives it"
                assert self._blocks[parent.hash] is parent, f"{cached!r} has a stale parent"
                if cached.tier is Tier.DEVICE:
                    assert parent.tier is Tier.DEVICE, f"{cached!r} is alone on the device"
            seen.add(block_hash)
        for tier in Tier:
            assert self.digest(tier) == _xor_of(self, tier), f"the digest of {tier} is wrong"

    def _enter(self, cached: CachedBlock) -> None:
        self._fold(cached.hash, cached.tier)
        if self._on_event is not None:
            self._on_event(self._stored(cached))

    def _leave(self, cached: CachedBlock, tier: Tier) -> None:
        self._fold(cached.hash, tier)
        if self._on_event is not None:
            self._on_event(BlockRemoved((cached.hash,), tier))

    def _fold(self, block_hash: int, tier: Tier) -> None:
        if tier is Tier.DEVICE:
            self._device_digest ^= block_hash
        else:
            self._host_digest ^= block_hash

    def _stored(self, cached: CachedBlock) -> BlockStored:
        parent = cached.parent
        return BlockStored(
            block_hashes=(cached.hash,),
            parent_hash=parent.hash if parent is not None else None,
            token_ids=cached.tokens,
            block_size=self._block_size,
            tier=cached.tier,
        )


def _xor_of(blocks: Iterable[CachedBlock], tier: Tier) -> int:
    return reduce(xor, (cached.hash for cached in blocks if cached.tier is tier), 0)
