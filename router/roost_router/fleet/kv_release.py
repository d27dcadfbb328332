"""How fast a replica frees KV blocks, from the requests that end there. Pure.

    rate = sum of tokens * exp(-age / MEMORY_S) / MEMORY_S,   at least capacity / MAX_TURNOVER_S

A cache of which nothing has been freed yet is taken to turn over once in MAX_TURNOVER_S: a wait for
memory is long then, but it ends.
"""

from __future__ import annotations

from math import exp
from typing import Final

MEMORY_S: Final = 10.0
MAX_TURNOVER_S: Final = 60.0


class KvRelease:
    """Tokens a second that requests free on one replica."""

    def __init__(self) -> None:
        self.num_tokens = 0  # by this router's requests, since it started
        self._rate = 0.0  # tokens/s, as of _at
        self._at = 0.0

    def released(self, tokens: int, now: float) -> None:
        """A request that held `tokens` of KV (prompt and answer) left."""
        self._rate = self._faded(now) + tokens / MEMORY_S
        self._at = now

    def tokens_per_s(self, capacity_tokens: int, now: float) -> float:
        """The rate; positive where `capacity_tokens` is."""
        return max(self._faded(now), capacity_tokens / MAX_TURNOVER_S)

    def _faded(self, now: float) -> float:
        return self._rate * exp(-max(0.0, now - self._at) / MEMORY_S)
