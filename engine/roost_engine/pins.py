"""Pins: prefixes that stay in the cache until a time, whatever else wants the memory.

An agent that will be back in ten seconds, or a system prompt of every request, is worth keeping
although it was not used last. A pin holds a reference to each block of a chain, so eviction
passes it by. All pins together hold at most half of the pool, and where a request could never
run beside them, the one that would end first is broken: progress comes before promises.

Not here: who asks for pins, and what they cost whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from roost_engine.blocks import BlockPool


class PinRefused(Exception):  # noqa: N818 - said to whoever asked, no defect of ours
    """Nothing was pinned, and what the name pinned before still is; the message says why."""


class _Pin(msgspec.Struct, frozen=True):
    block_table: list[int]
    until_s: float


class Pins:
    """All pins of a pool, by name."""

    def __init__(self, pool: BlockPool) -> None:
        self.max_blocks = pool.num_blocks // 2
        self._pool = pool
        self._pins: dict[str, _Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def num_blocks(self) -> int:
        """Blocks held by pins, each counted once. O(blocks pinned)."""
        return len(self._blocks_beside(None))

    @property
    def block_tables(self) -> Iterator[list[int]]:
        """What each pin holds, for checks."""
        return (pin.block_table for pin in self._pins.values())

    def pin(self, name: str, token_ids: Sequence[int], until_s: float) -> int:
        """Keep what the device holds of this prefix until then; the number of blocks.

        A name that exists is replaced. PinRefused if nothing of the prefix is on the device, or
        if it would exceed the budget. O(tokens + blocks pinned).
        """
        pool = self._pool
        blocks = pool.lookup(token_ids, pool.chain(token_ids)).blocks
        if not blocks:
            raise PinRefused("no full block of this prefix is in the cache; pin it after its use")
        others = self._blocks_beside(name)
        if len(others | set(blocks)) > self.max_blocks:
            raise PinRefused(
                f"{len(blocks)} blocks beside {len(others)} pinned ones exceed the budget of "
                f"{self.max_blocks}, half of the pool; release a pin or pin a shorter prefix"
            )
        pool.acquire(blocks)
        self.release(name)
        self._pins[name] = _Pin(blocks, until_s)
        return len(blocks)

    def release(self, name: str) -> bool:
        """Let a prefix be evicted again; False if there is no such pin (any more)."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._pool.release(pin.block_table)
        return pin is not None

    def expire(self, now: float) -> None:
        """Release the pins whose time has passed. O(pins)."""
        for name in [name for name, pin in self._pins.items() if pin.until_s <= now]:
            self.release(name)

    def break_one(self) -> bool:
        """Release the pin that would end first; False if there is none. O(pins)."""
        if not self._pins:
            return False
        return self.release(min(self._pins, key=lambda name: self._pins[name].until_s))

    def drop_uncached(self) -> None:
        """Release pins of blocks that nobody can find any more. O(blocks pinned)."""
        for name, pin in list(self._pins.items()):
            if not all(self._pool.is_cached(block) for block in pin.block_table):
                self.release(name)

    def _blocks_beside(self, name: str | None) -> set[int]:
        """Blocks held by all pins but this one."""
        return {
            block for other, pin in self._pins.items() if other != name for block in pin.block_table
        }
