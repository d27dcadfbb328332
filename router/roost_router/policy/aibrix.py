"""AIBrix's prefix-cache: the best match that is not busier than one deviation above the mean. Pure.

    if max - min > IMBALANCE:   only those with the fewest running may match
    the longest match of those with running_i <= mean + deviation; among equal matches the fewest
    running; without one, the fewest running of all.   Ties at random.

running is requests in flight, mean and (population) deviation those of all candidates.

Source: vllm-project/aibrix (2026-08), pkg/plugins/gateway/algorithms/prefix_cache.go. Theirs
matches blocks of 4 bytes in a table with a lifetime of 20 minutes; here the match is our index's.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

IMBALANCE = 8


class PrefixCache:
    """Costs are requests in flight, infinite for those left out."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        loads = [c.num_in_flight for c in candidates]
        mean = sum(loads) / len(loads)
        limit = mean + sqrt(sum((load - mean) ** 2 for load in loads) / len(loads))
        if max(loads) - min(loads) > IMBALANCE:
            limit = min(loads)
        matches = [c.matched_tokens if c.num_in_flight <= limit else 0 for c in candidates]
        longest = max(matches)
        costs = [
            float(load) if match == longest else inf
            for load, match in zip(loads, matches, strict=True)
        ]
        return Decision(any_least(costs, rng), costs)
