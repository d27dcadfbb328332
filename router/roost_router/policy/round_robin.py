"""Round robin: each in turn, whatever it holds and has to do. Pure but for its counter.

    chosen = number of picks before this one  mod  candidates

The floor that every router has (round_robin in sglang-router 0.3.2 and vllm-router 0.1.17). With a
changing set of candidates the turn is by place, not by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


class RoundRobin:
    """Costs are turns to wait."""

    def __init__(self) -> None:
        self._num_picks = 0

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:  # noqa: ARG002
        """See the module; O(candidates)."""
        num = len(candidates)
        chosen = self._num_picks % num
        self._num_picks += 1
        return Decision(chosen, [float((place - chosen) % num) for place in range(num)])
