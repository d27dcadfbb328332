"""The vLLM production-stack's two affine policies. Pure but for a ring.

    prefixaware   one at random of the replicas at the deepest match; without a match, of all
    session       the owner of the session's key on a hash ring

Source: vllm-project/production-stack (2026-08), src/vllm_router/routers/routing_logic.py and
src/vllm_router/prefix/hashtrie.py. Neither looks at load (`prefix_min_match_length` is 0, so the
fallback by request rate is never reached). Theirs walks a trie of 128 characters a step that
forgets nothing; here the match is our index's, which is to its advantage. A session is named by a
header there; here, where policies see no headers, by the prompt's first block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.hash_ring import HashRing
from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


class PrefixAware:
    """Costs are matched tokens, negative."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        costs = [-float(c.matched_tokens) for c in candidates]
        return Decision(any_least(costs, rng), costs)


class Session:
    """Costs are steps on the ring."""

    def __init__(self) -> None:
        self._ring = HashRing()

    def retain(self, names: frozenset[str]) -> None:
        """Replicas have gone; see interface.py."""
        self._ring.retain(names)

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:  # noqa: ARG002
        """See the module; O(candidates) and the walk."""
        places = {c.name: place for place, c in enumerate(candidates)}
        costs = [0.0] * len(candidates)
        for step, name in enumerate(self._ring.order(places, candidates[0].prompt_key)):
            costs[places[name]] = float(step)
        return Decision(costs.index(0.0), costs)
