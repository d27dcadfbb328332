"""What the index's values say: sets of holders as integers; who holds how much of a chain. Pure.

Bit n of a *mask* is holder number n. A value is how Redis keeps a mask (drawn in scripts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_BUCKETS: Final = 1 << 15
#: Numbers there are: a mask of 63 bytes and its header are the most that a packed hash takes.
MAX_HOLDERS: Final = 504
#: Blocks that a bucket may hold: Redis packs 512 by default (`hash-max-listpack-entries`).
MAX_BUCKET_BLOCKS: Final = 480
#: The most blocks an index may be told to hold.
MAX_BLOCKS: Final = NUM_BUCKETS * MAX_BUCKET_BLOCKS


def mask_of(value: bytes) -> int:
    """The holders that a value names; 0 for one that is none."""
    return int.from_bytes(value[1:], "little") << 32 * (value[0] >> 4) if value else 0


def levels(runs: Sequence[int | bytes], live: int) -> list[tuple[int, int]]:
    """Who holds how much: (number of leading blocks, mask of living holders who have them all).

    `runs` are pairs of a run's end and value, as lookup.lua replies. Depths rise, masks shrink.
    A holder counts up to the first run that it is missing in. O(runs).
    """
    found: list[tuple[int, int]] = []
    held = live
    for end, value in zip(runs[::2], runs[1::2], strict=True):
        assert isinstance(end, int)
        assert isinstance(value, bytes)
        held &= mask_of(value)
        if not held:
            break
        if found and found[-1][1] == held:
            found.pop()
        found.append((end, held))
    return found


def bucket_blocks(max_blocks: int) -> int:
    """The most blocks of a bucket, so that the whole index never holds more than `max_blocks`.

    Ids spread evenly, but not exactly: the first buckets are full when the index holds some 70 %
    of a million blocks, 80 % of three million. Raises ValueError outside 32,768 .. MAX_BLOCKS.
    """
    if not NUM_BUCKETS <= max_blocks <= MAX_BLOCKS:
        raise ValueError(f"max_blocks must be from {NUM_BUCKETS} to {MAX_BLOCKS}, not {max_blocks}")
    return max_blocks // NUM_BUCKETS
