"""Least predicted seconds to the first token, our own prefill priced. Pure.

    cost_i = (queued_i + uncached_i) / prefill_i  +  decoding_i * decode_s_i
             + PREFILL_PRICE * uncached_i / prefill_i

queued_i    uncached tokens placed on i and not yet computed: a hit saves our prefill, never
            the queue before us, so it counts in full
uncached_i  tokens of this prompt that i does not hold
prefill_i   tokens/s, fitted (fleet/speed.py)
decoding_i  streams running on i, each making the step that carries our tokens longer

The first line is the wait of this request. The second is what it costs the others: a second of
prefill delays whoever comes next by a second. Without the price the third sibling of a burst
leaves the replica that is just computing their prefix and computes it again elsewhere, to save
itself milliseconds.

The smallest cost wins. Costs within TIE_S of the best are a tie: no user feels a millisecond,
but always taking the first would starve the rest. Among ties the replica with the least prefill
work lately is taken (its cache has the most room for this prompt), then one at random.

Sources: without the price, the shape of the prototype that beat vllm-router kv_aware, Dynamo kv
and sglang cache_aware on three traces; the price is mu of the late-binding design on an idle
fleet, where dropping it cost 19 % of mean TTFT in simulation. Not here: late binding, memory wait,
and the price that rises with the fleet's load (late_binding.py, priced.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from random import Random

TIE_S = 0.001
PREFILL_PRICE = 1.0


def cost_s(candidate: Candidate) -> float:
    """Seconds that this request would wait on this replica, and make others wait."""
    tokens = candidate.queued_tokens + (1.0 + PREFILL_PRICE) * candidate.uncached_tokens
    decode_s = candidate.num_decoding * candidate.decode_s
    return tokens / candidate.prefill_tokens_per_s + decode_s


class CostPolicy:
    """Picks the least cost, breaking ties by recent work, then at random."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [cost_s(candidate) for candidate in candidates]
        return Decision(pick_least(candidates, costs, rng), costs)


def pick_least(candidates: Sequence[Candidate], costs_s: list[float], rng: Random) -> int:
    """Index of the least cost; among ties the least work lately, then one at random."""
    limit = min(costs_s) + TIE_S
    tied = [i for i, cost in enumerate(costs_s) if cost <= limit]
    if len(tied) == 1:
        return tied[0]
    recent = [candidates[i].recent_uncached_tokens for i in tied]
    least = min(recent)
    best = [i for i in tied if candidates[i].recent_uncached_tokens <= least]
    return best[0] if len(best) == 1 else rng.choice(best)
