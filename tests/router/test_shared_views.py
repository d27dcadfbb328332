"""Several routers believe the same once it is quiet, after whatever happened."""

from __future__ import annotations

import pytest
from shared_routers import Cluster

STEPS = 120


def play(seed: int) -> Cluster:
    cluster = Cluster(seed)
    cluster.feed()
    for _ in range(STEPS):
        cluster.step()
    cluster.settle()
    return cluster


def check(cluster: Cluster) -> None:
    first, *others = cluster.routers
    for other in others:
        assert other.blocks() == first.blocks(), f"seed {cluster.seed}"
    told = {router.number: set(router.journal._expected) for router in cluster.routers}
    for router in cluster.routers:
        # Who was away for a while may have missed some, but knows of none that is over.
        for number, peer in router.hearing._peers.items():
            assert set(peer.expected) <= told[number], f"seed {cluster.seed}"
    for router in cluster.routers:
        rest = [other.own_load() for other in cluster.routers if other is not router]
        total = [
            tuple(map(sum, zip(*of_replica, strict=True))) for of_replica in zip(*rest, strict=True)
        ]
        assert router.shared_load() == total, f"seed {cluster.seed}"


def check_nothing_is_left(cluster: Cluster) -> None:
    for router in cluster.routers:
        while router.running:
            cluster.answer(router, router.running[-1])
    cluster.settle()
    check(cluster)
    for router in cluster.routers:
        assert router.expected() == 0, f"seed {cluster.seed}"
        assert not router.index._expecting
        assert not any(map(any, router.shared_load() + router.own_load())), f"seed {cluster.seed}"


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_views_are_equal_after_quiet(first):
    held = 0
    for seed in range(first, first + 50):
        cluster = play(seed)
        check(cluster)
        held += sum(map(len, cluster.routers[0].blocks().values()))
        check_nothing_is_left(cluster)
    assert held > 500  # there was something to agree about


@pytest.mark.simulation
@pytest.mark.parametrize("first", range(0, 10_000, 1000))
def test_views_are_equal_after_ten_thousand_histories(first):
    for seed in range(first, first + 1000):
        cluster = play(seed)
        check(cluster)
        check_nothing_is_left(cluster)
