"""Ejection, retry budget and stall limits, moment by moment."""

from __future__ import annotations

import pytest

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.health import BASE_S, MAX_FAILURES, MAX_S, MAX_SLACK, Circuit, Health
from roost_router.fleet.replica import Replica
from roost_router.fleet.retry_budget import MIN_PER_S, WINDOW_S, RetryBudget
from roost_router.fleet.watch import (
    CAUTIOUS_TOKENS_PER_S,
    GAP_FACTOR,
    ITL_FACTOR,
    MIN_ITL_S,
    MIN_TTFT_S,
    MISS_FACTOR,
    PATIENCE,
    TTFT_FACTOR,
    UNKNOWN_GAP_S,
    is_stalled,
    itl_limit_s,
    ttft_limit_s,
    usual_gap_s,
)
from roost_router.index.prefix_index import PrefixIndex
from roost_wire.load_report import LoadReport


def test_failures_in_a_row_eject_and_a_success_between_them_does_not():
    health = Health()
    for _ in range(MAX_FAILURES - 1):
        assert not health.failed(0.0)
    health.succeeded()
    for _ in range(MAX_FAILURES - 1):
        assert not health.failed(0.0)
    assert health.circuit(0.0) is Circuit.CLOSED

    assert health.failed(0.0)

    assert health.circuit(0.0) is Circuit.EJECTED
    assert not health.takes_requests(BASE_S - 0.001)


def test_one_stall_ejects():
    health = Health()
    assert health.failed(5.0, stalled=True)
    assert health.circuit(5.0) is Circuit.EJECTED


def test_failures_of_requests_that_were_under_way_do_not_lengthen_an_ejection():
    health = Health()
    health.failed(0.0, stalled=True)
    for _ in range(20):
        assert not health.failed(0.5)
    assert health.circuit(BASE_S) is Circuit.PROBING


def test_one_probe_at_a_time_and_its_end_decides():
    health = Health()
    health.failed(0.0, stalled=True)
    now = BASE_S
    assert health.takes_requests(now)
    health.placed(now)
    assert not health.takes_requests(now)

    health.left()  # its client went: nothing was learnt
    assert health.takes_requests(now)
    health.placed(now)
    assert health.failed(now)  # a single failure is enough now
    assert health.circuit(now + 2 * BASE_S - 0.001) is Circuit.EJECTED

    now += 2 * BASE_S
    health.placed(now)
    health.succeeded()
    assert health.circuit(now) is Circuit.CLOSED
    assert health.num_ejections == 0


def test_ejections_lengthen_up_to_a_limit():
    health, now, lengths = Health(), 0.0, []
    for _ in range(9):
        health.failed(now, stalled=True)
        start = now
        while health.circuit(now) is Circuit.EJECTED:
            now += 0.5
        lengths.append(now - start)
    assert lengths == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MAX_S, MAX_S, MAX_S]


def test_a_probe_that_never_ends_is_not_waited_for_for_ever():
    health = Health()
    health.failed(0.0, stalled=True)
    health.placed(BASE_S)
    assert not health.takes_requests(BASE_S + MAX_S - 0.001)
    assert health.takes_requests(BASE_S + MAX_S)


def fleet_of(number: int) -> Fleet:
    fleet = Fleet(PrefixIndex(), [f"http://h{i}" for i in range(number)])
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport(), "vllm")
    return fleet


def names(fleet: Fleet, now: float = 0.0, tried: frozenset[str] = frozenset()) -> set[str]:
    return {replica.name for replica in fleet.candidates("m", tried, now)}


def test_ejected_replicas_are_left_out_until_half_of_them_are_out():
    fleet = fleet_of(4)
    for replica in fleet.replicas[:2]:
        fleet.failed(replica, 0.0, stalled=True)
    assert names(fleet) == {"r2", "r3"}

    fleet.failed(fleet.replicas[2], 0.0, stalled=True)

    assert names(fleet) == {"r0", "r1", "r2", "r3"}  # panic: rather all than one


def test_refused_replicas_stay_out_in_a_panic():
    fleet = fleet_of(4)
    fleet.refused(fleet.replicas[0])
    for replica in fleet.replicas[1:3]:
        fleet.failed(replica, 0.0, stalled=True)
    assert names(fleet) == {"r1", "r2", "r3"}


def test_ejected_come_before_tried_ones():
    fleet = fleet_of(2)
    fleet.failed(fleet.replicas[0], 0.0, stalled=True)
    assert names(fleet, tried=frozenset({"r1"})) == {"r0"}
    assert names(fleet, tried=frozenset({"r0", "r1"})) == {"r0", "r1"}


def test_another_process_starts_with_a_clean_record():
    fleet = fleet_of(2)
    replica = fleet.replicas[0]
    fleet.answered(replica, ["m"], LoadReport(started_at=1.0))
    fleet.failed(replica, 0.0, stalled=True)
    fleet.answered(replica, ["m"], LoadReport(started_at=1.0))
    assert not replica.health.takes_requests(0.0)

    fleet.answered(replica, ["m"], LoadReport(started_at=2.0))

    assert replica.health.takes_requests(0.0)


def test_retries_stay_within_a_fifth_and_ten_a_second():
    budget, retries, seconds, per_s = RetryBudget(), 0, 60, 100
    for tick in range(seconds * per_s):
        now = tick / per_s
        budget.deposit(now)
        retries += budget.try_withdraw(now)
    first = seconds * per_s
    assert retries <= 0.2 * first + MIN_PER_S * (seconds + WINDOW_S)
    assert retries >= 0.15 * first + MIN_PER_S * seconds


def test_an_idle_budget_fills_to_its_limit_and_no_further():
    budget = RetryBudget()
    budget.deposit(0.0)
    assert sum(budget.try_withdraw(1000.0) for _ in range(1000)) == MIN_PER_S * WINDOW_S
    assert sum(budget.try_withdraw(1001.0) for _ in range(1000)) == MIN_PER_S


def test_retries_of_clients_are_charged_and_never_owed():
    budget = RetryBudget()
    for _ in range(500):
        budget.charge(0.0)
    assert not budget.try_withdraw(0.0)
    assert budget.try_withdraw(0.2)


def replica() -> Replica:
    return Replica("r0", "http://h", 0)


def test_an_unknown_replica_gets_time_for_a_long_prompt():
    slow = replica()
    assert ttft_limit_s(slow, 10, 10) == MIN_TTFT_S
    assert ttft_limit_s(slow, 8000, 8000) == TTFT_FACTOR * 8000 / CAUTIOUS_TOKENS_PER_S


def test_a_fit_is_not_trusted_beyond_what_was_seen():
    fitted = replica()
    for _ in range(50):
        fitted.speed.observe_ttft(100, 0.05)
    seen = ttft_limit_s(fitted, 100, 100)
    assert seen == MIN_TTFT_S
    assert ttft_limit_s(fitted, 8100, 8100) > TTFT_FACTOR * 8000 / CAUTIOUS_TOKENS_PER_S


def test_nobody_is_taken_to_be_faster_than_their_fastest_first_token():
    """Prompts of 3,000 tokens that took as long as those of 1,000 leave the fit no slope."""
    fitted = replica()
    for work in (3000, 1000) * 50:
        fitted.speed.observe_ttft(work, 3.0)
    assert fitted.speed.prefill_tokens_per_s > 1000
    assert ttft_limit_s(fitted, 3000, 3000) == pytest.approx(TTFT_FACTOR * 3.0, rel=0.01)


def test_what_is_believed_cached_may_have_to_be_computed():
    fitted = replica()
    for _ in range(50):
        fitted.speed.observe_ttft(1000, 5.0)  # 200 tokens/s
    assert ttft_limit_s(fitted, 10, 1000) == pytest.approx(MISS_FACTOR * 5.0, rel=0.1)
    assert ttft_limit_s(fitted, 1000, 1000) == pytest.approx(TTFT_FACTOR * 5.0, rel=0.1)
    fitted.queued_tokens, fitted.queued_prompt_tokens = 10, 1000
    limit_s = itl_limit_s(fitted, 0.01, 0.0)
    assert limit_s == pytest.approx(MIN_ITL_S + MISS_FACTOR * 5.0, rel=0.1)


def test_each_stall_doubles_the_slack_and_successes_take_it_back():
    one, now = replica(), 0.0
    one.speed.observe_ttft(1000, 5.0)
    before_s = ttft_limit_s(one, 1000, 1000)
    for number in range(1, 6):
        assert one.health.failed(now, stalled=True)
        assert not one.health.failed(now, stalled=True)  # the same fault, seen by another stream
        slack = min(MAX_SLACK, 2.0**number)
        assert ttft_limit_s(one, 1000, 1000) == pytest.approx(slack * before_s)
        now += 1000.0
    for _ in range(102):
        one.health.succeeded()
    assert 1.0 < one.health.slack < 1.02
    one.health.succeeded()
    assert ttft_limit_s(one, 1000, 1000) == before_s


def test_other_failures_leave_the_slack_alone():
    one = replica()
    for _ in range(5):
        one.health.failed(0.0)
    assert one.health.slack == 1.0


def test_running_streams_wait_for_prefills_and_for_their_own_pace():
    busy = replica()
    assert itl_limit_s(busy, 0.01, 0.0) == MIN_ITL_S
    assert itl_limit_s(busy, 0.1, 0.0) == pytest.approx(ITL_FACTOR * 0.1)
    assert itl_limit_s(busy, 0.1, 10.0) == GAP_FACTOR * 10.0
    busy.queued_tokens = 400
    assert itl_limit_s(busy, 0.01, 0.0) == pytest.approx(MIN_ITL_S + TTFT_FACTOR * 2.0)


def test_the_pace_of_a_new_replica_is_that_of_the_slowest_known():
    new, slow, fast = (replica() for _ in range(3))
    assert usual_gap_s(new, [new, slow, fast]) == UNKNOWN_GAP_S
    slow.speed.observe_itl(0.3, 1)
    fast.speed.observe_itl(0.01, 1)
    assert usual_gap_s(new, [new, slow, fast]) == 0.3
    assert usual_gap_s(fast, [new, slow, fast]) == 0.01


def test_a_stream_is_stalled_at_its_limit_or_later_if_others_progress():
    one = replica()
    assert not is_stalled(one, 0.0, 2.0, 1.999)
    assert is_stalled(one, 0.0, 2.0, 2.0)

    one.last_event_at = 1.5
    assert not is_stalled(one, 0.0, 2.0, 3.0)
    assert is_stalled(one, 0.0, 2.0, 3.5)  # now the others are silent, too
    one.last_event_at = 7.9
    assert is_stalled(one, 0.0, 2.0, PATIENCE * 2.0)
