"""A policy that watches: what it is shown, how it is compared, and that it can break nothing."""

from __future__ import annotations

from random import Random

import pytest
from asking import complete, fleet, get

from roost.text_table import shadow_text
from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.shadow import Shadow


class First:
    """Always the first candidate."""

    def pick(self, candidates, rng):
        return Decision(0, [0.0] * len(candidates))


class Broken:
    def pick(self, candidates, rng):
        raise ZeroDivisionError


def candidate(name: str, matched_tokens: int, queued_tokens: int = 0) -> Candidate:
    """Of a prompt of 1,000 tokens, on a replica that computes as many a second."""
    return Candidate(
        name,
        matched_tokens=matched_tokens,
        uncached_tokens=1000 - matched_tokens,
        queued_tokens=queued_tokens,
        num_decoding=2,
        prefill_tokens_per_s=1000.0,
        decode_s=0.01,
        recent_uncached_tokens=0.0,
    )


PAIR = [candidate("r0", 900, 500), candidate("r1", 100)]


def test_agreement_waits_and_hits_are_those_of_the_two_choices():
    shadow = Shadow("first", First, Random(1))
    for chosen in (0, 1, 1, 1):
        shadow.see("m", PAIR, chosen, 5.0)

    report = shadow.report(6.0)

    assert (report.policy, report.num_decisions, report.num_failed) == ("first", 4, 0)
    assert report.agreement == 0.25
    assert report.shadow_wait_s == pytest.approx(0.62)
    assert report.wait_s == pytest.approx((0.62 + 3 * 0.92) / 4)
    assert report.shadow_hit_rate == pytest.approx(0.9)
    assert report.hit_rate == pytest.approx((0.9 + 3 * 0.1) / 4)


def test_without_a_choice_there_is_nothing_to_compare():
    shadow = Shadow("first", First, Random(1))
    shadow.see("m", PAIR[:1], 0, 5.0)

    report = shadow.report(6.0)

    assert (report.num_decisions, report.agreement, report.shadow_wait_s) == (0, None, None)
    assert "agrees with - of 0 decisions" in shadow_text(report)


def test_what_it_raises_is_counted_and_goes_no_further():
    shadow = Shadow("broken", Broken, Random(1))
    shadow.see("m", PAIR, 0, 5.0)

    report = shadow.report(6.0)

    assert (report.num_decisions, report.num_failed, report.agreement) == (1, 1, None)
    assert "failed at 1" in shadow_text(report)


def test_each_model_has_a_policy_of_its_own_and_ten_minutes_are_kept():
    made = []

    def make() -> First:
        made.append(First())
        return made[-1]

    shadow = Shadow("first", make, Random(1))
    for model in ("m", "n", "m"):
        shadow.see(model, PAIR, 0, 5.0)

    assert len(made) == 2
    assert shadow.report(599.0).num_decisions == 3
    assert shadow.report(600.0).num_decisions == 0


async def test_it_sees_live_traffic_and_is_shown(start_router, replicas):
    router = await start_router(*replicas)
    assert (await fleet(router)).shadow is None

    router.service.metrics.shadow = Shadow("first", First, Random(1))
    replicas[0].fault = "text500"
    for number in range(4):
        assert await complete(router, f"{number} is another prompt") in {200, 500}
    page = await fleet(router)
    _, metrics, _ = await get(router, "/metrics")

    assert page.shadow.policy == "first"
    assert page.shadow.num_decisions >= 3  # then the failing one is ejected, and there is no choice
    assert page.shadow.num_failed == 0
    assert b'roost_router_shadow_agreement_share{policy="first"}' in metrics
    assert b'roost_router_shadow_wait_seconds{policy="first"}' in metrics
