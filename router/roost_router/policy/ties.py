"""Ties among costs, broken at random. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


def any_least(costs: Sequence[float], rng: Random, slack: float = 0.0) -> int:
    """Index of one of the costs within `slack` of the least, each as likely. O(costs).

    `rng` is asked only where there is a choice.
    """
    limit = min(costs) + slack
    tied = [i for i, cost in enumerate(costs) if cost <= limit]
    return tied[0] if len(tied) == 1 else rng.choice(tied)
