"""SMG's cache_aware: the longest match unless it is much busier than the mean. Pure.

    spilled_i  = load_i > BALANCE_REL * mean
                 and load_i > mean + min(BALANCE_ABS, max(4, ceil(2 * sqrt(mean))))
    among      = the longest match, less those spilled; if none is left, all less those spilled;
                 if none is left, all
    cost_i     = (queued_i + MEAN_TOKENS * running_i) / THROUGHPUT
                 + KV_WEIGHT_S * k_i / (1 - k_i),   k = KV share in use, at most 0.999
    ties within TIE at random

load is requests in flight. Two standard deviations of a Poisson load are the margin, so that
chance does not look like imbalance. A spilled prefix gets another holder: hot ones replicate.

Source: smg 1.13.0, model_gateway/src/policies/cache_aware.rs (`absolute_margin`) and
least_load.rs, with the defaults of mod.rs: overlap decay and selection temperature 0. Its
estimates of what a stale report leaves out are not needed: loads here are counted at decision
time.
"""

from __future__ import annotations

from math import ceil, inf, sqrt
from typing import TYPE_CHECKING

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.ties import any_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

BALANCE_ABS = 32
BALANCE_REL = 1.1
MEAN_TOKENS = 1024
THROUGHPUT = 2000.0  # tokens/s
KV_WEIGHT_S = 0.15
TIE = 1e-6


def is_spilled(load: int, mean: float) -> bool:
    """Whether a replica with `load` requests in flight is left out of a fleet of `mean`."""
    margin = min(BALANCE_ABS, max(4, ceil(2.0 * sqrt(mean))))
    return load > BALANCE_REL * mean and load > mean + margin


def wait_s(candidate: Candidate) -> float:
    """Expected wait and KV pressure, in seconds."""
    work = candidate.queued_tokens + MEAN_TOKENS * candidate.num_decoding
    kv = min(0.999, max(0.0, candidate.kv_usage))
    return work / THROUGHPUT + KV_WEIGHT_S * kv / (1.0 - kv)


class Spill:
    """Costs are seconds of expected wait, infinite for those left out."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """See the module; O(candidates)."""
        mean = sum(c.num_in_flight for c in candidates) / len(candidates)
        fits = [not is_spilled(c.num_in_flight, mean) for c in candidates]
        longest = max(c.matched_tokens for c in candidates)
        among = [
            fit and c.matched_tokens == longest for fit, c in zip(fits, candidates, strict=True)
        ]
        if not any(among):
            among = fits if any(fits) else [True] * len(candidates)
        costs = [wait_s(c) if is_in else inf for is_in, c in zip(among, candidates, strict=True)]
        return Decision(any_least(costs, rng, TIE), costs)
