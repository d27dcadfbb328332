"""A new replica takes its share of misses, every hit, and more when the others are busy."""

from __future__ import annotations

from math import ceil
from random import Random

import pytest

from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import text_chain
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.slow_start import MIN_BYTES, MISS_SHARE, THIN_SHARE, thin
from roost_wire.load_report import LoadReport


def make_placer(num_replicas: int) -> Placer:
    index = PrefixIndex()
    fleet = Fleet(index, [f"http://h{number}" for number in range(num_replicas)])
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport())
    return Placer(index, fleet, CostPolicy, Random(3))


def ask(number: int, num_bytes: int = 2048) -> RoutingFields:
    prompt = (b"%d " % number) * num_bytes
    return RoutingFields("m", stream=True, prompt=prompt[:num_bytes])


def serve(placer: Placer, number: int) -> str:
    """Place a request and answer it at once; who took it."""
    placement = placer.place(ask(number), float(number))
    placer.first_byte(placement, float(number), streamed=True)
    placer.finish(placement, float(number))
    return placement.replica.name


def with_a_newcomer() -> Placer:
    placer = make_placer(2)
    newcomer = placer.fleet.replicas[1]
    placer.fleet.refused(newcomer)
    for number in range(200):
        assert serve(placer, number) == "r0"
    placer.fleet.answered(newcomer, ["m"], LoadReport())
    return placer


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([], []),
        ([0, MIN_BYTES - 1], [False, False]),
        ([0, MIN_BYTES], [True, False]),
        ([ceil(THIN_SHARE * MIN_BYTES), MIN_BYTES], [False, False]),
        ([ceil(THIN_SHARE * MIN_BYTES) - 1, MIN_BYTES], [True, False]),
    ],
)
def test_thin_is_relative_to_the_fullest(held, expected):
    assert thin(held) == expected


def test_a_newcomer_gets_a_share_of_the_misses_until_its_cache_is_worth_something(monkeypatch):
    placer = with_a_newcomer()
    taken = [serve(placer, number) for number in range(1000, 1028)]
    assert 1 <= taken.count("r1") <= 2.5 * MISS_SHARE * len(taken)

    index, (full, new) = placer.index, placer.fleet.replicas
    while index.num_bytes(new.holder) < THIN_SHARE * index.num_bytes(full.holder):
        index.add(new.holder, text_chain(b"warm %d " % index.num_bytes(new.holder) * 300), 9999)
    monkeypatch.setattr("roost_router.policy.cost.may_take_miss", None)  # not asked any more
    for number in range(3000, 3040):
        serve(placer, number)


def test_what_it_holds_goes_to_it_however_thin_it_is():
    placer = with_a_newcomer()
    number = 5000
    while serve(placer, number) != "r1":
        number += 1
    assert serve(placer, number) == "r1"


def test_a_busy_fleet_does_not_wait_for_a_thin_replica_to_warm():
    placer = with_a_newcomer()
    for number in range(40):  # none of them is answered
        placer.place(ask(9000 + number, 8000), 400.0)
    waiting = [replica.queued_tokens for replica in placer.fleet.replicas]
    assert min(waiting) > 0.5 * max(waiting)


def test_a_fleet_that_is_new_as_a_whole_is_not_slowed():
    placer = make_placer(4)
    taken = {serve(placer, number) for number in range(12)}
    assert len(taken) == 4
