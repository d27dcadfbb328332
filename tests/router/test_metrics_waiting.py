"""What waits, in seconds, as an autoscaler reads it; and who is ejected."""

from __future__ import annotations

from random import Random

import pytest

from roost_router.dispatch import Dispatcher
from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.metrics import RouterMetrics
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.fair_queue import Held
from roost_wire.load_report import LoadReport


class Asked:
    def __init__(self, text: str, model: str = "m") -> None:
        """A prompt of 16,000 bytes."""
        prompt = (text.encode() + b" ") * 16_000
        self.fields = RoutingFields(model, stream=True, prompt=prompt[:16_000])


class Watched:
    """Two replicas that compute 4,000 tokens/s, so a prompt takes a second, and their metrics."""

    def __init__(self) -> None:
        index = PrefixIndex()
        self.fleet = Fleet(index, ["http://h0", "http://h1"])
        for replica in self.fleet.replicas:
            self.fleet.answered(replica, ["m", "other"], LoadReport())
            for tokens in range(0, 40_000, 400):
                replica.speed.observe_ttft(tokens, 0.02 + tokens / 4000)
        placer = Placer(index, self.fleet, lambda: CostPolicy(holds=True), Random(1))
        self.dispatcher: Dispatcher[Asked] = Dispatcher(placer, Random(1))
        metrics = RouterMetrics()
        metrics.watch(placer)
        metrics.watch_held(self.dispatcher, self.fleet)
        self._registry = metrics.registry

    def values(self, name: str) -> list[float | None]:
        """Of each replica."""
        return [
            self._registry.get_sample_value(name, {"replica": replica.name})
            for replica in self.fleet.replicas
        ]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_an_idle_fleet_has_no_backlog(watched):
    assert watched.values("roost_backlog_seconds") == [0, 0]


def test_backlog_is_what_is_queued_and_what_is_held_of_all_models(watched):
    for text in "ab":
        assert isinstance(watched.dispatcher.offer(Asked(text), 0.0)[0], Placement)
    queued = watched.values("roost_backlog_seconds")
    assert queued == pytest.approx([1.0, 1.0], rel=0.05)

    held = [watched.dispatcher.offer(Asked(text), 0.0)[0] for text in "cd"]
    held.append(watched.dispatcher.offer(Asked("e", model="other"), 0.0)[0])
    assert all(isinstance(one, Held) for one in held)
    waiting_s = watched.dispatcher.waiting_s()
    assert sum(waiting_s.values()) == pytest.approx(3.0, rel=0.05)
    assert watched.values("roost_backlog_seconds") == pytest.approx(
        [
            of + waiting_s.get(replica.name, 0.0)
            for of, replica in zip(queued, watched.fleet.replicas, strict=True)
        ]
    )

    for one in held:
        watched.dispatcher.cancel(one)
    assert watched.values("roost_backlog_seconds") == pytest.approx(queued)


def test_a_replica_that_is_down_has_none(watched):
    watched.fleet.refused(watched.fleet.replicas[0])

    assert watched.values("roost_backlog_seconds") == [None, 0]


def test_an_ejected_replica_shows_until_a_request_succeeds(watched):
    health = watched.fleet.replicas[0].health
    assert watched.values("roost_router_replica_ejected") == [0, 0]

    health.failed(0.0, stalled=True)
    assert watched.values("roost_router_replica_ejected") == [1, 0]

    health.succeeded()
    assert watched.values("roost_router_replica_ejected") == [0, 0]
