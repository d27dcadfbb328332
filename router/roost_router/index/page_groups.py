"""Page groups: small pages of an engine joined to blocks of at least 16 tokens. Pure.

SGLang's pages have one token, typically. A block for each would cost sixteen times the memory of
other engines' blocks of 16, in the index and for each prompt. So pages are joined:

    page     0 1 2 ... 15 | 16 17 ... 31 | 32 33          group = ceil(16 / page_size) pages
    block    ---- 0 ----- | ---- 1 ----- | (not full)     named by its last page

A page may be branched off anywhere, so each page is kept with its tokens (17 bytes for a page of
one token); what a branch is made of is found by walking back, fewer than 16 steps.

A block is taken to be there as long as its last page is: these engines remove whole ends of a
chain only (SGLang: leaves of its radix tree).

Not here: what a block is called in the index, and who holds it (token_index.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack
from typing import Final

from roost_router.index.packed_table import KEY_BYTES, KEY_MASK, PackedTable

MIN_BLOCK_TOKENS: Final = 16
_PLACE: Final = 0x0F
_TIER_SHIFT: Final = 4

#: A block that became whole: key of its last page, key of its parent (-1: none), its tokens.
Group = tuple[int, int, tuple[int, ...]]


def blocks_per_group(block_size: int) -> int:
    """How many blocks of an engine are joined: 1 from 16 tokens on."""
    return -(-MIN_BLOCK_TOKENS // block_size)


class PageGroups:
    """Pages of one holder.

    A record: previous page's key (its own: none), place in the group and tiers, tokens.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size: Final = page_size
        self._last_place = blocks_per_group(page_size) - 1
        self._pages = PackedTable(KEY_BYTES + 1 + 4 * page_size)

    @property
    def num_bytes(self) -> int:
        """Memory of the pages."""
        return self._pages.num_bytes

    def store(
        self, hashes: Sequence[int], parent_hash: int | None, token_ids: Sequence[int], tier: int
    ) -> list[Group] | None:
        """Note consecutive pages; the blocks that end with one of them, or None: parent unknown."""
        begun = self._begun(parent_hash)
        if begun is None:
            return None
        previous, parent, tokens = begun
        groups: list[Group] = []
        size, place = self.page_size, len(tokens) // self.page_size
        for number, page_hash in enumerate(hashes):
            key = page_hash & KEY_MASK
            page_tokens = token_ids[number * size : (number + 1) * size]
            tokens += page_tokens
            self._note(key, previous, place, tier, page_tokens)
            previous = key
            if place == self._last_place:
                groups.append((key, parent, tuple(tokens)))
                parent, tokens, place = key, [], 0
            else:
                place += 1
        return groups

    def remove(self, key: int, tier: int) -> None:
        """Forget that a page is in this tier."""
        record = self._pages.get(key)
        if record is None:
            return
        left = record[KEY_BYTES] & ~(tier << _TIER_SHIFT)
        if left > _PLACE:
            changed = record[:KEY_BYTES] + bytes((left,)) + record[KEY_BYTES + 1 :]
            self._pages.set(key, changed)
        else:
            self._pages.pop(key)

    def _note(self, key: int, previous: int, place: int, tier: int, tokens: Sequence[int]) -> None:
        record = self._pages.get(key)
        if record is None:
            before = (key if previous == -1 else previous).to_bytes(KEY_BYTES, "little")
            state = bytes((place | tier << _TIER_SHIFT,))
            self._pages.try_add(key, before + state + pack(f"<{self.page_size}I", *tokens))
        elif not record[KEY_BYTES] & tier << _TIER_SHIFT:
            state = bytes((record[KEY_BYTES] | tier << _TIER_SHIFT,))
            self._pages.set(key, record[:KEY_BYTES] + state + record[KEY_BYTES + 1 :])

    def _begun(self, parent_hash: int | None) -> tuple[int, int, list[int]] | None:
        """The page before (-1: none), the block before it (-1), tokens of the block begun since."""
        if parent_hash is None:
            return -1, -1, []
        last = key = parent_hash & KEY_MASK
        tokens: list[int] = []
        for steps in range(self._last_place + 1):
            record = self._pages.get(key)
            if record is None:
                return None
            place = record[KEY_BYTES] & _PLACE
            if place == self._last_place and not steps:
                return last, key, []
            tokens[:0] = unpack(f"<{self.page_size}I", record[KEY_BYTES + 1 :])
            previous = int.from_bytes(record[:KEY_BYTES], "little")
            if not place:
                return last, (-1 if previous == key else previous), tokens
            key = previous
        return None
