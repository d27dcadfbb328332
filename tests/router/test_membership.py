"""Replicas that join and leave: who gets requests, and that nothing is kept for who is gone."""

from __future__ import annotations

import gc
import weakref
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.dispatch import Dispatcher
from roost_router.errors import ModelNotFoundError, NoReplicaError, RouterError
from roost_router.fleet.fleet import LEFT_S, MAX_NAMES, Fleet
from roost_router.fleet.replica import Membership, Replica, ReplicaState
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.token_knowledge import TokenKnowledge
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.chwbl import BoundedHashing
from roost_router.policy.cost import CostPolicy
from roost_router.policy.fair_queue import Held
from roost_router.policy.hash_ring import VIRTUAL_NODES, HashRing
from roost_router.policy.shadow import Shadow
from roost_router.told_residency import ToldResidency
from roost_wire.load_report import LoadReport

REPORT = LoadReport(kv_capacity_tokens=65536)


class Asked:
    def __init__(self, number: int, model: str = "m") -> None:
        prompt = f"{number:08d}".encode() * 32 * 20
        self.fields = RoutingFields(model, stream=True, prompt=prompt)


class Bench:
    def __init__(self, num_replicas: int = 2, policy=lambda: CostPolicy(holds=True)) -> None:
        self.index = PrefixIndex()
        self.fleet = Fleet(self.index, [])
        self.told = ToldResidency(TokenKnowledge(1 << 20, 1 << 20), ["m"], lambda _: None)
        self.placer = Placer(self.index, self.fleet, policy, Random(1), self.told)
        self.dispatcher: Dispatcher[Asked] = Dispatcher(self.placer, Random(1))
        for number in range(num_replicas):
            self.join(f"http://h{number}")

    def join(self, url: str, model: str = "m") -> Replica:
        replica = self.fleet.add(url)
        self.fleet.answered(replica, [model], REPORT)
        if not replica.speed.num_observed:
            for tokens in range(0, 40_000, 4000):  # 4,000 tokens/s: a prompt takes 0.32 s
                replica.speed.observe_ttft(tokens, 0.02 + tokens / 4000)
        return replica

    def place(self, number: int = 0, now: float = 0.0) -> Placement:
        return self.placer.place(Asked(number).fields, now)


class Log:
    """A watcher that writes down what it is told."""

    def __init__(self, told: list[str], name: str = "") -> None:
        self.told, self.name = told, name

    def joined(self, replica: Replica) -> None:
        self.told.append(f"{self.name}+{replica.name}")

    def gone(self, replica: Replica) -> None:
        self.told.append(f"{self.name}-{replica.name}")


def test_a_new_replica_is_joining_until_it_answers():
    bench = Bench(0)
    replica = bench.fleet.add("http://h")

    assert replica.state is ReplicaState.JOINING
    assert not bench.fleet.is_ready
    with pytest.raises(NoReplicaError):
        bench.place()
    bench.fleet.answered(replica, ["m"], REPORT)
    assert bench.place().replica is replica


def test_adding_a_member_again_changes_nothing():
    bench = Bench(1)
    replica = bench.fleet.replicas[0]

    assert bench.fleet.add(replica.url) is replica
    assert bench.fleet.replicas == [replica]
    assert bench.fleet.num_added == 1


def test_a_removed_replica_gets_no_request_though_all_of_the_prompt_is_there():
    bench = Bench(2)
    home = bench.place()
    bench.placer.first_byte(home, 1.0, streamed=True)

    bench.fleet.remove(home.replica, 1.0)

    assert bench.place(now=2.0).replica is not home.replica
    assert home.replica.membership is Membership.LEAVING


def test_a_held_request_goes_to_who_is_left():
    bench = Bench(2)
    offered = [bench.dispatcher.offer(Asked(number), 0.0)[0] for number in range(3)]
    first, second, held = offered
    assert isinstance(first, Placement)
    assert isinstance(second, Placement)
    assert isinstance(held, Held)
    waited_for = next(r for r in bench.fleet.replicas if r.name == held.replica)
    other = next(r for r in bench.fleet.replicas if r is not waited_for)

    bench.fleet.remove(waited_for, 0.0)
    for placement in (first, second):
        bench.placer.finish(placement, 1.0)
    assert waited_for.membership is Membership.GONE
    late = bench.dispatcher._late["m"]
    assert waited_for.name not in late.queue.waiting_s
    [(_, taken)] = bench.dispatcher.look(1.0)

    assert isinstance(taken, Placement)
    assert taken.replica is other
    assert not late.queue.waiting_s


def test_held_requests_whose_last_replica_left_are_told():
    bench = Bench(1)
    placement, _ = bench.dispatcher.offer(Asked(0), 0.0)
    assert isinstance(placement, Placement)
    bench.dispatcher.offer(Asked(1), 0.0)

    bench.fleet.remove(placement.replica, 0.0)

    [(_, error)] = bench.dispatcher.look(1.0)
    assert isinstance(error, NoReplicaError)


def test_it_is_gone_when_its_last_request_ends_and_not_before():
    told: list[str] = []
    bench = Bench(1)
    bench.fleet.watch(Log(told))
    replica = bench.fleet.replicas[0]
    first, second = bench.place(1), bench.place(2)

    bench.fleet.remove(replica, 0.0)
    bench.placer.first_byte(first, 1.0, streamed=True)
    bench.placer.finish(second, 1.0)
    assert told == ["+r0"]
    assert bench.fleet.leaving == [replica]
    bench.placer.learn(first, 1280, 0)
    bench.placer.finish(first, 2.0)

    assert told == ["+r0", "-r0"]
    assert replica.membership is Membership.GONE
    assert (replica.num_in_flight, replica.num_decoding, replica.queued_tokens) == (0, 0, 0)
    assert bench.fleet.leaving == []


def test_who_came_last_hears_first_of_those_that_are_gone():
    told: list[str] = []
    bench = Bench(1)
    bench.fleet.watch(Log(told, "a"))
    bench.fleet.watch(Log(told, "b"))

    bench.fleet.remove(bench.fleet.replicas[0], 0.0)
    bench.fleet.add("http://other")

    assert told == ["a+r0", "b+r0", "b-r0", "a-r0", "a+r1", "b+r1"]


def test_one_that_comes_back_before_its_end_is_the_same_replica():
    told: list[str] = []
    bench = Bench(1)
    bench.fleet.watch(Log(told))
    placement = bench.place()
    bench.placer.first_byte(placement, 1.0, streamed=True)
    bench.fleet.remove(placement.replica, 1.0)

    again = bench.fleet.add(placement.replica.url)

    assert again is placement.replica
    assert bench.place(now=2.0).matched_blocks == 20
    bench.placer.finish(placement, 3.0)
    assert told == ["+r0"]
    assert bench.fleet.replicas == [again]
    assert bench.fleet.leaving == []


def test_a_url_that_comes_back_has_its_old_name_and_no_other_url_gets_it():
    bench = Bench(2)
    first = bench.fleet.replicas[0]
    bench.place()
    bench.fleet.remove(first, 0.0)
    assert bench.fleet.add("http://new").name == "r2"

    again = bench.fleet.add(first.url)

    assert again.name == first.name
    assert again is not first or first.membership is Membership.MEMBER


@pytest.mark.parametrize(("num_between", "is_known"), [(MAX_NAMES - 1, True), (MAX_NAMES, False)])
def test_names_of_so_many_that_are_gone_are_remembered(num_between, is_known):
    fleet = Fleet(PrefixIndex(), [])
    for number in range(num_between + 1):
        fleet.remove(fleet.add(f"http://h{number}"), 0.0)

    assert (fleet.add("http://h0").name == "r0") is is_known


def test_a_draining_replica_gets_nothing_until_it_no_longer_drains():
    bench = Bench(2)
    first, second = bench.fleet.replicas
    bench.fleet.set_draining(first, is_draining=True)

    assert {bench.place(number).replica for number in range(6)} == {second}
    assert first.condition == "draining"
    bench.fleet.set_draining(second, is_draining=True)
    with pytest.raises(NoReplicaError):
        bench.place()
    assert not bench.fleet.is_ready
    assert bench.fleet.models() == {}
    assert not bench.fleet.is_served("m")
    assert not bench.fleet.has_fresh("m", frozenset())

    bench.fleet.set_draining(first, is_draining=False)
    assert bench.place().replica is first


def test_a_retry_does_not_go_to_a_replica_that_drains():
    bench = Bench(2)
    first, second = bench.fleet.replicas
    bench.fleet.set_draining(first, is_draining=True)

    placement = bench.placer.place(Asked(0).fields, 0.0, frozenset({second.name}))

    assert placement.replica is second


def test_draining_says_nothing_of_one_that_left():
    bench = Bench(1)
    replica = bench.place().replica
    bench.fleet.remove(replica, 0.0)

    bench.fleet.set_draining(replica, is_draining=False)

    assert replica.membership is Membership.LEAVING


@pytest.mark.parametrize(
    ("at", "error"), [(LEFT_S, NoReplicaError), (LEFT_S + 1, ModelNotFoundError)]
)
def test_a_model_whose_last_replica_left_is_not_unknown_at_once(at, error):
    """While its replicas are replaced, clients are to come again."""
    bench = Bench(1)
    bench.join("http://other", model="n")
    bench.fleet.remove(bench.fleet.replicas[0], 0.0)

    with pytest.raises(error):
        bench.place(now=at)


def test_evidence_that_comes_late_does_not_bring_one_back():
    bench = Bench(1)
    replica = bench.fleet.replicas[0]
    bench.fleet.remove(replica, 0.0)

    bench.fleet.answered(replica, ["m"], LoadReport(started_at=1.0, kv_capacity_tokens=1))
    bench.fleet.refused(replica)
    bench.fleet.poll_failed(replica)
    bench.fleet.failed(replica, 1.0, stalled=True)

    assert bench.fleet.replicas == []
    assert bench.index._held == {}


def test_what_is_learnt_late_of_one_that_is_gone_is_not_kept():
    bench = Bench(1)
    first = bench.place(0)
    bench.placer.first_byte(first, 1.0, streamed=True)
    bench.placer.finish(first, 1.0)
    late = bench.place(0, 2.0)  # all of it is believed to be there
    late.fields.counted_tokens = 1280
    bench.placer.first_byte(late, 3.0, streamed=True)
    bench.fleet.remove(late.replica, 3.0)
    bench.placer.finish(late, 3.0)
    assert late.replica.membership is Membership.GONE

    bench.placer.learn(late, 1280, 0)

    assert_nothing_is_kept(bench)


def test_a_fit_that_replicas_share_counts_those_that_are_there():
    bench = Bench(3)
    shared = bench.fleet.replicas[0].speed.prefill
    assert shared.num_replicas == 3

    bench.fleet.remove(bench.fleet.replicas[1], 0.0)

    assert shared.num_replicas == 2


def test_a_ring_keeps_the_names_of_those_that_are_left_and_their_keys():
    ring = HashRing()
    names = [f"r{number}" for number in range(8)]
    before = {key: ring.order(names, key << 56)[0] for key in range(256)}

    ring.retain(frozenset(names[1:]))

    assert len(ring._points) == 7 * VIRTUAL_NODES
    after = {key: ring.order(names[1:], key << 56)[0] for key in range(256)}
    assert all(after[key] == name for key, name in before.items() if name != "r0")
    assert before == {key: ring.order(names, key << 56)[0] for key in range(256)}


def test_a_shadows_ring_forgets_too_whatever_it_raises():
    class Grumpy(BoundedHashing):
        def retain(self, names: frozenset[str]) -> None:
            super().retain(names)
            raise RuntimeError("no")

    bench, shadow = Bench(3), Shadow("grumpy", Grumpy, Random(1))
    placement = bench.place()
    shadow.see("m", placement.candidates, 0, 0.0)

    shadow.retain(frozenset({"r1"}))

    assert len(shadow._policies["m"]._ring._points) == VIRTUAL_NODES


class History:
    """What happens to a router, each step by a number."""

    def __init__(self, policy) -> None:
        self.bench = Bench(0, policy)
        self.fleet, self.placer = self.bench.fleet, self.bench.placer
        self.running: list[Placement] = []
        self.num_held = 0
        self.now = 0.0

    def member(self, number: int) -> Replica | None:
        members = self.fleet.replicas
        return members[number % len(members)] if members else None

    def some(self, number: int) -> list[Placement]:
        return [self.running[number % len(self.running)]] if self.running else []

    def take(self, taken: Placement | RouterError) -> None:
        if isinstance(taken, RouterError):
            assert not any(replica.is_open for replica in self.fleet.replicas)
            return
        assert taken.replica.is_open
        assert taken.replica in self.fleet.replicas
        self.running.append(taken)

    def join(self, number: int) -> None:
        self.bench.join(f"http://h{number}")

    def leave(self, number: int) -> None:
        replica = self.member(number)
        if replica is not None:
            self.fleet.remove(replica, self.now)

    def drain(self, number: int) -> None:
        replica = self.member(number)
        if replica is not None:
            self.fleet.set_draining(replica, is_draining=number % 2 == 0)

    def refuse(self, number: int) -> None:
        replica = self.member(number)
        if replica is not None:
            self.fleet.refused(replica)

    def offer(self, number: int) -> None:
        try:
            taken, _ = self.bench.dispatcher.offer(Asked(number % 4), self.now)
        except RouterError as error:
            self.take(error)
            return
        if isinstance(taken, Placement):
            self.take(taken)
        else:
            self.num_held += 1

    def look(self, _: int) -> None:
        for _, taken in self.bench.dispatcher.look(self.now):
            self.num_held -= 1
            self.take(taken)

    def first_byte(self, number: int) -> None:
        for placement in self.some(number):
            self.placer.first_byte(placement, self.now, streamed=True)

    def learn(self, number: int) -> None:
        for placement in self.some(number):
            self.placer.learn(placement, 1280, number * 100)

    def finish(self, number: int) -> None:
        for placement in self.some(number):
            self.placer.finish(placement, self.now, num_events=number)
            self.running.remove(placement)

    def check(self) -> None:
        assert self.bench.dispatcher.num_held == self.num_held
        for replica in [*self.fleet.replicas, *self.fleet.leaving]:
            here = [placement for placement in self.running if placement.replica is replica]
            assert replica.num_in_flight == len(here)

    def end(self) -> None:
        for replica in self.fleet.replicas:
            self.fleet.remove(replica, self.now)
        for placement in self.running:
            self.placer.finish(placement, self.now)
            self.placer.learn(placement, 1280, 0)  # late
        self.look(0)


STEPS = ("join", "leave", "drain", "refuse", "offer", "look", "first_byte", "learn", "finish")


@pytest.mark.parametrize("policy", [lambda: CostPolicy(holds=True), BoundedHashing])
@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), max_size=120))
def test_no_history_loses_a_request_or_keeps_anything(policy, steps):
    """Each request is placed on a member that took requests then, or refused where there was none;
    in the end no load is left, and nothing of who is gone."""
    history = History(policy)
    for step, number in steps:
        history.now += 0.05
        getattr(history, step)(number)
        history.check()
    history.end()

    assert history.fleet.replicas == history.fleet.leaving == []
    assert history.num_held == history.bench.dispatcher.num_held == 0
    for placement in history.running:
        replica = placement.replica
        assert (replica.num_in_flight, replica.num_decoding, replica.queued_tokens) == (0, 0, 0)
    assert_nothing_is_kept(history.bench)


def assert_nothing_is_kept(bench: Bench) -> None:
    placer, told = bench.placer, bench.told
    by_replica = (
        placer._pending,
        placer._running,
        placer._silent,
        bench.fleet._by_url,
        bench.index._held,
        told._sinks,
        told._lately,
        told._started,
    )
    assert [len(kept) for kept in by_replica] == [0] * len(by_replica)
    for policy in placer._policies.values():
        if isinstance(policy, BoundedHashing):
            assert policy._ring._points == []
    for late in bench.dispatcher._late.values():
        assert not late.queue.waiting_s


def test_replicas_that_are_gone_are_freed():
    """Nobody refers to them any more: objects of a thousand would be a leak."""
    bench = Bench(1)
    gone = []
    for number in range(20):
        replica = bench.join(f"http://x{number}")
        gone.append(weakref.ref(replica.kept))  # compiled classes take no weak references
        bench.fleet.remove(replica, 0.0)
    del replica
    gc.collect()

    assert [ref() for ref in gone] == [None] * 20
