"""Power of two choices: the less busy of two drawn at random. Pure.

    draw i, j without replacement;  the fewer requests in flight wins, i where they are equal

Source: Mitzenmacher, "The power of two choices in randomized load balancing" (2001); power_of_two
in sglang-router 0.3.2 and vllm-router 0.1.17. With stale loads it herds less than the least of
all, and it is as blind to caches.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


class PowerOfTwo:
    """Costs are requests in flight of the two drawn, infinite for the others."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [inf] * len(candidates)
        drawn = rng.sample(range(len(candidates)), min(2, len(candidates)))
        for place in drawn:
            costs[place] = float(candidates[place].num_in_flight)
        return Decision(min(drawn, key=costs.__getitem__), costs)
