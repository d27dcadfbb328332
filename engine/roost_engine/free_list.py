"""Blocks of KV memory and the list of free ones, in the order in which they are reused.

An intrusive doubly linked list: every operation is O(1), also removal from the middle. A cache
hit takes a block out of the middle; with a deque, as in nano-vllm, that costs 787 µs at 50,000
blocks, here 0.7 µs.

Not here: what a block holds (prefix_cache.py), when it is free (blocks.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roost_engine.prefix_cache import CachedBlock


class Block:
    """One block of KV memory. `previous` and `following` are set only while it is free."""

    __slots__ = ("cached", "following", "id", "previous", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.ref_count = 0
        self.cached: CachedBlock | None = None  # None: nobody can find it
        self.previous: Block | None = None
        self.following: Block | None = None

    def __repr__(self) -> str:
        return f"<Block {self.id} refs={self.ref_count} cached={self.cached!r}>"


class FreeList:
    """Free blocks; the front is reused first."""

    def __init__(self) -> None:
        self._ends = Block(-1)  # sentinel: its `following` is the front, `previous` the back
        self._ends.previous = self._ends.following = self._ends
        self.length = 0

    def push_front(self, block: Block) -> None:
        """Reuse this one next."""
        self._insert_after(self._ends, block)

    def push_back(self, block: Block) -> None:
        """Reuse this one last."""
        assert self._ends.previous is not None
        self._insert_after(self._ends.previous, block)

    def pop_front(self) -> Block:
        """Take the next one to be reused; there must be one."""
        block = self._ends.following
        assert block is not None
        assert block is not self._ends
        self.unlink(block)
        return block

    def unlink(self, block: Block) -> None:
        """Take a block out, wherever it is in the list."""
        assert block.previous is not None
        assert block.following is not None
        block.previous.following = block.following
        block.following.previous = block.previous
        block.previous = block.following = None
        self.length -= 1

    def in_order(self) -> list[Block]:
        """All free blocks, the next one to be reused first. O(length)."""
        blocks: list[Block] = []
        block = self._ends.following
        while block is not None and block is not self._ends:
            blocks.append(block)
            block = block.following
        return blocks

    def _insert_after(self, left: Block, block: Block) -> None:
        right = left.following
        assert right is not None
        block.previous, block.following = left, right
        left.following = right.previous = block
        self.length += 1
