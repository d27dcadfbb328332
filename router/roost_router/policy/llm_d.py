"""llm-d's weighted scorers: queue, KV, prefix. Pure.

    score_i = 2 * (max - q_i) / (max - min)  +  2 * (1 - kv_i)  +  3 * matched_i / prompt
    the largest score wins, ties at random;   the first term is 2 for all where max = min

q_i is requests waiting: placed there by this router and without a first token yet. kv_i is the
share of KV in use.

Source: llm-d (2026-06) scheduler and scorers (scorer/queuedepth/queue.go) in their usual weights.
Theirs scrapes queue and KV every 50 ms; here the queue is counted at decision time. Its weakness
is the first term: a queue one longer weighs as much as one a hundred longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

QUEUE_WEIGHT = 2.0
KV_WEIGHT = 2.0
PREFIX_WEIGHT = 3.0


class WeightedScorers:
    """Costs are scores, negative."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        queues = [c.num_in_flight + c.num_others - c.num_decoding for c in candidates]
        least, most = min(queues), max(queues)
        costs = []
        for queue, c in zip(queues, candidates, strict=True):
            short = (most - queue) / (most - least) if most > least else 1.0
            prefix = c.matched_tokens / (c.matched_tokens + c.uncached_tokens)
            score = QUEUE_WEIGHT * short + KV_WEIGHT * (1.0 - c.kv_usage) + PREFIX_WEIGHT * prefix
            costs.append(-score)
        return Decision(any_least(costs, rng), costs)
