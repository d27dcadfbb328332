"""How fast each replica frees KV blocks, from the requests that end there. Pure.

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
    """Tokens a second that requests free, by the name of their replica."""

    def __init__(self) -> None:
        self._rates: dict[str, tuple[float, float]] = {}  # tokens/s, as of a time

    def released(self, name: str, tokens: int, now: float) -> None:
        """A request that held `tokens` of KV (prompt and answer) left the replica `name`."""
        self._rates[name] = (self._faded(name, now) + tokens / MEMORY_S, now)

    def tokens_per_s(self, name: str, capacity_tokens: int, now: float) -> float:
        """The rate; positive where `capacity_tokens` is."""
        return max(self._faded(name, now), capacity_tokens / MAX_TURNOVER_S)

    def _faded(self, name: str, now: float) -> float:
        rate, since = self._rates.get(name, (0.0, now))
        return rate * exp(-max(0.0, now - since) / MEMORY_S)
