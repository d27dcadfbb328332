"""When a replica would start, what it costs, who is picked: hand-computed."""

from __future__ import annotations

from collections import Counter
from math import exp
from random import Random

import pytest

from roost_router.fleet.kv_release import KvRelease
from roost_router.fleet.replica import Replica
from roost_router.policy.cost import CostPolicy, cost_s, interference, prefill_s, price, start_s
from roost_router.policy.interface import Candidate
from roost_wire.load_report import LoadReport


def candidate(**changes) -> Candidate:
    fields = {
        "name": "r",
        "matched_tokens": 0,
        "uncached_tokens": 1024,
        "queued_tokens": 0,
        "num_decoding": 0,
        "prefill_tokens_per_s": 1024.0,
        "decode_s": 0.125,
        "recent_uncached_tokens": 0.0,
        "num_in_flight": 1,
        "kv_capacity_tokens": 10_000,
        "kv_release_tokens_per_s": 100.0,
    }
    return Candidate(**{**fields, **changes})


def test_prefill_takes_longer_beside_running_streams():
    # A chunk of 2,048 tokens takes 2 s; four streams add a step of 0.5 s to it.
    assert interference(candidate()) == 1.0
    assert interference(candidate(num_decoding=4)) == 1.25
    assert prefill_s(candidate(num_decoding=4)) == 1.0


def test_what_is_expected_in_the_cache_is_not_computed():
    assert prefill_s(candidate(hoped_tokens=256.0)) == 0.75


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 0.0),
        ({"queued_tokens": 2048}, 2.0),
        ({"queued_tokens": 2048, "num_decoding": 4}, 2.5),
        ({"kv_usage": 0.75}, 0.0),  # 2,500 free
        ({"kv_usage": 0.9}, 0.24),  # 24 short, at 100 tokens/s
        ({"kv_usage": 0.9, "num_in_flight": 0}, 0.0),  # a late report
        ({"kv_usage": 0.9, "queued_tokens": 76}, 1.0),  # queued tokens need room first
        ({"kv_usage": 0.9, "kv_capacity_tokens": 0}, 0.0),  # unknown
        ({"kv_usage": 1.0, "uncached_tokens": 10_000}, 100.0),
        ({"kv_usage": 1.0, "uncached_tokens": 10_001}, 0.0),  # never fits: the replica refuses
        ({"kv_usage": 1.0, "uncached_tokens": 9_001, "matched_tokens": 1000}, 0.0),
    ],
)
def test_the_start_waits_for_the_queue_and_for_memory(changes, seconds):
    assert start_s(candidate(**changes)) == pytest.approx(seconds)


def test_cost_is_start_and_own_prefill_at_its_price():
    busy = candidate(num_decoding=4, queued_tokens=1024)

    # Own prefill of 1 s, times 1.25 for the streams, 2 for the price and 0.12 for decoding; and
    # ten steps beside four streams of 0.125 s.
    assert cost_s(busy, 3.0, 2.0) == pytest.approx(3.0 + 3.37 + 5.0)


def test_the_price_is_the_share_that_has_a_queue():
    idle, busy = candidate(), candidate(queued_tokens=1)
    assert [price([idle]), price([idle, busy]), price([busy])] == [0.0, 5.0, 10.0]


def test_the_price_counts_queues_of_others_that_are_not_told():
    idle, busy = candidate(num_others=3), candidate(queued_tokens=1)
    assert price([idle, busy]) == pytest.approx(10 * (1 - 0.5 ** (1 + 3 / 2)))
    told = candidate(num_others=3, tells_queue=True)
    assert price([told, busy]) == 5.0


def pick(*candidates: Candidate, seed: int = 0) -> int:
    return CostPolicy().pick(candidates, Random(seed)).chosen


def test_a_warm_replica_wins_over_an_idle_cold_one():
    assert pick(candidate(), candidate(uncached_tokens=10, queued_tokens=500)) == 1


def test_waiting_for_longer_than_the_prefill_at_its_price_makes_a_second_holder():
    assert pick(candidate(), candidate(uncached_tokens=0, queued_tokens=6 * 1000)) == 1
    assert pick(candidate(), candidate(uncached_tokens=0, queued_tokens=6 * 1030)) == 0
    idle = [candidate() for _ in range(9)]  # of which a tenth is busy: half the price
    assert pick(*idle, candidate(uncached_tokens=0, queued_tokens=2 * 1000)) == 9
    assert pick(*idle, candidate(uncached_tokens=0, queued_tokens=2 * 1030)) < 9


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


def test_what_waits_in_the_router_costs_and_does_not_delay_the_start():
    both = [candidate(name="a"), candidate(name="b", uncached_tokens=1100)]

    decision, starts_s = CostPolicy().pick_behind(both, Random(1), {"a": 9.0, "b": 0.0})

    assert (decision.chosen, starts_s) == (1, 0.0)
    assert decision.costs_s[0] == pytest.approx(9.0 + 1.0)


def test_kv_is_released_at_the_rate_that_was_seen_lately():
    release = KvRelease()
    assert release.tokens_per_s(6000, 0.0) == 100.0  # a turn of the cache in a minute

    release.released(1000, 50.0)
    assert release.tokens_per_s(600, 50.0) == 100.0
    assert release.tokens_per_s(600, 60.0) == pytest.approx(100.0 * exp(-1.0))

    release.released(1000, 60.0)
    assert release.tokens_per_s(600, 60.0) == pytest.approx(100.0 + 100.0 * exp(-1.0))
    assert release.tokens_per_s(600, 500.0) == 10.0


def test_queues_of_others_that_nobody_sees_make_a_second_dearer():
    """One of two has a queue of ours; with three of four requests theirs, the other may, too."""
    busy = candidate(queued_tokens=1000, num_in_flight=2)
    shared = candidate(queued_tokens=1000, num_in_flight=2, num_others=3)
    idle, theirs = candidate(num_in_flight=0), candidate(num_in_flight=0, num_others=3)

    assert price([busy, idle]) == pytest.approx(5.0)
    assert price([shared, theirs]) == pytest.approx(10.0 * (1 - 0.5**4))
    assert price([idle, theirs]) == 0.0  # no queue of ours: nothing to go by


def test_the_start_waits_for_a_slot():
    assert start_s(candidate(slot_wait_s=7.0)) == 7.0
    assert start_s(candidate(slot_wait_s=7.0, queued_tokens=8 * 1024)) == 8.0


def test_slots_are_free_one_after_the_other():
    replica = Replica("r0", "http://h", 0)
    for _ in range(100):
        replica.speed.observe_answer(6.0)
    replica.num_in_flight, replica.num_others = 3, 1
    assert replica.slot_wait_s() == 0.0  # it does not tell how many it has
    replica.report = LoadReport(max_running=5)
    assert replica.slot_wait_s() == 0.0
    replica.report = LoadReport(max_running=4)
    assert replica.slot_wait_s() == pytest.approx(6.0 / 4)
    replica.report = LoadReport(max_running=2)
    assert replica.slot_wait_s() == pytest.approx(3 * 6.0 / 2)
