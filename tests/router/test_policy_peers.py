"""The peers' policies, each as a table of hand-computed decisions, edges included."""

from __future__ import annotations

from collections import Counter
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.policy.chwbl import BoundedHashing
from roost_router.policy.dynamo import DynamoCost
from roost_router.policy.hash_ring import HashRing
from roost_router.policy.interface import Candidate
from roost_router.policy.llm_d import WeightedScorers
from roost_router.policy.registry import POLICY_NAMES, make_policy
from roost_router.policy.round_robin import RoundRobin
from roost_router.policy.smg import Spill, is_spilled

PROMPT_TOKENS = 1000


def fleet(**columns: list[float]) -> list[Candidate]:
    """One candidate for each place of the columns; `matched` is completed to the prompt."""
    num = len(next(iter(columns.values())))
    matched = columns.pop("matched", [0] * num)
    fields = {
        "queued_tokens": [0] * num,
        "num_decoding": [0] * num,
        "prefill_tokens_per_s": [1000.0] * num,
        "decode_s": [0.01] * num,
        "recent_uncached_tokens": [0.0] * num,
        **columns,
    }
    return [
        Candidate(
            f"r{place}",
            matched_tokens=matched[place],
            uncached_tokens=PROMPT_TOKENS - matched[place],
            **{name: column[place] for name, column in fields.items()},
        )
        for place in range(num)
    ]


def picked(name: str, candidates: list[Candidate]) -> set[int]:
    """Everything that a fresh policy of that name picks, over many seeds."""
    return {make_policy(name).pick(candidates, Random(seed)).chosen for seed in range(60)}


TABLE = [
    # Least outstanding: the fewest in flight, ties at random, caches ignored.
    ("least-outstanding", {"num_in_flight": [3, 1, 2]}, {1}),
    ("least-outstanding", {"num_in_flight": [1, 1, 2], "matched": [0, 0, 900]}, {0, 1}),
    # Two choices: never the busiest of all, unless there is no other.
    ("power-of-two", {"num_in_flight": [3, 1, 2]}, {1, 2}),
    ("power-of-two", {"num_in_flight": [3, 1]}, {1}),
    ("power-of-two", {"num_in_flight": [1, 1]}, {0, 1}),
    # production-stack: the deepest match whatever the load; nothing matched: all.
    ("production-stack-prefix", {"matched": [0, 10, 20], "num_in_flight": [0, 0, 99]}, {2}),
    ("production-stack-prefix", {"matched": [20, 10, 20]}, {0, 2}),
    ("production-stack-prefix", {"matched": [0, 0, 0]}, {0, 1, 2}),
    # SGLang: a match must exceed 30 % of the prompt.
    ("sglang", {"matched": [0, 300], "num_in_flight": [0, 1]}, {0}),
    ("sglang", {"matched": [0, 301], "num_in_flight": [0, 1]}, {1}),
    ("sglang", {"matched": [0, 0, 0], "num_in_flight": [1, 0, 0]}, {1}),  # ties: the first
    ("sglang", {"matched": [500, 500]}, {0}),
    # ... and is ignored when the loads differ by more than 64 and by more than half.
    ("sglang", {"matched": [0, 900], "num_in_flight": [0, 64]}, {1}),
    ("sglang", {"matched": [0, 900], "num_in_flight": [0, 65]}, {0}),
    ("sglang", {"matched": [0, 900], "num_in_flight": [130, 195]}, {1}),  # 195 = 1.5 * 130
    ("sglang", {"matched": [0, 900], "num_in_flight": [130, 196]}, {0}),
    # SMG: the mean is 4 (margin 4, so 8 is the most): 8 keeps the prefix, 12 of 16 does not.
    ("smg", {"matched": [0, 900], "num_in_flight": [0, 8]}, {1}),
    ("smg", {"matched": [0, 900, 0, 0], "num_in_flight": [1, 12, 1, 2]}, {0, 2, 3}),
    ("smg", {"matched": [900, 900], "queued_tokens": [10, 0]}, {1}),
    ("smg", {"matched": [900, 900], "num_decoding": [0, 1]}, {0}),
    ("smg", {"matched": [900, 900], "kv_usage": [0.5, 0.4]}, {1}),
    ("smg", {"matched": [900, 900], "kv_usage": [1.0, 1.5]}, {0, 1}),  # both at most 0.999
    ("smg", {"matched": [0, 0], "queued_tokens": [0, 0]}, {0, 1}),
    # Dynamo: 100 blocks of 16 in use weigh as much as 1,600 tokens to compute.
    ("dynamo", {"matched": [0, 800]}, {1}),
    ("dynamo", {"matched": [0, 800], "queued_tokens": [0, 801]}, {0}),
    ("dynamo", {"matched": [0, 800], "queued_tokens": [0, 800]}, {0, 1}),
    (
        "dynamo",
        {"matched": [0, 800], "kv_usage": [0.0, 0.5], "kv_capacity_tokens": [1600, 1602]},
        {0},
    ),
    # llm-d: 3 * prefix against 2 * queue; one waiting request decides as much as a hundred.
    ("llm-d", {"matched": [0, 660], "num_in_flight": [0, 1]}, {0}),
    ("llm-d", {"matched": [0, 670], "num_in_flight": [0, 1]}, {1}),
    ("llm-d", {"matched": [0, 670], "num_in_flight": [0, 100]}, {1}),
    ("llm-d", {"matched": [0, 10], "num_in_flight": [5, 5]}, {1}),
    ("llm-d", {"matched": [0, 0], "num_in_flight": [0, 9], "num_decoding": [0, 9]}, {0, 1}),
    # Streams of other routers are running, not waiting, and no reason to go there.
    (
        "llm-d",
        {"matched": [0, 0], "num_in_flight": [1, 1], "num_decoding": [0, 9], "num_others": [0, 9]},
        {0, 1},
    ),
    ("llm-d", {"matched": [0, 500], "kv_usage": [0.0, 0.76]}, {0}),
    ("llm-d", {"matched": [0, 500], "kv_usage": [0.0, 0.74]}, {1}),
    # AIBrix: loads 0 and 2 have mean 1 and deviation 1: 2 is just not too busy.
    ("aibrix", {"matched": [0, 100], "num_in_flight": [0, 2]}, {1}),
    ("aibrix", {"matched": [0, 100, 0], "num_in_flight": [0, 3, 0]}, {0, 2}),
    ("aibrix", {"matched": [100, 200, 0], "num_in_flight": [0, 3, 0]}, {0}),
    ("aibrix", {"matched": [100, 100], "num_in_flight": [1, 0]}, {1}),
    ("aibrix", {"matched": [100, 0, 0], "num_in_flight": [2, 0, 10], "num_decoding": [0] * 3}, {1}),
    ("aibrix", {"matched": [100, 0, 0], "num_in_flight": [2, 0, 8]}, {0}),
    ("aibrix", {"matched": [0, 0], "num_in_flight": [0, 0]}, {0, 1}),
]


@pytest.mark.parametrize(("name", "columns", "expected"), TABLE)
def test_the_formula_decides(name, columns, expected):
    columns = {name: list(column) for name, column in columns.items()}

    assert expected == picked(name, fleet(**columns))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_one_candidate_is_picked_whatever_it_has_to_do(name):
    alone = fleet(num_in_flight=[900], queued_tokens=[10**6], kv_usage=[1.0])

    decision = make_policy(name).pick(alone, Random(1))

    assert decision.chosen == 0
    assert len(decision.costs_s) == 1


def test_round_robin_takes_turns_and_survives_a_fleet_that_shrinks():
    policy, three = RoundRobin(), fleet(num_in_flight=[9, 0, 0])

    assert [0, 1, 2, 0] == [policy.pick(three, Random()).chosen for _ in range(4)]
    assert [0, 1] == [policy.pick(three[:2], Random()).chosen for _ in range(2)]
    assert [0.0, 1.0, 2.0] == policy.pick(three, Random()).costs_s


@pytest.mark.parametrize(
    ("load", "mean", "spilled"),
    [
        (4, 0.0, False),  # at least four above the mean
        (5, 0.0, True),
        (13, 9.0, False),  # two deviations of 9 are 6
        (15, 9.0, False),
        (16, 9.0, True),
        (1032, 1000.0, False),  # at most 32 above
        (1033, 1000.0, False),  # but a tenth at least
        (1100, 1000.0, False),
        (1101, 1000.0, True),
    ],
)
def test_smg_spills_beyond_two_deviations(load, mean, spilled):
    assert spilled == is_spilled(load, mean)


def test_costs_are_the_formulas_in_their_units():
    loaded = fleet(
        matched=[0, 500],
        queued_tokens=[2000, 0],
        num_decoding=[0, 1],
        num_in_flight=[2, 1],
        kv_usage=[0.5, 0.25],
        kv_capacity_tokens=[1600, 1600],
    )

    # (2000 + 1000 + 800) / 16 and (500 + 400) / 16 blocks
    assert [237.5, 56.25] == DynamoCost().pick(loaded, Random()).costs_s
    # waiting 2 and 0: 0 + 1 + 0 and 2 + 1.5 + 1.5
    assert [-1.0, -5.0] == WeightedScorers().pick(loaded, Random()).costs_s
    # equal queues: 2 + 2 + 0
    assert [-4.0] == WeightedScorers().pick(fleet(num_in_flight=[5]), Random()).costs_s
    # among the longest match only: 1024 / 2000 + 0.15 / 3
    assert [inf, pytest.approx(0.562)] == Spill().pick(loaded, Random()).costs_s


def keyed(key: int, in_flight: list[int]) -> list[Candidate]:
    return fleet(num_in_flight=in_flight, prompt_key=[key] * len(in_flight))


KEYS = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(400)]


@pytest.mark.parametrize("name", ["chwbl", "production-stack-session"])
def test_a_key_has_one_home_and_keys_spread(name):
    policy = make_policy(name)
    homes = [policy.pick(keyed(key, [0] * 4), Random()).chosen for key in KEYS]
    again = [make_policy(name).pick(keyed(key, [0] * 4), Random()).chosen for key in KEYS]

    assert homes == again
    assert min(Counter(homes).values()) > 60


def test_a_session_stays_however_busy_its_home_is():
    policy = make_policy("production-stack-session")
    home = policy.pick(keyed(7, [0, 0, 0]), Random()).chosen

    busy = [0, 0, 0]
    busy[home] = 1000

    assert home == policy.pick(keyed(7, busy), Random()).chosen


def test_bounded_hashing_moves_on_beyond_its_bound_and_comes_back():
    policy = BoundedHashing()
    home = policy.pick(keyed(7, [0, 0]), Random()).chosen

    def chosen(at_home: int, elsewhere: int) -> int:
        loads = [elsewhere, elsewhere]
        loads[home] = at_home
        return policy.pick(keyed(7, loads), Random()).chosen

    # The bound is 1.25 * (total + 1) / 2: 5 are no more than 5, but 6 are more than 5.625.
    assert home == chosen(4, 3)
    assert home != chosen(5, 3)
    assert home == chosen(0, 0)
    assert home == chosen(1, 1)  # 2 exceed 1.875 on both: the owner takes it


def test_only_keys_of_a_name_that_left_move():
    ring = HashRing()
    names = ["a", "b", "c", "d"]
    before = {key: ring.order(names, key) for key in KEYS}

    after = {key: ring.order(["a", "b", "d"], key)[0] for key in KEYS}

    for key, order in before.items():
        assert sorted(order) == names
        assert after[key] == (order[0] if order[0] != "c" else order[1])
    assert any(order[0] == "c" for order in before.values())


columns = st.integers(1, 6).flatmap(
    lambda num: st.fixed_dictionaries(
        {
            "matched": st.lists(st.integers(0, PROMPT_TOKENS - 1), min_size=num, max_size=num),
            "queued_tokens": st.lists(st.integers(0, 5000), min_size=num, max_size=num),
            "num_in_flight": st.lists(st.integers(0, 200), min_size=num, max_size=num),
            "num_decoding": st.lists(st.integers(0, 30), min_size=num, max_size=num),
            "kv_usage": st.lists(st.floats(0, 1), min_size=num, max_size=num),
            "kv_capacity_tokens": st.lists(st.integers(0, 10**6), min_size=num, max_size=num),
        }
    )
)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(columns=columns, key=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**32))
def test_a_pick_is_a_function_of_its_arguments_and_has_the_least_cost(name, columns, key, seed):
    candidates = fleet(prompt_key=[key] * len(columns["matched"]), **columns)

    first = make_policy(name).pick(candidates, Random(seed))
    second = make_policy(name).pick(candidates, Random(seed))

    assert (first.chosen, first.costs_s) == (second.chosen, second.costs_s)
    assert len(first.costs_s) == len(candidates)
    assert first.costs_s[first.chosen] <= min(first.costs_s) + 0.001
