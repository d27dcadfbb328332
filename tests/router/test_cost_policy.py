"""Least seconds to the first token, as a table."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from roost_router.policy.cost import CostPolicy, cost_s
from roost_router.policy.interface import Candidate


def candidate(**changes) -> Candidate:
    fields = {
        "name": "r",
        "matched_tokens": 0,
        "uncached_tokens": 1000,
        "queued_tokens": 0,
        "num_decoding": 0,
        "prefill_tokens_per_s": 1000.0,
        "decode_s": 0.01,
        "recent_uncached_tokens": 0.0,
    }
    return Candidate(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 2.0),
        ({"uncached_tokens": 10, "matched_tokens": 990}, 0.02),
        ({"queued_tokens": 3000}, 5.0),
        ({"queued_tokens": 3000, "uncached_tokens": 10}, 3.02),
        ({"num_decoding": 8}, 2.08),
        ({"prefill_tokens_per_s": 20_000.0}, 0.1),
    ],
)
def test_cost_is_the_formula_in_seconds(changes, seconds):
    assert cost_s(candidate(**changes)) == pytest.approx(seconds)


def pick(*candidates: Candidate, seed: int = 0) -> int:
    return CostPolicy().pick(candidates, Random(seed)).chosen


def test_a_warm_replica_wins_over_an_idle_cold_one():
    assert pick(candidate(), candidate(uncached_tokens=10, queued_tokens=500)) == 1


def test_waiting_for_longer_than_twice_the_prefill_makes_a_second_holder():
    assert pick(candidate(), candidate(uncached_tokens=10, queued_tokens=1900)) == 1
    assert pick(candidate(), candidate(uncached_tokens=10, queued_tokens=2100)) == 0


def test_running_streams_push_cold_work_away():
    assert pick(candidate(num_decoding=4), candidate()) == 1


def test_a_millisecond_is_a_tie_and_goes_to_the_less_burdened_of_late():
    assert pick(candidate(recent_uncached_tokens=5.0), candidate(queued_tokens=1)) == 1
    assert pick(candidate(recent_uncached_tokens=5.0), candidate(queued_tokens=3)) == 0


def test_full_ties_are_broken_at_random_and_reproducibly():
    counts = Counter(pick(candidate(), candidate(), candidate(), seed=s) for s in range(300))

    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 60
    assert pick(candidate(), candidate(), seed=7) == pick(candidate(), candidate(), seed=7)
