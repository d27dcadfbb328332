"""What the index's values say: sets of holders as integers; who holds how much of a chain. Pure.

Bit n of a *mask* is holder number n. A value is how Redis keeps a mask (drawn in scripts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NUM_BUCKETS: Final = 1 << 15
#: Numbers there are: a mask of 63 bytes and its header are the most that a packed hash takes.
MAX_HOLDERS: Final = 504
#: Blocks that a bucket may hold: Redis packs 512 by default (`hash-max-listpack-entries`).
MAX_BUCKET_BLOCKS: Final = 480
#: The most blocks an index may be told to hold.
MAX_BLOCKS: Final = NUM_BUCKETS * MAX_BUCKET_BLOCKS


def depth_classes(depths: Iterable[int]) -> bytes:
    """floor(log2(depth + 1)) of each, at most 15: what a block's value says of its depth."""
    return bytes([min(15, (depth + 1).bit_length() - 1) for depth in depths])


def mask_of(value: bytes) -> int:
    """The holders that a value names; 0 for one that is none."""
    return int.from_bytes(value[1:], "little") << 32 * (value[0] >> 4) if value else 0


def levels(runs: Sequence[int | bytes], live: int, step: int = 1) -> list[tuple[int, int]]:
    """Who holds how much: (number of leading blocks, mask of living holders who have them all).

    `runs` are pairs of a run's end and value, as lookup.lua replies to every step-th id. Depths
    rise, masks shrink.
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
        found.append((end * step, held))
    return found


def thinned(ids: bytes, most: int) -> tuple[bytes, int]:
    """Every step-th of the ids, at most `most`, and the step, a power of two; 1 for all of them.

    Who holds every step-th block so far holds those between.
    """
    step = 1
    while len(ids) > 8 * most * step:
        step *= 2
    return (memoryview(ids).cast("Q")[step - 1 :: step].tobytes() if step > 1 else ids), step


def bucket_blocks(max_blocks: int) -> int:
    """The most blocks of a bucket, so that the whole index never holds more than `max_blocks`.

    Ids spread evenly, but not exactly: of a million blocks the first are evicted when the index
    holds 45 %, of three million at 64 %; a full one holds 93 %. Raises ValueError outside
    NUM_BUCKETS .. MAX_BLOCKS.
    """
    if not NUM_BUCKETS <= max_blocks <= MAX_BLOCKS:
        raise ValueError(f"max_blocks must be from {NUM_BUCKETS} to {MAX_BLOCKS}, not {max_blocks}")
    return max_blocks // NUM_BUCKETS
