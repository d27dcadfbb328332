"""Dynamo's cost: prefill blocks to compute plus KV blocks in use. Pure.

    cost_i = (queued_i + uncached_i) / BLOCK  +  used_i / BLOCK
    ties at random

queued_i    uncached tokens placed on i and not yet computed (active prefill)
uncached_i  of this prompt: its blocks less a credit of 1 for each cached one
used_i      tokens of KV in use by running requests, by i's own report

Source: Dynamo 1.6.1, lib/llm/src/kv_router, defaults of kv_router_args.py: overlap credit 1.0 and
its decay 0, prefill load scale 1.0, temperature 0 (so the least cost, no softmax), no queue, no
weight of the number of requests. A block of prefill and a block of decode count the same there
whatever either costs, which is where it loses. A replica that reports no KV figures has no second
term here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

BLOCK_TOKENS = 16


def cost_blocks(candidate: Candidate) -> float:
    """Blocks to compute and blocks in use."""
    prefill = candidate.queued_tokens + candidate.uncached_tokens
    used = candidate.kv_usage * candidate.kv_capacity_tokens
    return (prefill + used) / BLOCK_TOKENS


class DynamoCost:
    """Costs are blocks."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [cost_blocks(c) for c in candidates]
        return Decision(any_least(costs, rng), costs)
