"""Requests placed or held, over the real placer, with a clock of our own."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.dispatch import Dispatcher
from roost_router.errors import HeldTooManyError, ModelNotFoundError, NoReplicaError
from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.fair_queue import Held
from roost_router.policy.round_robin import RoundRobin
from roost_wire.load_report import LoadReport


class Asked:
    def __init__(self, name: str, model: str = "m", num_bytes: int = 16_000) -> None:
        self.name = name
        prompt = (name.encode() + b" ") * num_bytes
        self.fields = RoutingFields(model, stream=True, prompt=prompt[:num_bytes])

    def __repr__(self) -> str:
        return self.name


class Bench:
    """Replicas that compute 4,000 tokens/s: a prompt of 16,000 bytes takes a second."""

    def __init__(self, num_replicas: int = 1, policy=lambda: CostPolicy(holds=True), **options):
        index = PrefixIndex()
        self.fleet = Fleet(index, [f"http://h{number}" for number in range(num_replicas)])
        for replica in self.fleet.replicas:
            self.fleet.answered(replica, ["m", "other"], LoadReport())
            for tokens in range(0, 40_000, 400):
                replica.speed.observe_ttft(tokens, 0.02 + tokens / 4000)
        rng = Random(1)
        self.placer = Placer(index, self.fleet, policy, rng)
        self.dispatcher: Dispatcher[Asked] = Dispatcher(self.placer, rng, **options)
        self.placed: list[tuple[Asked, Placement]] = []

    def offer(self, asked: Asked, now: float = 0.0, tenant: str = ""):
        taken, displaced = self.dispatcher.offer(asked, now, tenant)
        if isinstance(taken, Placement):
            self.placed.append((asked, taken))
        return taken, displaced

    def look(self, now: float) -> list:
        found = []
        for asked, taken in self.dispatcher.look(now):
            if isinstance(taken, Placement):
                self.placed.append((asked, taken))
                found.append(asked.name)
            else:
                found.append(taken)
        return found

    def answer(self, now: float) -> None:
        """The first tokens of all that was placed come, and the ends."""
        for _, placement in self.placed:
            self.placer.first_byte(placement, now, streamed=True)
            self.placer.finish(placement, now)
        self.placed.clear()


def test_a_request_is_held_while_the_only_replica_is_busy():
    bench = Bench()
    assert isinstance(bench.offer(Asked("a"))[0], Placement)
    assert isinstance(bench.offer(Asked("b"))[0], Held)
    assert bench.dispatcher.num_held == 1
    assert repr(bench.dispatcher) == "<Dispatcher 1 held | 1 models>"

    assert bench.look(0.5) == []
    bench.answer(1.0)
    assert bench.look(1.0) == ["b"]
    assert bench.dispatcher.num_held == 0
    assert [r.num_in_flight for r in bench.fleet.replicas] == [1]


def test_a_prefix_that_is_being_computed_is_waited_for_and_found():
    bench = Bench(2)
    first = bench.offer(Asked("same"))[0]
    held = bench.offer(Asked("same", num_bytes=16_100))[0]
    assert isinstance(held, Held)  # 1 s of queue beats 1 s of prefill at three times the price

    bench.answer(1.0)
    bench.look(1.0)
    ((_, placement),) = bench.placed
    assert placement.replica is first.replica
    assert placement.matched_tokens > 3000


@pytest.mark.parametrize("policy", [CostPolicy, RoundRobin])
def test_other_policies_place_at_once(policy):
    bench = Bench(policy=policy)
    for number in range(5):
        assert isinstance(bench.offer(Asked(str(number)))[0], Placement)
    assert list(bench.dispatcher.look(9.0)) == []


def test_nothing_is_held_before_a_speed_is_known():
    index = PrefixIndex()
    fleet = Fleet(index, ["http://h"])
    fleet.answered(fleet.replicas[0], ["m"], LoadReport())
    placer = Placer(index, fleet, lambda: CostPolicy(holds=True), Random(1))
    dispatcher: Dispatcher[Asked] = Dispatcher(placer, Random(1))

    taken = [dispatcher.offer(Asked(str(number)), 0.0)[0] for number in range(9)]

    assert all(isinstance(one, Placement) for one in taken)


def test_models_have_queues_of_their_own():
    bench = Bench()
    bench.offer(Asked("a"))
    bench.offer(Asked("b"))
    held = bench.offer(Asked("c", model="other"))[0]
    assert repr(bench.dispatcher) == "<Dispatcher 2 held | 2 models>"
    assert [one.request.name for one in bench.dispatcher.held()] == ["b", "c"]

    bench.dispatcher.cancel(held)
    bench.dispatcher.cancel(held)
    assert [one.request.name for one in bench.dispatcher.held()] == ["b"]


def test_who_waits_for_replicas_that_have_gone_is_told():
    bench = Bench()
    bench.offer(Asked("a"))
    bench.offer(Asked("b"))
    bench.fleet.refused(bench.fleet.replicas[0])

    (error,) = bench.look(0.1)

    assert isinstance(error, NoReplicaError)
    assert bench.dispatcher.num_held == 0


def test_a_model_that_nobody_serves_is_refused_at_once():
    with pytest.raises(ModelNotFoundError):
        Bench().offer(Asked("a", model="what"))


def test_the_limit_holds_at_its_edge():
    bench = Bench(max_held=2)
    for name in "abc":
        bench.offer(Asked(name))
    assert bench.dispatcher.num_held == 2
    with pytest.raises(HeldTooManyError, match="2 requests wait already") as caught:
        bench.offer(Asked("d"))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)


def test_a_tenant_makes_room_for_another():
    bench = Bench(max_held=2)
    for name in "abc":
        bench.offer(Asked(name), tenant="flood")
    _, displaced = bench.offer(Asked("d"), tenant="quiet")
    assert displaced.request.name == "c"
    assert sorted(one.request.name for one in bench.dispatcher.held()) == ["b", "d"]


steps = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "look", "cancel", "answer"]),
        st.integers(0, 5),
        st.integers(200, 60_000),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_every_request_is_placed_once_cancelled_or_held(steps):
    bench = Bench(2, max_held=5)
    offered, placed, gone, held = set(), [], set(), {}
    now = 0.0
    for number, (step, which, num_bytes) in enumerate(steps):
        now += 0.02
        before = len(bench.placed)
        if step == "offer":
            asked = Asked(f"{which}", num_bytes=num_bytes)
            asked.name = f"{number}"
            try:
                taken, displaced = bench.offer(asked, now, tenant=f"t{which % 3}")
            except HeldTooManyError:
                continue
            offered.add(asked.name)
            if displaced is not None:
                gone.add(displaced.request.name)
            if isinstance(taken, Held):
                held[asked.name] = taken
        elif step == "look":
            bench.look(now)
        elif step == "answer":
            bench.answer(now)
            before = 0
        elif held:
            name = sorted(held)[which % len(held)]
            if held[name].is_held:
                gone.add(name)
            bench.dispatcher.cancel(held[name])
        placed += [asked.name for asked, _ in bench.placed[before:]]
        waiting = {one.request.name for one in bench.dispatcher.held()}
        assert len(placed) == len(set(placed))
        assert set(placed) | gone | waiting == offered
        assert len(placed) + len(gone) + len(waiting) == len(offered)
    bench.answer(now)
    for replica in bench.fleet.replicas:
        assert (replica.queued_tokens, replica.num_in_flight, replica.num_decoding) == (0, 0, 0)
