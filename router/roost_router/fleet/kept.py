"""How much of what is believed cached on a replica is there, as its answers show. Pure.

Where what is missing follows from least recent use, the index is corrected (placement.py). Some
servers keep prompts by other rules, and `share` says how much to believe.

llama.cpp and what is built on it keep a prompt in the slot that computed it: while that slot
answers, a second request for the same prompt computes it once more, and once it has ended the next
one finds it. So where less is there than believed, or the server is known for it, what requests
computed that ended since is told apart from what only a running one did. If most of the latter
misses, only the former counts.

Rejected: to call all running that is not known to have ended. Prompts from before the two were told
apart are that, too, and with four routers, each of which sees a quarter of the evictions, mean TTFT
rose by 5 % (`roost sim`).
"""

from __future__ import annotations

from typing import Final

#: With less of what is believed there, requests that ended and running ones are told apart.
MIN_UNDOUBTED: Final = 0.9
#: With less of it there, what only a running request computed does not count.
_MIN_SHARED: Final = 0.5
#: What one more prompt of a running request weighs: a server shares them, or it does not.
_RUNNING_WEIGHT: Final = 0.1
#: Believed tokens after which an observation of how many were there weighs a third.
_MEMORY_TOKENS: Final = 50_000.0


class Kept:
    """Of one replica's present process."""

    def __init__(self, *, by_slot: bool = False) -> None:
        """`by_slot`: taken to keep running requests' prompts from others, until they show else."""
        self._all_share = 1.0
        self._ended_share = 1.0  # of tokens that requests computed which ended since
        self._running_share = 0.0 if by_slot else 1.0  # of those that only a running one computed

    @property
    def is_by_slot(self) -> bool:
        """Whether what running requests computed is not there for others."""
        return self._running_share < _MIN_SHARED

    @property
    def share(self) -> float:
        """Of the tokens that count as cached there, those that are; at most 1."""
        return self._ended_share if self.is_by_slot else self._all_share

    def learn(self, believed_tokens: int, cached_tokens: int) -> None:
        """So many tokens of a prompt were cached, of so many (positive) that were believed."""
        found = min(1.0, cached_tokens / believed_tokens)
        self._all_share += _weight(believed_tokens) * (found - self._all_share)

    def learn_ended(self, ended_tokens: int, cached_tokens: int) -> None:
        """The same, of tokens that requests computed which ended since."""
        found = min(1.0, cached_tokens / ended_tokens)
        self._ended_share += _weight(ended_tokens) * (found - self._ended_share)

    def learn_running(self, running_tokens: int, cached_tokens: int) -> None:
        """The same, of tokens that only a request computed which was still running."""
        found = min(1.0, cached_tokens / running_tokens)
        self._running_share += _RUNNING_WEIGHT * (found - self._running_share)


def _weight(num_tokens: int) -> float:
    return min(1.0, num_tokens / _MEMORY_TOKENS)
