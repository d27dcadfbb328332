"""Speeds are fitted from observations alone, and stay usable whatever is observed."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.speed import Prefill, Speed
from roost_router.index.prefix_index import PrefixIndex
from roost_wire.load_report import LoadReport


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


def fleet_of(*kinds: tuple[str, int | None]) -> Fleet:
    """Replicas by their dialect and KV capacity."""
    fleet = Fleet(PrefixIndex(), [f"http://r{number}" for number in range(len(kinds))])
    for replica, (dialect, capacity) in zip(fleet.replicas, kinds, strict=True):
        fleet.answered(replica, ["m"], LoadReport(kv_capacity_tokens=capacity), dialect)
    return fleet


def test_replicas_that_are_alike_share_a_fit():
    fleet = fleet_of(
        ("vllm", 1000), ("vllm", 1000), ("vllm", 2000), ("sglang", 1000), ("vllm", None)
    )
    for _ in range(20):
        fleet.replicas[0].speed.observe_ttft(2000, 0.1)

    fitted = [replica.speed.num_observed for replica in fleet.replicas]
    assert fitted == [20, 20, 0, 0, 0]
    assert fleet.replicas[0].speed.prefill_tokens_per_s > 10_000
    assert fleet.replicas[1].speed.most_tokens == 0  # what was seen there, stays its own


def test_a_replica_that_changes_leaves_the_fit_of_its_like():
    fleet = fleet_of(("vllm", 1000), ("vllm", 1000))
    first, second = fleet.replicas
    first.speed.observe_ttft(2000, 0.1)
    fleet.answered(second, ["m"], LoadReport(kv_capacity_tokens=4000), "vllm")
    second.speed.observe_ttft(2000, 5.0)

    assert (first.speed.num_observed, second.speed.num_observed) == (1, 1)
    assert first.speed.prefill.num_replicas == second.speed.prefill.num_replicas == 1


@pytest.mark.parametrize("num_replicas", [1, 8])
def test_a_fit_remembers_as_much_of_each_replica_however_many_share_it(num_replicas):
    prefill = Prefill()
    speeds = [Speed() for _ in range(num_replicas)]
    for speed in speeds:
        speed.share(prefill)
    for tokens_per_s in (1_000.0, 4_000.0):
        for _ in range(60):
            for speed in speeds:
                for work in (100, 2_000):
                    speed.observe_ttft(work, work / tokens_per_s)

    assert prefill.tokens_per_s == pytest.approx(4_000, rel=0.1)
    assert prefill.num_replicas == num_replicas


def test_waits_that_turn_out_shorter_than_predicted_are_believed_less_and_again_when_not():
    speed = Speed()
    assert speed.wait_scale == 1.0
    for _ in range(40):
        speed.observe_wait(2.0, 0.1)
    assert speed.wait_scale == pytest.approx(0.05, abs=0.01)

    for _ in range(40):
        speed.observe_wait(2.0, 2.5)

    assert speed.wait_scale == 1.0  # longer ones are what the fit is for


def test_a_single_short_wait_says_little():
    speed = Speed()

    speed.observe_wait(0.02, 0.0)

    assert 0.8 < speed.wait_scale < 1.0


def test_a_replica_that_showed_nothing_yet_is_taken_to_be_as_the_others():
    index = PrefixIndex()
    fleet = Fleet(index, ["http://h0", "http://h1", "http://h2"])
    one, other, new = fleet.replicas
    assert fleet.expected_speed(new)[1] == 1.0
    for replica, ttft_s in ((one, 0.5), (other, 0.25)):
        for _ in range(200):
            replica.speed.observe_ttft(1000, ttft_s)
            replica.speed.observe_wait(1.0, ttft_s)

    assert fleet.expected_speed(one)[1] == pytest.approx(0.5, abs=0.01)
    assert fleet.expected_speed(new)[1] == pytest.approx(0.375, abs=0.01)
