"""When a worker that ended is started again."""

from __future__ import annotations

from roost_router.restarts import MAX_DELAY_S, STEADY_S, Backoff


def test_a_worker_that_served_is_started_again_at_once():
    backoff = Backoff()

    assert [backoff.delay_s(STEADY_S) for _ in range(5)] == [0.0] * 5


def test_one_that_keeps_ending_early_waits_twice_as_long_each_time_up_to_a_limit():
    backoff = Backoff()

    delays = [backoff.delay_s(0.3) for _ in range(9)]

    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, MAX_DELAY_S, MAX_DELAY_S]


def test_a_steady_life_forgives_what_was_before():
    backoff = Backoff()
    for _ in range(1000):
        backoff.delay_s(STEADY_S - 0.001)

    assert backoff.delay_s(STEADY_S) == 0.0
    assert backoff.delay_s(0.0) == 0.1
