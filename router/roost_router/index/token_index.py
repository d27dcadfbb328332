"""Token index: which replica holds which blocks of tokens, as its KV events tell. Pure.

    block hash of the token chain -> group of holders       (one map for the whole fleet)
    holder: name of a block, as its engine calls it -> chain hash, parent, children, tiers

Engines name blocks by hashes of their own, with seeds of their own. A block's *chain hash*
(roost_wire/token_chain.py, after token_identity.py) follows from its tokens and its parent's chain
hash, so replicas of any engine share one map, and one lookup serves all of them.

A *holder* is one epoch of one replica (of one data-parallel rank). Its number is its bit in masks.
Retired, it is forgotten in O(1); its blocks are swept later, a few with each event.

Prefix closure. A lookup bisects, so whoever holds block i of a chain should hold 0..i-1. Events
mostly see to it: parents are stored first and removed last. Where a block goes while it has
children, it stays in its holder's table without a tier, a *ghost*, until the last child is gone or
it is stored again; its depth is kept, and a lookup that found something deeper is cut there. So a
block counts exactly if it and all its ancestors are resident. A block whose parent is unknown
cannot be named; it and what follows are left out (`num_orphans`).

Memory, per block and holder: 23 bytes in a packed table. Per block: an entry of a dict, whose
value is shared by all blocks with the same holders. All is counted in `num_bytes`. At
`cap_bytes` new blocks are not noted, nor what extends them: what is known stays true, only not
whole (`is_whole`), and the caller lowers its trust in that holder.

Engines with pages of fewer than 16 tokens: page_groups.py. Chains of different block sizes are
different hashes in the same map; `holders_by_block_size` says whom to ask for which.

Not here: which text has which tokens (binding.py), transport and trust (kv/), what engines send
(roost_wire/kv_dialects).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, Protocol

from roost_router.index.packed_table import KEY_MASK, PackedTable
from roost_router.index.page_groups import PageGroups, blocks_per_group
from roost_router.index.token_identity import chain_root, follow, local_hashes
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, Tier
from roost_wire.token_chain import join_local, local_hash

#: chain hash (8 bytes), parent's key (6; its own: none), tiers (2 bits) and children (14).
_VALUE: Final = Struct("<QQ")
DEVICE_TIER: Final = 1
HOST_TIER: Final = 2
_TIERS: Final = 3
_CHILD: Final = 4
_MAX_META: Final = 0xFFFF
#: Children beyond are not counted: such a block, once removed, remains a ghost.
_MANY_CHILDREN: Final = _MAX_META - _CHILD + 1
#: The map is in parts, so that no resizing moves more than 1/256 of it at once.
_NUM_PARTS: Final = 256
_PART_SHIFT: Final = 56
#: Blocks that are added to a part between two looks at its size.
_RESIZED_EVERY: Final = 4
_KEY_BYTES: Final = 48  # an int of 64 bits
_GROUP_BYTES: Final = 48 + 32 + 120  # the object, its counter, its entry in a dict
_HELD_BYTES: Final = 640  # a holder's objects
_SIDE_ENTRY_BYTES: Final = 180  # two ints in a dict that was just resized
#: A new block takes less, but for the resizing of a part of the map.
_MOST_BYTES: Final = 512
#: Retired blocks removed with each event and each block of it: above 1 keeps up with restarts.
_SWEEP_PER_BLOCK: Final = 4


class Chain(Protocol):
    """Block hashes from a prompt's start, by their places; some may be made when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> int: ...


class _Group:
    """Holders that some blocks have in common."""

    __slots__ = ("mask", "num_blocks")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.num_blocks = 0


class _Held:
    """What one holder holds."""

    def __init__(self, number: int, *, hashes_are_chain: bool, counts_copies: bool) -> None:
        self.number = number
        self.bit = 1 << number
        self.hashes_are_chain = hashes_are_chain
        self.counts_copies = counts_copies
        self.told_size = 0  # tokens a block as the engine has them; 0: nothing was stored yet
        self.block_size = 0  # tokens a block here
        self.table = PackedTable(_VALUE.size)
        self.pages: PageGroups | None = None  # of an engine with small pages
        self.copies: dict[int, int] = {}  # by key and tier: further copies of a block
        self.twins: dict[int, int] = {}  # by chain hash: further blocks of the same tokens
        self.ghosts: dict[int, int] = {}  # by key: depth in its chain, -1 while nobody asked
        self.num_blocks = 0
        self.num_orphans = 0
        self.is_whole = True
        self.changed: dict[int, int] | None = None  # key -> chain hash, of blocks that came or went
        self.counted_bytes = 0  # of all this, in the index's sum

    def num_bytes(self) -> int:
        """Memory of all this."""
        num_bytes = _HELD_BYTES + self.table.num_bytes
        if self.copies or self.twins or self.ghosts:
            num_side = len(self.copies) + len(self.twins) + len(self.ghosts)
            num_bytes += _SIDE_ENTRY_BYTES * num_side
        return num_bytes if self.pages is None else num_bytes + self.pages.num_bytes


class TokenIndex:
    """Longest-prefix lookup in what replicas have told."""

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self._parts: list[dict[int, _Group]] = [{} for _ in range(_NUM_PARTS)]
        self._groups: dict[int, _Group] = {}
        self._held: dict[int, _Held] = {}
        self._retired: dict[int, PackedTable] = {}
        self._by_size: dict[int, int] = {}
        self._hole_depths: dict[int, int] = {}  # depth -> ghosts there
        self._unplaced: dict[tuple[int, int], None] = {}  # holder and key of ghosts of depth -1
        self._part_bytes = [part.__sizeof__() for part in self._parts]
        self._num_map_bytes = sum(self._part_bytes)
        self._num_held_bytes = 0

    def __repr__(self) -> str:
        held = ", ".join(f"{number}: {h.num_blocks}" for number, h in sorted(self._held.items()))
        return f"<TokenIndex {len(self)} blocks | holders {held or 'none'}>"

    def __len__(self) -> int:
        """Distinct blocks known, those of retired holders included until they are swept."""
        return sum(map(len, self._parts))

    @property
    def num_bytes(self) -> int:
        """Memory of all this, as the allocators count it."""
        return self._num_map_bytes + self._num_held_bytes

    @property
    def num_holder_bytes(self) -> int:
        """How much of it is for each holder's own, above the map that all share."""
        return self._num_held_bytes

    # holders

    def open_holder(self, *, hashes_are_chain: bool = False, counts_copies: bool = False) -> int:
        """A new, empty holder. O(holders).

        `hashes_are_chain`: the engine is ours and names blocks by their chain hash.
        `counts_copies`: the engine tells of each copy of a block that it is stored, and later
        that it is removed, as vLLM does when two requests compute the same prefix at once.
        """
        number = 0
        while number in self._held or number in self._retired:
            number += 1
        self._held[number] = held = _Held(
            number, hashes_are_chain=hashes_are_chain, counts_copies=counts_copies
        )
        self._count(held)
        return number

    def count_copies(self, holder: int, counts_copies: bool) -> None:
        """From now on, see `open_holder`."""
        self._held[holder].counts_copies = counts_copies

    def retire(self, holder: int) -> None:
        """Forget what `holder` held. O(its ghosts), mostly none; memory returns with events."""
        held = self._held.pop(holder)
        self._forget_size(held)
        for key in list(held.ghosts):
            self._lay(held, key)
        self._num_held_bytes += held.table.num_bytes - held.counted_bytes
        self._retired[holder] = held.table

    def watch(self, holder: int, changed: dict[int, int] | None) -> None:
        """Note in `changed` from now on which blocks come and go: their key -> their chain hash.

        None: no more, which is also what AllBlocksCleared leaves. The caller takes out what it has
        seen. Block by block the index can be read again with `bucket` and `tiers`.
        """
        self._held[holder].changed = changed

    def is_watched(self, holder: int, changed: dict[int, int]) -> bool:
        """Whether there is this holder, and its changes are noted there."""
        held = self._held.get(holder)
        return held is not None and held.changed is changed

    def num_buckets(self, holder: int) -> int:
        """Into how many parts what `holder` holds can be read. It only grows."""
        return self._held[holder].table.num_buckets

    def bucket(self, holder: int, place: int) -> list[tuple[int, int]]:
        """(key, chain hash) of the blocks in a part, ghosts too. O(blocks in it), some 32.

        Read from place 0 on, nothing is missed that is not noted as changed: blocks only move to
        later places.
        """
        records = self._held[holder].table.bucket(place)
        return [(key, int.from_bytes(value[:8], "little")) for key, value in records]

    def tiers(self, holder: int, key: int, chain: int) -> int | None:
        """Where `holder` has a block: DEVICE_TIER, HOST_TIER, both; 0: nowhere.

        None: not under this name, but it has one of the same tokens.
        """
        held = self._held[holder]
        value = held.table.get(key)
        tiers = value[14] & _TIERS if value is not None else 0
        return None if not tiers and self.holders_of(chain) & held.bit else tiers

    def parent(self, holder: int, key: int) -> int:
        """Key of the block before this one in its chain; its own: it is the first, or not there."""
        value = self._held[holder].table.get(key)
        return key if value is None else int.from_bytes(value[8:14], "little")

    def num_blocks(self, holder: int) -> int:
        """Blocks that count for `holder`, and those behind a missing one."""
        return self._held[holder].num_blocks

    def num_orphans(self, holder: int) -> int:
        """Blocks told with a parent that was not: not noted."""
        return self._held[holder].num_orphans

    def is_whole(self, holder: int) -> bool:
        """Whether all that was told could be noted. If not, blocks are missing for good."""
        return self._held[holder].is_whole

    def holders_by_block_size(self) -> dict[int, int]:
        """Tokens a block -> mask of the holders whose chains are made of such blocks."""
        return self._by_size

    # lookup

    def holders_of(self, block_hash: int) -> int:
        """Mask of those who have this block, whether or not they have what comes before it."""
        group = self._parts[block_hash >> _PART_SHIFT].get(block_hash)
        return group.mask if group is not None else 0

    def lookup(self, chain: Chain, holders: int) -> list[tuple[int, int]]:
        """(matched blocks from the start of `chain`, mask of who matched them), most first.

        Each holder in the mask `holders` is in at most one; who matches nothing is in none.
        `chain` is asked for O(distinct depths * log(len(chain))) elements, and where blocks are
        missing before others, for one at each depth of such a block.
        """
        return self.cut(self.search(chain, holders), chain.__getitem__)

    def search(self, chain: Chain, holders: int) -> list[tuple[int, int]]:
        """The same for some blocks of a prompt, in order: where a holder has one and not the next.

        That it has all before, `cut` sees to.
        """
        levels: list[tuple[int, int]] = []
        end = len(chain)
        begun = self.holders_of(chain[0]) & holders if end else 0
        whole = self.holders_of(chain[end - 1]) & begun if begun else 0
        if whole:
            levels.append((end, whole))
        parts = self._parts
        # (low, high, who holds chain[low] and, but for missing ancestors, not chain[high])
        waiting = [(0, end - 1, begun ^ whole)] if begun != whole else []
        while waiting:
            low, high, alive = waiting.pop()
            if high - low == 1:
                levels.append((high, alive))
                continue
            middle = (low + high) >> 1
            block = chain[middle]
            group = parts[block >> _PART_SHIFT].get(block)
            there = group.mask & alive if group is not None else 0
            if there != alive:
                waiting.append((low, middle, alive ^ there))
            if there:
                waiting.append((middle, high, there))
        return levels

    def cut(
        self, levels: list[tuple[int, int]], block_at: Callable[[int], int]
    ) -> list[tuple[int, int]]:
        """End each holder's match before its first missing block.

        `levels`: where residency ends, of blocks from a prompt's start; `block_at`: their hashes.
        A search found a place where it ends, maybe not the first. The first is a ghost, since
        something deeper is resident.
        """
        if not levels or not (self._hole_depths or self._unplaced):
            return levels
        self._place_ghosts()
        masks: dict[int, int] = {}
        for matched, mask in levels:
            masks[matched] = masks.get(matched, 0) | mask
        deepest = max(masks)
        for depth in sorted(self._hole_depths):
            if depth >= deepest:
                break
            present = self.holders_of(block_at(depth))
            for matched in [matched for matched in masks if matched > depth]:
                missing = masks[matched] & ~present
                masks[matched] ^= missing
                masks[depth] = masks.get(depth, 0) | missing
        return sorted(((m, mask) for m, mask in masks.items() if m and mask), reverse=True)

    # events

    def apply(self, holder: int, event: KvEvent) -> None:
        """Take in what `holder` tells. O(blocks); of AllBlocksCleared, O(blocks held).

        Events may come twice, or say what cannot be: they never make a block count that was not
        stored or was removed since.
        """
        held = self._held[holder]
        num_blocks = 1
        if isinstance(event, BlockStored):
            num_blocks += len(event.block_hashes)
            self._store(held, event)
        elif isinstance(event, BlockRemoved):
            num_blocks += len(event.block_hashes)
            tier = DEVICE_TIER if event.tier is Tier.DEVICE else HOST_TIER
            for block_hash in event.block_hashes:
                self._remove(held, block_hash & KEY_MASK, tier)
        elif isinstance(event, AllBlocksCleared):
            self._clear(held)
        self._count(held)
        if self._retired:
            self._sweep(_SWEEP_PER_BLOCK * num_blocks)

    def _store(self, held: _Held, event: BlockStored) -> None:
        size, hashes = event.block_size, event.block_hashes
        if not held.told_size and size > 0:
            self._learn_size(held, size)
        tokens, locals_ = event.token_ids, event.local_hashes
        has_content = len(tokens) == size * len(hashes) or (
            len(locals_) == len(hashes) and held.pages is None  # pages cannot be joined without
        )
        if size != held.told_size or not has_content:
            held.is_whole = False  # of another size, or of unknown content
            return
        tier = DEVICE_TIER if event.tier is Tier.DEVICE else HOST_TIER
        if held.pages is not None:
            self._store_pages(held, held.pages, event, tier)
            return
        if event.parent_hash is None:
            parent, chain = -1, chain_root(event.lora_name, event.cache_salt)
        else:
            parent = event.parent_hash & KEY_MASK
            value = self._count_child(held, parent)
            if value is None:
                held.num_orphans += len(hashes)
                return
            chain = int.from_bytes(value[:8], "little")
        if held.hashes_are_chain:
            chains: Sequence[int] = hashes
        else:
            chains = follow(chain, locals_ or local_hashes(tokens, size))
        self._store_run(held, hashes, chains, parent, tier)

    def _store_pages(self, held: _Held, pages: PageGroups, event: BlockStored, tier: int) -> None:
        """Note pages, and as blocks the groups that they complete."""
        if self._is_near_cap(len(event.block_hashes)) and not self._has_room(held):
            return
        root = chain_root(event.lora_name, event.cache_salt)
        groups = pages.store(event.block_hashes, event.parent_hash, event.token_ids, tier)
        if groups is None:
            held.num_orphans += len(event.block_hashes)
            return
        for key, parent, tokens in groups:
            chain = root
            if parent != -1:
                value = self._count_child(held, parent)
                if value is None:  # there was no room for it
                    held.num_orphans += 1
                    return
                chain = int.from_bytes(value[:8], "little")
            self._store_run(held, (key,), (join_local(chain, local_hash(tokens)),), parent, tier)

    def _store_run(
        self,
        held: _Held,
        hashes: Sequence[int],
        chains: Sequence[int],
        parent: int,
        tier: int,
    ) -> None:
        """Note consecutive blocks. The first follows the key `parent`, which counted it already.

        `parent` -1: it begins a prompt. Stops where there is no room.
        """
        table, num_left = held.table, len(hashes)
        is_counted, is_near_cap = parent != -1, self._is_near_cap(num_left)
        for block_hash, chain in zip(hashes, chains, strict=True):
            if is_near_cap and not self._has_room(held):
                if is_counted:
                    self._uncount_child(held, parent)
                return
            num_left -= 1
            key = block_hash & KEY_MASK
            # The next one is its child, and counted before it is there.
            links = (key if parent == -1 else parent) | (tier | (num_left and _CHILD)) << 48
            if table.try_add(key, _VALUE.pack(chain, links)):
                if parent != -1 and not is_counted:
                    self._count_child(held, parent)
                self._claim(held, chain)
                if held.changed is not None:
                    held.changed[key] = chain
                is_counted = True
            else:
                if is_counted:
                    self._uncount_child(held, parent)
                self._store_again(held, key, tier)
                is_counted = False
            parent = key

    def _count_child(self, held: _Held, key: int) -> bytes | None:
        return held.table.add_to_count(key, _CHILD, _MANY_CHILDREN - 1)

    def _uncount_child(self, held: _Held, key: int) -> None:
        held.table.add_to_count(key, -_CHILD, _MANY_CHILDREN - 1)

    def _store_again(self, held: _Held, key: int, tier: int) -> None:
        """A block that is in the table: in another tier, another copy, or a ghost that returns."""
        value = held.table.get(key)
        assert value is not None
        meta = value[14]
        if not meta & tier:
            held.table.set(key, value[:14] + bytes((meta | tier, value[15])))
            if held.changed is not None:
                held.changed[key] = int.from_bytes(value[:8], "little")
            if not meta & _TIERS:
                self._lay(held, key)
                self._claim(held, int.from_bytes(value[:8], "little"))
        elif held.counts_copies:
            copy = key << 2 | tier
            held.copies[copy] = held.copies.get(copy, 0) + 1

    def _remove(self, held: _Held, key: int, tier: int) -> None:
        if held.pages is not None:
            held.pages.remove(key, tier)
        if held.copies and self._remove_copy(held, key << 2 | tier):
            return
        table = held.table
        value = table.pop(key)
        if value is None:
            return
        left = value[14] & ~tier
        was_here = left != value[14]
        if was_here and held.changed is not None:
            held.changed[key] = int.from_bytes(value[:8], "little")
        if was_here and not left & _TIERS:
            self._unclaim(held, int.from_bytes(value[:8], "little"))
        if not left and not value[15]:
            self._release_parent(held, key, value)
            return
        table.try_add(key, value[:14] + bytes((left, value[15])))
        if was_here and not left & _TIERS:
            held.ghosts[key] = -1
            self._unplaced[held.number, key] = None

    def _remove_copy(self, held: _Held, copy: int) -> bool:
        """Whether there was more than one copy, of which one is gone."""
        copies = held.copies.get(copy, 0)
        if copies > 1:
            held.copies[copy] = copies - 1
        elif copies:
            del held.copies[copy]
        return copies > 0

    def _release_parent(self, held: _Held, key: int, value: bytes) -> None:
        """A block left the table: its parent has a child less. A childless ghost goes, too."""
        table, parent = held.table, int.from_bytes(value[8:14], "little")
        while parent != key:
            found = table.add_to_count(parent, -_CHILD, _MANY_CHILDREN - 1)
            assert found is not None, "a block outlives its children"
            if found[14] or found[15]:
                return
            self._lay(held, parent)
            table.pop(parent)
            key, parent = parent, int.from_bytes(found[8:14], "little")

    # ghosts

    def _lay(self, held: _Held, key: int) -> None:
        """Forget a ghost: it is resident again, or gone for good."""
        depth = held.ghosts.pop(key)
        if depth == -1:
            del self._unplaced[held.number, key]
            return
        left = self._hole_depths[depth] - 1
        if left:
            self._hole_depths[depth] = left
        else:
            del self._hole_depths[depth]

    def _place_ghosts(self) -> None:
        """Count how deep the ghosts lie that are new since the last lookup. O(their depths)."""
        for number, key in self._unplaced:
            held = self._held[number]
            depth, at, parent = 0, key, _parent_key(held, key)
            while parent != at:
                depth, at, parent = depth + 1, parent, _parent_key(held, parent)
            held.ghosts[key] = depth
            self._hole_depths[depth] = self._hole_depths.get(depth, 0) + 1
        self._unplaced.clear()

    # who has a block

    def _claim(self, held: _Held, chain: int) -> None:
        held.num_blocks += 1
        part = self._parts[chain >> _PART_SHIFT]
        group = part.get(chain)
        if group is None:
            part[chain] = self._join(held.bit)
            self._num_map_bytes += _KEY_BYTES
            if not len(part) % _RESIZED_EVERY:
                self._measure(chain >> _PART_SHIFT)
        elif group.mask & held.bit:
            held.twins[chain] = held.twins.get(chain, 0) + 1
        else:
            part[chain] = self._join(group.mask | held.bit)
            self._leave(group)

    def _measure(self, number: int) -> None:
        """Count a part of the map again: adding to it may have made it larger."""
        num_bytes = self._parts[number].__sizeof__()
        self._num_map_bytes += num_bytes - self._part_bytes[number]
        self._part_bytes[number] = num_bytes

    def _unclaim(self, held: _Held, chain: int) -> None:
        held.num_blocks -= 1
        twins = held.twins.get(chain, 0)
        if twins > 1:
            held.twins[chain] = twins - 1
        elif twins:
            del held.twins[chain]
        else:
            self._drop(held.bit, chain)

    def _drop(self, bit: int, chain: int) -> None:
        """Take a holder off a block, if it is on it."""
        part = self._parts[chain >> _PART_SHIFT]
        group = part.get(chain)
        if group is None or not group.mask & bit:
            return
        left = group.mask ^ bit
        if left:
            part[chain] = self._join(left)
        else:
            del part[chain]
            self._num_map_bytes -= _KEY_BYTES
        self._leave(group)

    def _join(self, mask: int) -> _Group:
        group = self._groups.get(mask)
        if group is None:
            group = self._groups[mask] = _Group(mask)
            self._num_map_bytes += _GROUP_BYTES + mask.__sizeof__()
        group.num_blocks += 1
        return group

    def _leave(self, group: _Group) -> None:
        group.num_blocks -= 1
        if not group.num_blocks:
            del self._groups[group.mask]
            self._num_map_bytes -= _GROUP_BYTES + group.mask.__sizeof__()

    # room

    def _count(self, held: _Held) -> None:
        num_bytes = held.num_bytes()
        self._num_held_bytes += num_bytes - held.counted_bytes
        held.counted_bytes = num_bytes

    def _is_near_cap(self, num_blocks: int) -> bool:
        """Whether so many blocks might not have room."""
        room = self.cap_bytes - self._num_map_bytes - self._num_held_bytes
        return room < (self.cap_bytes >> 6) + _MOST_BYTES * num_blocks

    def _has_room(self, held: _Held) -> bool:
        """Count anew, sweep if need be. What was counted is as old as the event."""
        self._count(held)
        if self.num_bytes >= self.cap_bytes and self._retired:
            self._sweep(_SWEEP_PER_BLOCK)
        if self.num_bytes < self.cap_bytes:
            return True
        held.is_whole = False
        return False

    def _learn_size(self, held: _Held, size: int) -> None:
        group = blocks_per_group(size)
        held.told_size, held.block_size = size, group * size
        if group > 1:
            held.pages = PageGroups(size)
        self._by_size[held.block_size] = self._by_size.get(held.block_size, 0) | held.bit

    def _forget_size(self, held: _Held) -> None:
        if held.block_size:
            self._by_size[held.block_size] &= ~held.bit
            if not self._by_size[held.block_size]:
                del self._by_size[held.block_size]

    def _clear(self, held: _Held) -> None:
        for key in list(held.ghosts):
            self._lay(held, key)
        while held.table.has_buckets:
            for value in held.table.take_bucket():
                self._drop(held.bit, int.from_bytes(value[:8], "little"))
        held.table = PackedTable(_VALUE.size)
        if held.pages is not None:
            held.pages = PageGroups(held.pages.page_size)
        held.copies.clear()
        held.twins.clear()
        held.num_blocks = held.num_orphans = 0
        held.is_whole = True
        held.changed = None

    def _sweep(self, num_blocks: int) -> None:
        """Take retired holders off about so many blocks, or a bucket more."""
        while num_blocks > 0 and self._retired:
            holder, table = next(iter(self._retired.items()))
            before = table.num_bytes
            values = table.take_bucket()
            for value in values:
                self._drop(1 << holder, int.from_bytes(value[:8], "little"))
            self._num_held_bytes += table.num_bytes - before
            num_blocks -= len(values) + 1
            if not table.has_buckets:
                del self._retired[holder]


def _parent_key(held: _Held, key: int) -> int:
    """Key of the block before this one; its own if there is none."""
    value = held.table.get(key)
    assert value is not None, "a block outlives its children"
    return int.from_bytes(value[8:14], "little")
