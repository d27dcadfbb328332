"""SGLang's cache_aware: affinity while the fleet is even, else the fewest in flight. Pure.

    loads = requests in flight, of this router
    if max - min > BALANCE_ABS and max > BALANCE_REL * min:   the least load
    elif matched / prompt > CACHE_THRESHOLD:                  the longest match
    else:                                                     the least load
    ties: the first

Source: sglang-router 0.3.2, src/policies/cache_aware.rs, with the defaults of its command line.
Theirs matches in a radix tree of characters that knows only its own placements; here the match is
our index's. Its loads include replicas that are down; candidates here never do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

CACHE_THRESHOLD = 0.3
BALANCE_ABS = 64
BALANCE_REL = 1.5


class CacheAware:
    """Costs are requests in flight, or matched tokens, negative."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:  # noqa: ARG002
        """See the module; O(candidates)."""
        costs = [float(c.num_in_flight) for c in candidates]
        least, most = min(costs), max(costs)
        if not (most - least > BALANCE_ABS and most > BALANCE_REL * least):
            matches = [-float(c.matched_tokens) for c in candidates]
            prompt_tokens = candidates[0].matched_tokens + candidates[0].uncached_tokens
            if -min(matches) > CACHE_THRESHOLD * prompt_tokens:
                costs = matches
        return Decision(costs.index(min(costs)), costs)
