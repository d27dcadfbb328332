"""Block pool: who uses which block of KV memory, and what is evicted when memory is short.

The pool hands out block ids; the KV tensors themselves belong to the runner. A request holds a
reference to every block of its table. When the last reference goes, a full block keeps its name
and its content until the memory is needed for something else: the free list *is* the prefix
cache, in least-recently-used order.

    evict from here                                        most recently used
    [head] <-> un-hashed <-> ... <-> chain tail <-> ... <-> chain root <-> [tail]

A chain is released tail first, so that its end is evicted before its beginning; a block whose
ancestor were gone could never be found again and would only waste memory. Un-hashed blocks go
to the front: they are reused before anything worth keeping is evicted.

With a host tier an evicted block is not lost but offloaded, and restored on a hit: the pool
notes the copies to be made (`take_copies`), in an order in which they may simply be executed.

Invariants (`check` verifies them, and those of the parts):
    * every block is either free (in the list, no references) or used (references >= 1);
    * of two free cached blocks of a chain the child is evicted first;
    * references never grow along a chain, so what others share of a table is its beginning;
    * a cached block is never written again until it has been evicted or forgotten.

Not here: names and tiers (prefix_cache.py, offload.py), how many blocks a request needs
(scheduler.py), tensors (the runner), time, I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from roost_engine.batch import BlockCopy, Direction
from roost_engine.free_list import Block, FreeList
from roost_engine.offload import HostSlots
from roost_engine.prefix_cache import CachedBlock, PrefixCache
from roost_wire.kv_events import Tier
from roost_wire.token_chain import next_block_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from roost_wire.kv_events import KvEvent


class OutOfBlocksError(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""


class Hit(msgspec.Struct, frozen=True):
    """A cached prefix: blocks on the device, and those after them that wait on the host."""

    blocks: list[int]
    offloaded: list[CachedBlock]

    def __len__(self) -> int:
        return len(self.blocks) + len(self.offloaded)


class BlockPool:
    """Reference-counted blocks with a prefix cache among the free ones. Not thread-safe."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        on_event: Callable[[KvEvent], None] | None = None,
        hash_block: Callable[[int | None, Sequence[int]], int] = next_block_hash,
    ) -> None:
        """`on_event` hears of each block that is stored or removed; it must not call back.

        `hash_block` is replaced only by tests, to force collisions.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._cache = PrefixCache(block_size, hash_block, on_event)
        self._host = HostSlots(num_host_blocks)
        self._copies: list[BlockCopy] = []
        self._free = FreeList()
        for block in self._blocks:
            self._free.push_back(block)

    @property
    def num_free(self) -> int:
        """Blocks without a reference, cached ones included: what can be allocated now."""
        return self._free.length

    @property
    def usage(self) -> float:
        """Share of the blocks that are referenced, 0 to 1."""
        return 1.0 - self._free.length / self.num_blocks

    @property
    def num_host_used(self) -> int:
        """Blocks that lie in host memory."""
        return len(self._host)

    def digest(self, tier: Tier = Tier.DEVICE) -> int:
        """XOR of the hashes that are resident in this tier. O(1)."""
        return self._cache.digest(tier)

    def snapshot(self) -> list[KvEvent]:
        """Events that lead from the empty set to what is resident now. O(cached blocks)."""
        return self._cache.snapshot()

    def take_copies(self) -> list[BlockCopy]:
        """Copies between the tiers ordered since the last call, to be executed in this order.

        Before anything is written to blocks allocated meanwhile, and before restored ones are
        read.
        """
        copies, self._copies = self._copies, []
        return copies

    # -- finding ------------------------------------------------------------------------

    def chain(self, token_ids: Sequence[int]) -> list[int]:
        """Hashes of all full blocks of `token_ids`, for `lookup`. O(tokens)."""
        return self._cache.chain(token_ids)

    def lookup(self, token_ids: Sequence[int], hashes: Sequence[int]) -> Hit:
        """The longest cached prefix of `token_ids`; takes no reference.

        `hashes` is `chain(token_ids)`, possibly cut short to bound the hit. O(blocks hit).
        """
        blocks: list[int] = []
        offloaded: list[CachedBlock] = []
        for cached in self._cache.find(token_ids, hashes):
            if cached.tier is Tier.DEVICE:
                blocks.append(cached.block_id)
            else:
                offloaded.append(cached)
        return Hit(blocks, offloaded)

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks `acquire` would take out of the free list."""
        return sum(self._blocks[block_id].ref_count == 0 for block_id in block_ids)

    def num_shared(self, block_table: Sequence[int]) -> int:
        """How many blocks at the start of a table somebody else holds as well. O(log blocks)."""
        blocks = self._blocks
        low, high = 0, len(block_table)
        if high == 0 or blocks[block_table[0]].ref_count == 1:
            return 0  # the usual case, without searching
        while low < high:
            middle = (low + high) // 2
            if blocks[block_table[middle]].ref_count > 1:
                low = middle + 1
            else:
                high = middle
        return low

    # -- taking and giving back -----------------------------------------------------------

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take a reference to each of these cached blocks, the result of a `lookup`."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                self._free.unlink(block)
            block.ref_count += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of undefined content, evicting the least recently used.

        OutOfBlocksError, and no change, if fewer are free.
        """
        if count > self._free.length:
            raise OutOfBlocksError(f"{count} blocks asked for, {self._free.length} free")
        return [self._allocate_one() for _ in range(count)]

    def restore(self, offloaded: Sequence[CachedBlock]) -> list[int]:
        """Bring blocks back to the device and take a reference to each; their ids, in order.

        `offloaded` is what a `lookup` told, and the blocks before them are held. OutOfBlocksError,
        and no change, if too few are free.
        """
        if len(offloaded) > self._free.length:
            raise OutOfBlocksError(f"{len(offloaded)} to restore, {self._free.length} free")
        slots = [cached.block_id for cached in offloaded]
        for slot in slots:
            self._host.take(slot)  # what is evicted now must not go where these still lie
        block_ids = self.allocate(len(offloaded))
        for cached, slot, block_id in zip(offloaded, slots, block_ids, strict=True):
            self._copies.append(BlockCopy(block_id, slot, Direction.IN))
            self._put_on_device(cached, self._blocks[block_id])
            self._host.free(slot)
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a table, in table order (root first)."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"{block!r} is released twice"
            block.ref_count -= 1
            if block.ref_count > 0:
                continue
            if block.cached is None:
                self._free.push_front(block)
            else:
                self._free.push_back(block)

    # -- what is cached -------------------------------------------------------------------

    def register(self, block_table: list[int], index: int, tokens: Sequence[int]) -> None:
        """Make block `index` of a table findable: its KV for `tokens` is complete.

        If an equal block is on the device already, `block_table[index]` is replaced by it and the
        duplicate is freed; one on the host gives way. The caller sees to the order (index - 1 was
        registered before) and never writes to the block again. No effect where a hash collision
        forbids caching.
        """
        block = self._blocks[block_table[index]]
        parent = self._blocks[block_table[index - 1]].cached if index > 0 else None
        if block.cached is not None or (index > 0 and parent is None):
            return
        content = tuple(tokens)
        block_hash, canonical = self._cache.name(parent, content)
        if canonical is None:
            block.cached = self._cache.add(block_hash, content, parent, block.id)
        elif canonical.parent is not parent or canonical.tokens != content:
            pass  # a collision
        elif canonical.tier is Tier.HOST:
            slot = canonical.block_id
            self._put_on_device(canonical, block)
            self._drop_slot(slot)
        else:
            self.acquire([canonical.block_id])
            self.release([block.id])
            block_table[index] = canonical.block_id

    def is_cached(self, block_id: int) -> bool:
        """Whether a lookup may find this block."""
        return self._blocks[block_id].cached is not None

    def forget(self, block_ids: Iterable[int]) -> None:
        """Take these blocks out of the prefix cache, and all that were cached after them.

        Their content is not to be trusted; who holds them keeps them. O(cached blocks).
        """
        forgotten = {
            cached
            for block_id in block_ids
            if (cached := self._blocks[block_id].cached) is not None
        }
        # Parents come first in the cache, so one pass finds all descendants.
        doomed: list[CachedBlock] = []
        for cached in self._cache:
            if cached in forgotten or cached.parent in forgotten:
                forgotten.add(cached)
                doomed.append(cached)
        for cached in reversed(doomed):
            self._cache.remove(cached)
            self._unbind(cached)

    def clear(self) -> None:
        """Forget everything; who holds blocks keeps them. O(cached blocks)."""
        cached_blocks = list(self._cache)
        self._cache.clear()
        for cached in reversed(cached_blocks):
            self._unbind(cached)

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Verify every invariant; AssertionError names the broken one. O(num_blocks).

        With `tables`, all block tables in use, reference counts are compared with them.
        """
        free = self._free.in_order()
        rank = {block.id: position for position, block in enumerate(free)}
        assert len(rank) == len(free) == self._free.length, "the free list is corrupt"
        for block in self._blocks:
            assert (block.ref_count == 0) == (block.id in rank), f"{block!r} free and used"
        self._cache.check()
        self._host.check()
        on_device = [cached for cached in self._cache if cached.tier is Tier.DEVICE]
        assert len(self._cache) == len(on_device) + len(self._host), "a slot holds nothing cached"
        named = sum(block.cached is not None for block in self._blocks)
        assert named == len(on_device), "a block is cached that nobody can find"
        for cached in on_device:
            self._check_on_device(cached, rank)
        if tables is not None:
            references = Counter(block_id for table in tables for block_id in table)
            for block in self._blocks:
                assert block.ref_count == references[block.id], f"{block!r} is leaked"

    # -- details --------------------------------------------------------------------------

    def _allocate_one(self) -> int:
        block = self._free.pop_front()
        if block.cached is not None:
            self._evict(block, block.cached)
        block.ref_count = 1
        return block.id

    def _evict(self, block: Block, cached: CachedBlock) -> None:
        """Offload a block, or forget it where there is no room for it on the host."""
        block.cached = None
        reserved = self._host.try_reserve()
        if reserved is None:
            self._cache.remove(cached)
            return
        slot, oldest = reserved
        if oldest is not None:
            self._cache.remove(oldest)
        self._copies.append(BlockCopy(block.id, slot, Direction.OUT))
        self._cache.move(cached, Tier.HOST, slot)
        self._host.hold(slot, cached)

    def _put_on_device(self, cached: CachedBlock, block: Block) -> None:
        self._cache.move(cached, Tier.DEVICE, block.id)
        block.cached = cached

    def _unbind(self, cached: CachedBlock) -> None:
        """Take the memory of a block that cannot be found any more for what comes next."""
        if cached.tier is Tier.HOST:
            self._drop_slot(cached.block_id)
            return
        block = self._blocks[cached.block_id]
        block.cached = None
        if block.ref_count == 0:
            self._free.unlink(block)
            self._free.push_front(block)

    def _drop_slot(self, slot: int) -> None:
        self._host.take(slot)
        self._host.free(slot)

    def _check_on_device(self, cached: CachedBlock, rank: dict[int, int]) -> None:
        block = self._blocks[cached.block_id]
        assert block.cached is cached, f"{cached!r} lies in {block!r}"
        if cached.parent is None:
            return
        parent = self._blocks[cached.parent.block_id]
        assert parent.ref_count >= block.ref_count, f"{block!r} is held without its parent"
        if parent.id in rank:
            assert rank[block.id] < rank[parent.id], f"{block!r} is evicted after its parent"
