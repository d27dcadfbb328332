"""The router's own queue, driven with a clock of our own."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.policy.cost import CostPolicy
from roost_router.policy.fair_queue import AGEING, FairQueue, Held
from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.late_binding import HOLD_S, MAX_LOOKS, LateBinding

SPEED = 1000.0  # tokens/s


def candidate(
    queued_s: float = 0.0, own_s: float = 1.0, name: str = "r0", wait_scale: float = 1.0
) -> Candidate:
    return Candidate(
        name,
        matched_tokens=0,
        uncached_tokens=round(own_s * SPEED),
        queued_tokens=round(queued_s * SPEED),
        num_decoding=0,
        prefill_tokens_per_s=SPEED,
        decode_s=0.01,
        recent_uncached_tokens=0.0,
        wait_scale=wait_scale,
    )


def late_binding(**options) -> LateBinding:
    return LateBinding(CostPolicy(), **options)


def offer(late, request, candidates, now=0.0, rng=None, tenant=""):
    return late.offer(request, candidates, now, rng or Random(1), tenant)[0]


def looked(late, candidates_of):
    """What a look binds, as whoever drives it does."""
    look = late.look(Random(1))
    for held in look.requests:
        if not held.is_held:
            continue
        decision = look.decide(held, candidates_of(held.request))
        if decision is not None:
            yield held, decision
        if look.is_over:
            return


class Bench:
    """Replicas with queues in seconds; a request is (name, own prefill seconds)."""

    def __init__(self, num_replicas: int = 1, **options) -> None:
        self.late: LateBinding[tuple[str, float]] = late_binding(**options)
        self.displaced: list[Held] = []
        self.queued_s = [0.0] * num_replicas
        self.rng = Random(3)
        self.bound: list[str] = []

    def candidates(self, request: tuple[str, float]) -> list[Candidate]:
        return [candidate(queued, request[1], f"r{i}") for i, queued in enumerate(self.queued_s)]

    def offer(self, name: str, own_s: float = 1.0, now: float = 0.0, **options):
        request = (name, own_s)
        taken, displaced = self.late.offer(
            request, self.candidates(request), now, self.rng, **options
        )
        if displaced is not None:
            self.displaced.append(displaced)
        if isinstance(taken, Decision):
            self.place(request, taken)
        return taken

    def place(self, request: tuple[str, float], decision: Decision) -> None:
        self.queued_s[decision.chosen] += request[1]
        self.bound.append(request[0])

    def look(self) -> list[str]:
        before = len(self.bound)
        for held, decision in looked(self.late, self.candidates):
            self.place(held.request, decision)
        return self.bound[before:]


@pytest.mark.parametrize(("queued_s", "is_bound"), [(0.0, True), (HOLD_S, True), (0.151, False)])
def test_a_request_is_held_where_it_would_start_later_than_hold(queued_s, is_bound):
    taken = offer(late_binding(), "a", [candidate(queued_s)])

    assert isinstance(taken, Decision if is_bound else Held)


@pytest.mark.parametrize(("queued_s", "num_bound"), [(HOLD_S, 1), (0.151, 0)])
def test_a_look_binds_by_the_same_limit(queued_s, num_bound):
    late = late_binding()
    offer(late, "a", [candidate(9.0)], 0.0)

    assert num_bound == len(list(looked(late, lambda _: [candidate(queued_s)])))


def test_an_idle_replica_takes_what_a_busy_one_would_keep_waiting():
    bench = Bench(2)
    bench.queued_s = [5.0, 0.0]

    assert bench.offer("a").chosen == 1


def test_a_request_waits_for_the_replica_that_holds_its_prefix():
    """2 s of queue and 0.01 s of prefill beat 3 s of prefill at twice the price."""
    late = late_binding()
    warm, cold = candidate(2.0, 0.01, "warm"), candidate(0.0, 3.0, "cold")

    held = offer(late, "a", [warm, cold], 0.0)
    assert isinstance(held, Held)
    assert held.prefill_s == 0.01

    later = looked(late, lambda _: [candidate(0.1, 0.01, "warm"), cold])
    assert [(held, 0)] == [(bound, decision.chosen) for bound, decision in later]
    assert not late.queue


def test_a_hot_prefix_gets_another_holder_once_too_many_wait_for_the_first():
    """Those held are queue, too: else all wait for one replica, and the others idle."""
    late = late_binding()
    # Costs 1 + 0.6 on the one that holds the prefix, and 0.1 for each that waits; 2.34 elsewhere.
    both = [candidate(1.0, 0.1, "hot"), candidate(0.0, 0.39, "idle")]

    taken = [offer(late, number, both, 0.0) for number in range(9)]

    assert all(isinstance(one, Held) for one in taken[:8])
    assert isinstance(taken[8], Decision)
    assert taken[8].chosen == 1
    assert late.queue.waiting_s["hot"] == pytest.approx(0.8)


def test_a_request_that_waits_is_no_queue_before_itself():
    late = late_binding()
    offer(late, "a", [candidate(0.2, 1.0, "warm"), candidate(9.0, 1.2, "cold")], 0.0)

    both = [candidate(0.0, 1.0, "warm"), candidate(0.0, 1.2, "cold")]
    ((_, decision),) = looked(late, lambda _: both)

    assert decision.chosen == 0


def test_held_requests_count_those_before_them_only():
    """Ten wait for the hot one; those for whom too many go first are bound elsewhere."""
    late = late_binding()
    for number in range(10):
        offer(late, number, [candidate(9.0, 0.1, "hot")], 0.0)

    both = [candidate(1.0, 0.1, "hot"), candidate(0.0, 0.39, "idle")]
    bound = [(held.request, decision.chosen) for held, decision in looked(late, lambda _: both)]

    assert [(8, 1), (9, 1)] == bound


def test_short_work_is_bound_first():
    bench = Bench()
    bench.queued_s = [1.0]
    for name, own_s in (("long", 3.0), ("short", 0.05), ("middle", 0.5)):
        bench.offer(name, own_s)

    bench.queued_s = [0.0]
    assert ["short", "middle"] == bench.look()  # 0.05 s of queue let the next start, 0.55 s do not
    bench.queued_s = [0.0]
    assert ["long"] == bench.look()


def test_waiting_makes_up_for_length():
    """One second longer is passed by those that come within 1 / AGEING seconds only."""
    for late_by, first in ((1.0 / AGEING - 0.1, "short"), (1.0 / AGEING + 0.1, "long")):
        bench = Bench()
        bench.queued_s = [9.0]
        bench.offer("long", 2.0, now=0.0)
        bench.offer("short", 1.0, now=late_by)

        bench.queued_s = [0.0]
        assert [first] == bench.look()


def test_each_decision_sees_the_one_before():
    bench = Bench(2)
    bench.queued_s = [9.0, 9.0]
    for name in "abc":
        bench.offer(name)

    bench.queued_s = [0.0, 0.0]
    assert ["a", "b"] == bench.look()
    assert [1.0, 1.0] == bench.queued_s
    assert len(bench.late.queue) == 1


def test_a_prefix_that_arrived_meanwhile_is_found():
    late = late_binding()
    first = offer(late, "long", [candidate(9.0, 3.0)], 0.0)
    offer(late, "middle", [candidate(9.0, 2.0)], 0.0)

    cached = {"long": 0.01, "middle": 2.0}
    cold = candidate(0.0, 99.0, "cold")
    list(looked(late, lambda request: [candidate(9.0, cached[request]), cold]))

    assert first.prefill_s == 0.01
    assert ["long", "middle"] == [held.request for held in late.queue.first(9)]


def test_a_look_has_a_limit():
    late = late_binding()
    for number in range(MAX_LOOKS + 1):
        offer(late, number, [candidate(9.0)], 0.0)
    asked: list[int] = []

    def candidates_of(number: int) -> list[Candidate]:
        asked.append(number)
        return [tight(1000.0)]

    assert [] == list(looked(late, candidates_of))
    assert list(range(MAX_LOOKS)) == asked


def test_cancelled_requests_are_gone_even_during_a_look():
    bench = Bench()
    bench.queued_s = [9.0]
    held = [bench.offer(name, 0.01) for name in "abc"]
    bench.late.cancel(held[0])
    bench.late.cancel(held[0])

    bench.queued_s = [0.0]
    bound = looked(bench.late, bench.candidates)
    assert next(bound)[0] is held[1]
    bench.late.cancel(held[2])

    assert [] == list(bound)
    assert not bench.late.queue
    bench.late.cancel(held[1])  # bound already


def tight(release_tokens_per_s: float) -> Candidate:
    return Candidate(
        "r0",
        matched_tokens=0,
        uncached_tokens=1000,
        queued_tokens=0,
        num_decoding=1,
        prefill_tokens_per_s=SPEED,
        decode_s=0.0,
        recent_uncached_tokens=0.0,
        num_in_flight=1,
        kv_usage=1.0,
        kv_capacity_tokens=60_000,
        kv_release_tokens_per_s=release_tokens_per_s,
    )


def test_memory_that_is_being_freed_is_waited_for():
    assert isinstance(offer(late_binding(), "a", [tight(10_000.0)]), Decision)  # 0.1 s
    assert isinstance(offer(late_binding(), "a", [tight(1000.0)]), Held)  # 1 s


def test_a_look_is_over_where_every_replica_has_a_queue():
    late = late_binding()
    for number in range(3):
        offer(late, number, [candidate(9.0)])
    asked = []

    def both(number: int) -> list[Candidate]:
        asked.append(number)
        return [candidate(0.151, name="r0"), candidate(0.151, name="r1")]

    assert [] == list(looked(late, both))
    assert [0] == asked


def test_a_flood_of_one_tenant_does_not_keep_another_waiting():
    bench = Bench()
    bench.queued_s = [9.0]
    for number in range(100):
        bench.offer(f"flood{number}", tenant="flood")
    order = []
    for number in range(3):
        bench.offer(f"quiet{number}", tenant="quiet")
    for _ in range(6):
        bench.queued_s = [0.0]
        order += bench.look()

    # Both start equal, the flood came first; then each in turn, as their work is the same.
    assert ["flood0", "quiet0", "flood1", "quiet1", "flood2", "quiet2"] == order


def test_a_newcomer_does_not_pass_a_tenant_that_was_served_less():
    bench = Bench()
    bench.queued_s = [9.0]
    bench.offer("a0", tenant="a")
    bench.offer("a1", tenant="a")
    bench.offer("b0", tenant="b")
    bench.queued_s = [0.0]
    assert ["a0"] == bench.look()

    bench.queued_s = [0.0]  # room again, before the next look
    assert isinstance(bench.offer("a2", 0.01, tenant="a"), Held)
    assert isinstance(bench.offer("b1", 0.01, tenant="b"), Decision)


def test_being_away_earns_nothing():
    bench = Bench()
    bench.queued_s = [9.0]
    for number in range(20):
        bench.offer(f"a{number}", tenant="a")
    for _ in range(10):
        bench.queued_s = [0.0]
        bench.look()
    bench.queued_s = [9.0]
    for number in range(10):
        bench.offer(f"new{number}", tenant="new")

    order = []
    for _ in range(6):
        bench.queued_s = [0.0]
        order += bench.look()
    assert [name[0] for name in order].count("a") == 3


def test_a_tenant_that_comes_back_starts_where_the_others_are():
    queue: FairQueue[str] = FairQueue()
    rest = [queue.add(f"a{n}", "a", 1.0, "r0", 0.0)[0] for n in range(8)]
    back, _ = queue.add("b0", "b", 1.0, "r0", 0.0)
    for held in (back, *rest[:6]):
        queue.served(held.tenant, held.prefill_s)
        queue.remove(held)

    for n in range(1, 6):  # b had 1 s, a has had 6 s, the last of them from 5 s on
        queue.add(f"b{n}", "b", 1.0, "r0", 0.0)

    looked_at = [held.request for held in queue.first(9)]
    assert ["b1", "a6", "b2", "a7", "b3", "b4", "b5"] == looked_at


def test_counters_are_forgotten_with_the_last_one_held():
    bench = Bench()
    bench.queued_s = [9.0]
    bench.offer("a0", tenant="a")
    bench.queued_s = [0.0]
    bench.look()
    assert bench.late.queue._lines == {}

    bench.queued_s = [0.0]
    assert isinstance(bench.offer("a1", tenant="a"), Decision)
    assert bench.late.queue._lines == {}


def test_requests_that_cannot_start_do_not_use_up_the_look_of_others():
    """The first tenant waits for memory; the second's request can start."""
    late = late_binding()
    for number in range(2 * MAX_LOOKS):
        offer(late, ("a", number), [candidate(9.0)], 0.0, tenant="a")
    offer(late, ("b", 0), [candidate(9.0)], 1.0, tenant="b")

    bound = looked(late, lambda request: [tight(1000.0) if request[0] == "a" else candidate(0.0)])

    assert [("b", 0)] == [held.request for held, _ in bound]


def test_a_full_queue_refuses_whoever_has_a_share_and_makes_room_for_others():
    bench = Bench(max_held=3)
    bench.queued_s = [9.0]
    held = [bench.offer(f"a{number}", tenant="a") for number in range(3)]
    assert bench.offer("a3", tenant="a") is None

    assert isinstance(bench.offer("b0", tenant="b"), Held)
    assert [held[2]] == bench.displaced
    assert not held[2].is_held
    assert bench.offer("b1", tenant="b") is None  # two and one: a third would only swap them
    assert bench.offer("a3", tenant="a") is None
    assert len(bench.late.queue) == 3
    assert repr(bench.late.queue) == "<FairQueue 3 of 3 held | 2 tenants>"


def test_bound_newcomers_count_as_served_while_others_wait():
    bench = Bench(2)
    bench.queued_s = [9.0, 9.0]
    bench.offer("a0", tenant="a")
    bench.queued_s = [9.0, 0.0]
    bench.offer("b0", tenant="b")
    assert bench.bound == ["b0"]

    bench.queued_s = [9.0, 0.0]
    assert isinstance(bench.offer("b1", tenant="b"), Held)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "reorder", "serve"]),
        st.integers(0, 3),
        st.floats(0.01, 5.0),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps=steps, max_held=st.integers(1, 8))
def test_the_queue_agrees_with_a_plain_list(steps, max_held):
    """Sizes, bounds and the order within a tenant, against sorting everything each time."""
    queue: FairQueue[int] = FairQueue(max_held)
    model: list[Held[int]] = []
    for number, (step, which, seconds) in enumerate(steps):
        if step == "add":
            held, displaced = queue.add(
                number, f"t{which}", seconds, f"r{number % 2}", float(number)
            )
            assert (held is None) <= (len(model) == max_held)
            if displaced is not None:
                model.remove(displaced)
            if held is not None:
                model.append(held)
        elif model:
            held = model[which % len(model)]
            if step == "reorder":
                queue.reorder(held, seconds, f"r{number % 2}")
                continue
            if step == "serve":
                queue.served(held.tenant, held.prefill_s)
            queue.remove(held)
            model.remove(held)

        assert len(queue) == len(model) <= max_held
        assert queue.held() == model
        for replica in ("r0", "r1"):
            waiting = sum(held.prefill_s for held in model if held.replica == replica)
            assert queue.waiting_s.get(replica, 0.0) == pytest.approx(waiting, abs=1e-9)
        looked_at = queue.first(len(model) + 1)
        assert set(looked_at) == set(model)
        assert len(looked_at) == len(model)
        for tenant in {held.tenant for held in model}:
            own = [held for held in looked_at if held.tenant == tenant]
            assert own == sorted(own, key=lambda held: (held.order, held.number))


@pytest.mark.parametrize(("wait_scale", "is_bound"), [(1.0, False), (0.5, False), (0.1, True)])
def test_waits_that_turn_out_shorter_than_predicted_hold_nobody(wait_scale, is_bound):
    busy = candidate(queued_s=1.0, wait_scale=wait_scale)
    late: LateBinding[str] = LateBinding(CostPolicy(holds=True))

    taken, _ = late.offer("r", [busy], 0.0, Random(1))

    assert isinstance(taken, Decision) is is_bound
