"""Speeds are fitted from observations alone, and stay usable whatever is observed."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.fleet.speed import Speed


@pytest.mark.parametrize("true_speed", [300.0, 5_000.0, 50_000.0])
def test_prefill_speed_is_found(true_speed):
    speed, rng = Speed(), Random(1)
    for _ in range(40):
        work = rng.choice([20, 200, 2_000, 8_000])
        speed.observe_ttft(work, 0.03 + work / true_speed * rng.uniform(0.95, 1.05))

    assert speed.prefill_tokens_per_s == pytest.approx(true_speed, rel=0.15)


def test_one_cold_prompt_is_enough_to_be_near():
    speed = Speed()

    speed.observe_ttft(2_000, 5.0)

    assert 250 < speed.prefill_tokens_per_s < 800


@pytest.mark.parametrize("ttft_s", [0.001, 0.05, 3.0])
def test_requests_of_one_small_size_tell_no_speed(ttft_s):
    """Warm prompts: what they take is overhead, and must not make cold ones look free."""
    speed = Speed()
    for _ in range(100):
        speed.observe_ttft(3, ttft_s)

    assert 1_000 < speed.prefill_tokens_per_s < 3_000


def test_a_change_of_speed_is_followed():
    speed = Speed()
    for tokens_per_s in (1_000.0, 4_000.0):
        for _ in range(60):
            for work in (100, 2_000):
                speed.observe_ttft(work, work / tokens_per_s)

    assert speed.prefill_tokens_per_s == pytest.approx(4_000, rel=0.1)


def test_decode_cost_is_per_stream():
    speed = Speed()
    for _ in range(50):
        speed.observe_itl(0.08, 8)

    assert speed.decode_s == pytest.approx(0.01, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 1e4)), max_size=50))
def test_the_slope_is_always_positive_and_finite(observed):
    speed = Speed()
    for work, ttft_s in observed:
        speed.observe_ttft(work, ttft_s)

    assert 0 < speed.prefill_tokens_per_s < 1e9
