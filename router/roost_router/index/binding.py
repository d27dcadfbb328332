"""Binding: which token blocks stand for a text block, learnt after prompts were tokenised. Pure.

Requests come as text, events tell tokens, and no request waits for a tokenizer. So when a prompt
was tokenised, off the path, each of its text blocks is bound:

    text block hash -> number of token blocks that end by its end, and the hashes of those in it

A text block's hash includes all text before it, model and salt too, so a binding holds for every
prompt that begins alike, and prompts share what they have in common. `num_tokens` of a text block
are those that are certain whatever text comes after it (tokens/segments.py).

A lookup bisects twice: for the deepest text block that is bound, and, in the token index, for where
each holder's residency ends: first by the last token block of each text block, then within one.
What comes out is exact up to the bound depth; of what lies deeper nothing is known here.

Memory is bounded by two generations: what is bound or touched goes to the younger; when that has a
third of `cap_bytes`, the older is dropped and the younger takes its place. Dropped entries are
freed a few at a time.

Invariants
- Bound sets are closed under prefixes: a chain is bound and touched as a whole, so a text block is
  never in a younger generation than one before it. `lookup` relies on it.
- One block size each: fleets of two sizes have two of these (token_knowledge.py).

Not here: tokenising (tokens/), the text's blocks (text_chain.py), who holds what (token_index.py).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from struct import Struct
from sys import byteorder
from typing import Final

from roost_router.index.token_index import TokenIndex

#: Token blocks that end by the end of a text block; place of the first text block that has any.
_HEAD: Final = Struct("<IH")
_HASH_BYTES: Final = 8
_NONE: Final = _HEAD.pack(0, 0xFFFF)
#: Besides a dict's table: the key, and what an object of bytes has around them, rounded up.
_ENTRY_BYTES: Final = 48 + 33 + 8
#: Dropped entries freed with each text block that is bound.
_FREE_PER_BLOCK: Final = 8


class Matched:
    """What replicas hold of a prompt, as far as its tokens are known."""

    __slots__ = ("bound_tokens", "levels")

    def __init__(self, bound_tokens: int, levels: list[tuple[int, int]]) -> None:
        #: Tokens of the prompt that are known, whole blocks of them.
        self.bound_tokens = bound_tokens
        #: (matched tokens, mask of holders), most first; who matches nothing is in none.
        self.levels = levels


class _Bound:
    """The last token block of each text block from `first` on: read only where it is asked for."""

    def __init__(self, binding: Binding, chain: Sequence[int], first: int, end: int) -> None:
        self._get = binding.get
        self._chain = chain
        self._first = first
        self._len = end - first

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, place: int) -> int:
        entry = self._get(self._chain[self._first + place])
        assert entry is not None
        return int.from_bytes(entry[-_HASH_BYTES:], byteorder)


class Binding:
    """Text blocks bound to token blocks of one size."""

    def __init__(self, block_size: int, cap_bytes: int) -> None:
        self.block_size: Final = block_size
        self.cap_bytes = cap_bytes
        self._young: dict[int, bytes] = {}
        self._old: dict[int, bytes] = {}
        self._dropped: dict[int, bytes] = {}
        self._entry_bytes = [0, 0, 0]  # of the three

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __repr__(self) -> str:
        return f"<Binding of {self.block_size} tokens: {len(self)} text blocks>"

    @property
    def num_bytes(self) -> int:
        """Memory of all entries and the dicts around them."""
        dicts = (self._young, self._old, self._dropped)
        return sum(self._entry_bytes) + sum(entries.__sizeof__() for entries in dicts)

    def get(self, text_hash: int) -> bytes | None:
        """The entry of a text block: head and hashes."""
        return self._young.get(text_hash) or self._old.get(text_hash)

    def set_cap(self, cap_bytes: int) -> None:
        """Change how much memory this may take; what is beyond goes at once."""
        self.cap_bytes = cap_bytes
        while self._entry_bytes != [0, 0, 0] and self.num_bytes > cap_bytes:
            self._turn()

    def num_bound(self, text_chain: Sequence[int]) -> int:
        """How many text blocks of `text_chain`, from its start, are bound. O(log)."""
        low, high = -1, len(text_chain)  # text_chain[low] is bound, text_chain[high] is not
        if high and self.get(text_chain[high - 1]) is not None:
            return high
        while high - low > 1:
            middle = (low + high) >> 1
            if self.get(text_chain[middle]) is not None:
                low = middle
            else:
                high = middle
        return high

    def bind(
        self, text_chain: Sequence[int], token_chain: array[int], num_tokens: Sequence[int]
    ) -> None:
        """Bind the first len(num_tokens) blocks of `text_chain`, and touch them.

        `token_chain`: hashes ("Q") of the token blocks, at least of those that are certain.
        `num_tokens`: for each text block, tokens that are certain by its end; never less than for
        the block before it. O(text blocks + token blocks).
        """
        before, first = 0, 0xFFFF
        entries: list[bytes] = []
        for place, certain in enumerate(num_tokens):
            blocks = min(certain // self.block_size, len(token_chain))
            if not blocks:
                entries.append(_NONE)
                continue
            first = min(first, place)
            ended = token_chain[min(before, blocks - 1) : blocks]
            entries.append(_HEAD.pack(blocks, first) + ended.tobytes())
            before = blocks
        self._put(text_chain, entries)

    def touch(self, text_chain: Sequence[int]) -> None:
        """Keep what is bound of `text_chain` as if it had been bound now. O(text blocks)."""
        num_bound = self.num_bound(text_chain)
        entries = [entry for text in text_chain[:num_bound] if (entry := self.get(text))]
        self._put(text_chain, entries)

    def lookup(self, index: TokenIndex, text_chain: Sequence[int], holders: int) -> Matched:
        """Matched tokens of each holder in the mask `holders`. O(distinct depths * log)."""
        end = self.num_bound(text_chain)
        deepest = self.get(text_chain[end - 1]) if end else None
        if deepest is None:
            return Matched(0, [])
        num_blocks, first = _HEAD.unpack_from(deepest)
        if not num_blocks:
            return Matched(0, [])
        levels: list[tuple[int, int]] = []
        rest = holders
        for num_texts, mask in index.search(_Bound(self, text_chain, first, end), holders):
            rest &= ~mask
            place = first + num_texts
            left = mask
            if place < end:
                left = self._match_within(index, text_chain[place], mask, levels)
            if left:
                levels.append((self._num_blocks(text_chain[place - 1]), left))
        self._match_within(index, text_chain[first], rest, levels)
        levels = index.cut(levels, lambda depth: self._block_at(text_chain, first, end, depth))
        size = self.block_size
        return Matched(num_blocks * size, [(blocks * size, mask) for blocks, mask in levels])

    def _match_within(
        self, index: TokenIndex, text: int, holders: int, levels: list[tuple[int, int]]
    ) -> int:
        """Find how far `holders` get in a text block that none has wholly; who matched nothing."""
        entry = self.get(text)
        assert entry is not None
        hashes = _hashes(entry)
        before = _HEAD.unpack_from(entry)[0] - len(hashes)
        for matched, mask in index.search(hashes, holders):
            holders &= ~mask
            levels.append((before + matched, mask))
        return holders

    def _block_at(self, text_chain: Sequence[int], first: int, end: int, depth: int) -> int:
        """Hash of a prompt's token block; 0 if bindings contradict each other there."""
        place = bisect_right(
            range(first, end), depth, key=lambda p: self._num_blocks(text_chain[p])
        )
        entry = self.get(text_chain[first + place]) if first + place < end else None
        if entry is None:
            return 0
        hashes = _hashes(entry)
        place = depth - _HEAD.unpack_from(entry)[0] + len(hashes)
        return hashes[place] if 0 <= place < len(hashes) else 0

    def _num_blocks(self, text: int) -> int:
        entry = self.get(text)
        assert entry is not None
        num_blocks: int = _HEAD.unpack_from(entry)[0]
        return num_blocks

    def _put(self, text_chain: Sequence[int], entries: Sequence[bytes]) -> None:
        """Move text blocks to the younger generation, in order; all of a chain or none."""
        room = self.cap_bytes // 3
        added = sum(map(len, entries)) + _ENTRY_BYTES * len(entries)
        if 2 * added > room:
            return  # a prompt that alone would take it all
        if self._young and self._entry_bytes[0] + added + self._young.__sizeof__() > room:
            self._turn()
        young = self._young
        for text, entry in zip(text_chain, entries, strict=False):
            known = young.get(text)
            if known is None:
                self._entry_bytes[0] += _ENTRY_BYTES + len(entry)
            else:
                self._entry_bytes[0] += len(entry) - len(known)
            young[text] = entry
        self._free(_FREE_PER_BLOCK * len(entries))

    def _turn(self) -> None:
        self._free(len(self._dropped))
        self._dropped, self._old, self._young = self._old, self._young, {}
        self._entry_bytes = [0, *self._entry_bytes[:2]]

    def _free(self, num_entries: int) -> None:
        dropped = self._dropped
        for _ in range(min(num_entries, len(dropped))):
            self._entry_bytes[2] -= _ENTRY_BYTES + len(dropped.popitem()[1])
        if not dropped:
            self._dropped = {}


def _hashes(entry: bytes) -> array[int]:
    return array("Q", entry[_HEAD.size :])
