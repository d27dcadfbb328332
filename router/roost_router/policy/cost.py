"""Least predicted seconds to the first token. Pure.

    cost_i = (queued_i + uncached_i) / prefill_i  +  decoding_i * decode_s_i

queued_i    uncached tokens placed on i and not yet computed: a hit saves our prefill, never
            the queue before us, so it counts in full
uncached_i  tokens of this prompt that i does not hold
prefill_i   tokens/s, fitted (fleet/speed.py)
decoding_i  streams running on i, each making the step that carries our tokens longer

The smallest cost wins. Costs within TIE_S of the best are a tie: no user feels a millisecond,
but always taking the first would starve the rest. Among ties the replica with the least prefill
work lately is taken (its cache has the most room for this prompt), then one at random.

Sources: the shape is that of the prototype that beat vllm-router kv_aware, Dynamo kv and sglang
cache_aware on three traces; here in seconds. Not here yet: late binding, memory wait and the
price of a busy fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from random import Random

TIE_S = 0.001


def cost_s(candidate: Candidate) -> float:
    """Predicted seconds until the first token if this replica took the request now."""
    work_tokens = candidate.queued_tokens + candidate.uncached_tokens
    prefill_s = work_tokens / candidate.prefill_tokens_per_s
    return prefill_s + candidate.num_decoding * candidate.decode_s


class CostPolicy:
    """Picks the least cost, breaking ties by recent work, then at random."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [cost_s(candidate) for candidate in candidates]
        limit = min(costs) + TIE_S
        tied = [i for i, cost in enumerate(costs) if cost <= limit]
        least = min(candidates[i].recent_uncached_tokens for i in tied)
        best = [i for i in tied if candidates[i].recent_uncached_tokens <= least]
        chosen = best[0] if len(best) == 1 else rng.choice(best)
        return Decision(chosen=chosen, costs_s=costs)
