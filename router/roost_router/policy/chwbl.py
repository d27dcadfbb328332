"""Consistent hashing with bounded loads on the prompt's first block. Pure but for its ring.

    key    = hash of the prompt's first block
    chosen = the first candidate after the key on the ring with
             in_flight_i + 1 <= 1.25 * (total in flight + 1) / candidates
             or the key's owner, where none is (no requests, or a few, evenly spread)

Source: Mirrokni, Thorup, Zadimoghaddam (2016), as in KubeAI
(internal/loadbalancer/balance_chwbl.go, `chwblLoadOK`; there the key is adapter + 100 characters).
It needs no index and no shared state, so that any number of routers agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.hash_ring import HashRing
from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

LOAD_FACTOR = 1.25


class BoundedHashing:
    """Costs are steps on the ring; those beyond their bound come after all others."""

    def __init__(self) -> None:
        self._ring = HashRing()

    def retain(self, names: frozenset[str]) -> None:
        """Replicas have gone; see interface.py."""
        self._ring.retain(names)

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:  # noqa: ARG002
        """See the module; O(candidates) and the walk."""
        places = {c.name: place for place, c in enumerate(candidates)}
        total = sum(c.num_in_flight for c in candidates)
        bound = LOAD_FACTOR * (total + 1) / len(candidates)
        costs = [0.0] * len(candidates)
        for step, name in enumerate(self._ring.order(places, candidates[0].prompt_key)):
            place = places[name]
            is_full = candidates[place].num_in_flight + 1 > bound
            costs[place] = float(step + len(candidates) * is_full)
        return Decision(costs.index(min(costs)), costs)
