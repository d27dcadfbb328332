"""Slow start: what a replica with a thin cache takes of requests that nobody has cached. Pure.

A replica that just came is idle and knows nothing: every request without a cached prefix finds it
the cheapest, and its first seconds would be one long queue of cold prompts while the others' wait
for work. A time ramp would be wrong: what it lacks is a cache, not time. So:

    thin   its share of blocks is below THIN_SHARE of the fullest candidate's
    miss   no candidate holds half of the prompt

A thin replica is a candidate for a miss only with probability MISS_SHARE. Requests that hit
elsewhere go there anyway; those that hit here are always welcome. A fleet that is all new, or all
thin alike, is not slowed: nobody is thin beside the others.

Source: smg's slow start (a quarter of the misses), by cache instead of by time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

THIN_SHARE: Final = 0.05
MISS_SHARE: Final = 0.25
#: Bytes of prompts below which the fullest cache says nothing about the others: about 16k tokens.
MIN_BYTES: Final = 64 << 10


def thin(resident_bytes: Sequence[int]) -> list[bool]:
    """Which of the candidates are thin, by the prompt bytes that each is believed to hold."""
    fullest = max(resident_bytes, default=0)
    if fullest < MIN_BYTES:
        return [False] * len(resident_bytes)
    return [held < THIN_SHARE * fullest for held in resident_bytes]


def may_take_miss(rng: Random) -> bool:
    """Whether a thin replica takes this miss."""
    return rng.random() < MISS_SHARE
