"""The KV cache of a simulated replica: blocks in use, and the rest by least recent use. Pure.

One memory, as in real engines: running requests hold blocks (those of their prompts, shared where
prompts are, and their own for the answers), and what is left keeps the prompts of the past.

    _used      block id -> requests that hold it
    _idle      block ids that nobody holds, least recently used first
    _private   blocks of answers and of tails that the trace gives no id

Invariants
- used + idle + private <= capacity, always.
- A chain that is found has no holes: blocks are freed tail first, so that a parent is never
  evicted before its child.
- A block is found from the moment when its request is admitted. Replicas compute prompts in the
  order of admission, so whoever finds it is computed after it, or in the same step. (Where replicas
  share a cache it may be found before it is computed: one more reason why that is a bound.)

Left out: preemption, since a request gets the memory of its whole answer when it is admitted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockCache:
    """Blocks of one replica, or of a whole fleet for the bound."""

    def __init__(
        self, capacity_blocks: int, on_evict: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        """`on_evict` hears which blocks were evicted, in order."""
        self.capacity_blocks = capacity_blocks
        self._on_evict = on_evict
        self._used: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    @property
    def used_blocks(self) -> int:
        """Blocks that running requests hold."""
        return len(self._used) + self._private

    @property
    def idle_blocks(self) -> int:
        """Blocks that are cached and may be evicted."""
        return len(self._idle)

    def peek(self, block_ids: Sequence[int]) -> int:
        """How many of a prompt's blocks, from its start, are here. O(blocks)."""
        used, idle = self._used, self._idle
        for matched, block in enumerate(block_ids):
            if block not in idle and block not in used:
                return matched
        return len(block_ids)

    def take(self, block_ids: Sequence[int], num_private: int) -> int | None:
        """Hold a prompt's blocks and `num_private` more; how many of the first were cached.

        None, and nothing is changed, while running requests leave no room. Evicts what was used
        least recently. O(blocks).
        """
        used, idle = self._used, self._idle
        matched = num_woken = 0
        for block in block_ids:
            if block in idle:
                num_woken += 1
            elif block not in used:
                break
            matched += 1
        num_new = len(block_ids) - matched + num_private
        num_held = len(used) + self._private + num_woken + num_new
        if num_held > self.capacity_blocks:
            return None
        for block in block_ids:
            holders = used.get(block)
            if holders is None:
                idle.pop(block, None)
                used[block] = 1
            else:
                used[block] = holders + 1
        self._private += num_private
        num_over = len(idle) + self.used_blocks - self.capacity_blocks
        if num_over > 0:
            evicted = [idle.popitem(last=False)[0] for _ in range(num_over)]
            if self._on_evict is not None:
                self._on_evict(evicted)
        return matched

    def free(self, block_ids: Sequence[int], num_private: int) -> None:
        """Let go of what `take` held; the prompt's blocks stay cached. O(blocks)."""
        used, idle = self._used, self._idle
        for block in reversed(block_ids):
            holders = used[block]
            if holders == 1:
                del used[block]
                idle[block] = None
            else:
                used[block] = holders - 1
        self._private -= num_private
