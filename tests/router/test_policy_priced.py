"""When a replica would start, and the price that rises with load: hand-computed."""

from __future__ import annotations

from math import exp

import pytest

from roost_router.policy.interface import Candidate
from roost_router.policy.kv_release import KvRelease
from roost_router.policy.priced import Price, cost_s, interference, prefill_s, start_s


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
    }
    return Candidate(**{**fields, **changes})


def test_prefill_takes_longer_beside_running_streams():
    # A chunk of 2,048 tokens takes 2 s; four streams add a step of 0.5 s to it.
    assert interference(candidate()) == 1.0
    assert interference(candidate(num_decoding=4)) == 1.25
    assert prefill_s(candidate(num_decoding=4)) == 1.0


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
    assert start_s(candidate(**changes), 100.0) == pytest.approx(seconds)


def test_cost_is_start_and_own_prefill_at_its_price():
    busy = candidate(num_decoding=4, queued_tokens=1024)

    # Own prefill of 1 s, times 1.25 for the streams, 1 for the price and 0.12 for decoding.
    assert cost_s(busy, 3.0, 1.0) == pytest.approx(5.37)
    assert cost_s(busy, 3.0, 10.0) == pytest.approx(14.37)


def test_the_price_follows_the_share_that_has_a_queue_over_ten_seconds():
    price = Price()
    assert price.value == 1.0

    price.observe(1.0, 100.0)  # says nothing of the time before
    assert price.value == 1.0

    price.observe(1.0, 110.0)
    busy = 1.0 - exp(-1.0)
    assert price.value == pytest.approx(1.0 + busy / (1.0 - busy))

    price.observe(0.0, 120.0)
    busy *= exp(-1.0)
    assert price.value == pytest.approx(1.0 + busy / (1.0 - busy))


def test_the_price_has_a_ceiling_and_ignores_a_clock_that_stands_still():
    price = Price()
    for second in range(1000):
        price.observe(1.0, float(second))
    assert price.value == 10.0

    price.observe(0.0, 999.0)
    price.observe(0.0, 998.0)
    assert price.value == 10.0

    price.observe(1.0, 1e6)  # so long ago that nothing of the past is left
    assert price.value == 10.0


def test_kv_is_released_at_the_rate_that_was_seen_lately():
    releases = KvRelease()
    releases.released("r", 1000, 50.0)
    assert releases.tokens_per_s("r", 600, 50.0) == 100.0
    assert releases.tokens_per_s("r", 600, 60.0) == pytest.approx(100.0 * exp(-1.0))

    releases.released("r", 1000, 60.0)
    assert releases.tokens_per_s("r", 600, 60.0) == pytest.approx(100.0 + 100.0 * exp(-1.0))
    assert releases.tokens_per_s("r", 600, 500.0) == 10.0  # a turn of the cache in a minute
    assert releases.tokens_per_s("other", 6000, 0.0) == 100.0
