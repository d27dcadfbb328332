"""Least outstanding: the fewest requests in flight. Pure.

    cost_i = in_flight_i,   ties at random

nginx's least_conn and production-stack's and AIBrix's least-request. Blind to caches and to how
long a prompt is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


class LeastOutstanding:
    """Costs are requests in flight."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [float(c.num_in_flight) for c in candidates]
        return Decision(any_least(costs, rng), costs)
