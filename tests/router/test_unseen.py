"""What others may have brought to replicas: where to look for it, and how much to expect."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from roost_router.fleet.fleet import MIN_OTHERS, Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.unseen import (
    MEMORY_TOKENS,
    MIN_SHARE,
    NUM_KINDS,
    NUM_RANKS,
    PRIOR_SHARE,
    Unseen,
    kind_of,
    ranks,
    salt,
)
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_router.policy.cost import CostPolicy
from roost_wire.load_report import LoadReport
from roost_wire.told_load import ToldLoad

SALTS = [salt(f"http://replica-{number}:8000") for number in range(8)]


def test_each_replica_is_first_for_its_share_of_the_blocks():
    rng = Random(1)
    first = Counter(ranks(rng.getrandbits(64), SALTS).index(0) for _ in range(4000))

    assert set(first) == set(range(8))
    assert max(first.values()) < 1.2 * 500
    assert min(first.values()) > 0.8 * 500


def test_ranks_are_one_each_and_then_all_the_last():
    found = ranks(12345678901234567890, SALTS)
    assert sorted(found) == [0, 1, 2, 3, 3, 3, 3, 3]
    assert sorted(ranks(7, SALTS[:2])) == [0, 1]
    assert ranks(7, SALTS[:1]) == [0]


def test_a_replica_that_leaves_moves_nobody_elses_blocks():
    rng = Random(2)
    for _ in range(200):
        key = rng.getrandbits(64)
        found = ranks(key, SALTS)
        without = ranks(key, SALTS[:-1])
        if found[-1] != 0:
            assert without.index(0) == found.index(0)
        else:
            assert without.index(0) == found.index(1)


def test_the_order_in_which_a_router_knows_replicas_is_nothing():
    key = 0xFEDCBA9876543210
    forth, back = ranks(key, SALTS), ranks(key, SALTS[::-1])
    assert forth == back[::-1]


def test_shares_follow_what_was_found():
    unseen, kind = Unseen(), kind_of(0, holds_deepest=False)
    assert unseen.share(kind) == PRIOR_SHARE

    for _ in range(40):
        unseen.learn(kind, int(MEMORY_TOKENS) // 10, int(MEMORY_TOKENS) // 20)
    assert unseen.share(kind) == pytest.approx(0.5, abs=0.01)

    for _ in range(200):
        unseen.learn(kind, int(MEMORY_TOKENS) // 10, 0)
    assert unseen.share(kind) == MIN_SHARE  # routers that join later find each other


def test_kinds_learn_apart_and_later_ranks_expect_nothing():
    unseen = Unseen()
    unseen.learn(kind_of(1, holds_deepest=True), int(MEMORY_TOKENS), 10**9)

    shares = [unseen.share(kind) for kind in range(NUM_KINDS)]
    expected = [0.0] * NUM_KINDS
    expected[0] = expected[NUM_RANKS] = PRIOR_SHARE
    expected[NUM_RANKS + 1] = 1.0  # more than all is all
    assert shares == expected


@pytest.mark.parametrize(("uncached", "found"), [(0, 0), (-5, 3), (1000, -1000)])
def test_figures_that_cannot_be_do_no_harm(uncached, found):
    unseen = Unseen()
    unseen.learn(1, uncached, found)
    assert unseen.share(1) == 0.0


def make_placer(urls: list[str], seed: int, num_running: int = MIN_OTHERS + 1) -> Placer:
    """`num_running`: requests that each replica reports, none of them this router's."""
    index = PrefixIndex()
    fleet = Fleet(index, urls)
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport(num_running=num_running))
    return Placer(index, fleet, CostPolicy, Random(seed))


def test_a_told_load_counts_others_as_a_poll_does_but_does_not_prove_them():
    """It comes with each answer: what overtakes it once in a while is taken for others there."""
    index = PrefixIndex()
    fleet = Fleet(index, ["http://r"])
    (replica,) = fleet.replicas
    fleet.answered(replica, ["m"], LoadReport(num_running=1, started_at=5.0))
    placer = Placer(index, fleet, CostPolicy, Random(1))
    placement = placer.place(RoutingFields("m", stream=True, prompt=b"x" * 900), 0.0)

    fleet.load_told(replica, ToldLoad(MIN_OTHERS + 2, 1, 512, 2048, 90))
    assert replica.num_others == MIN_OTHERS + 2  # one of the requests is ours
    assert not fleet.others_seen
    assert replica.report.queued_tokens == 90
    assert replica.report.started_at == 5.0
    (candidate,) = placer.weigh(placement.fields, 0.1).candidates
    assert (candidate.num_others, candidate.kv_usage) == (MIN_OTHERS + 2, 0.25)

    # 225 tokens of ours are queued there.
    fleet.load_told(replica, ToldLoad(2, 0, 0, 2048, 1225))
    (candidate,) = placer.weigh(placement.fields, 1.0).candidates
    assert (candidate.queued_tokens, candidate.tells_queue) == (225 + 1000, True)
    (candidate,) = placer.weigh(placement.fields, 1.25).candidates  # 2,000 tokens/s, as assumed
    assert candidate.queued_tokens == 225 + 500
    (candidate,) = placer.weigh(placement.fields, 9.0).candidates
    assert candidate.queued_tokens == 225
    fleet.load_told(replica, ToldLoad(2, 0, 0, 2048, 1000), done_tokens=225)
    (candidate,) = placer.weigh(placement.fields, 9.0).candidates
    assert candidate.queued_tokens == 225 + 1000
    fleet.load_told(replica, ToldLoad(2, 0, 0, 2048, 200))  # ours is partly computed
    (candidate,) = placer.weigh(placement.fields, 9.0).candidates
    assert candidate.queued_tokens == 225
    fleet.answered(replica, ["m"], LoadReport(num_running=2, started_at=5.0))
    (candidate,) = placer.weigh(placement.fields, 9.0).candidates
    assert not candidate.tells_queue

    fleet.load_told(replica, ToldLoad(1, 0, 0, 2048, 0), num_ended=1)
    assert replica.num_others == 1  # ours is over there
    fleet.load_told(replica, ToldLoad(0, 0, 0, 2048, 0))
    assert replica.num_others == 0
    placer.finish(placement, 0.2)
    fleet.answered(replica, ["m"], LoadReport(num_running=MIN_OTHERS + 1))
    assert fleet.others_seen


def test_routers_that_share_nothing_agree():
    """The same prompts, in two routers that list the replicas in another order."""
    urls = [f"http://replica-{number}" for number in range(8)]
    one, other = make_placer(urls, 1), make_placer(urls[::-1], 2)
    for number in range(50):
        fields = RoutingFields("m", stream=True, prompt=b"document %d " % number * 900)
        places = []
        for placer in (one, other):
            placement = placer.place(fields, float(number))
            placer.first_byte(placement, number + 0.4, streamed=True)
            placer.finish(placement, number + 0.5)
            places.append(placement.replica.url)
        assert places[0] == places[1]


def test_what_others_computed_is_expected_there_once_it_was_found():
    placer = make_placer([f"http://replica-{number}" for number in range(4)], 1)

    def place(number: int, now: float):
        prompt = b"%d is a document " % number * 1000
        placement = placer.place(RoutingFields("m", stream=True, prompt=prompt), now)
        chosen = placement.candidates[placement.decision.chosen]
        placer.first_byte(placement, now + 0.1, streamed=True)
        placer.learn(placement, chosen.prompt_tokens, chosen.prompt_tokens * 9 // 10)
        placer.finish(placement, now + 0.2)
        return chosen

    before = place(0, 0.0)
    for number in range(1, 400):
        place(number, float(number))
    after = place(401, 401.0)

    assert before.hoped_tokens == pytest.approx(PRIOR_SHARE * before.prompt_tokens)
    assert after.hoped_tokens > 0.6 * after.prompt_tokens


def test_a_router_that_is_alone_expects_nothing_and_spreads():
    placer = make_placer([f"http://replica-{number}" for number in range(4)], 1, MIN_OTHERS)
    homes = []
    for number in range(4):
        fields = RoutingFields("m", stream=True, prompt=b"document %d " % number * 900)
        placement = placer.place(fields, 5.0 * number)
        assert not any(candidate.hoped_tokens for candidate in placement.candidates)
        placer.first_byte(placement, 5.0 * number + 0.5, streamed=True)
        placer.finish(placement, 5.0 * number + 1.0)
        homes.append(placement.replica.name)
    assert sorted(homes) == ["r0", "r1", "r2", "r3"]
