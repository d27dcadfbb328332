"""Slow start: what a replica with a thin cache takes of requests that nobody has cached. Pure.

A replica that just came is idle and holds nothing: every request without a cached prefix finds it
the cheapest, so that it would see little but cold prompts for a while, and the shared prefixes that
come with them would be cached a second time there while they lie warm elsewhere. A ramp in time
would be wrong: what it lacks is a cache. So:

    thin   it holds less than THIN_SHARE of what the fullest candidate holds
    miss   no candidate holds half of the prompt

A thin replica takes a miss only with probability MISS_SHARE, unless the others would make it wait
MAX_WAIT_S longer: seconds are the currency, and idle hardware helps nobody. What hits elsewhere
goes there anyway; what hits here is always welcome. A fleet that is new as a whole is not slowed.

Source: smg's slow start (a quarter of the misses), by cache instead of by time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

THIN_SHARE: Final = 0.05
MISS_SHARE: Final = 0.25
MAX_WAIT_S: Final = 0.5
#: Bytes of prompts below which the fullest cache says nothing of the others: some 16k tokens.
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
