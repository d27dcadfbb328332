"""The ring of receipts: what it holds, what it forgets, and what it weighs."""

from __future__ import annotations

import tracemalloc
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.answer.phases import Answer
from roost_router.config import RouterConfig
from roost_router.explanation import Explanation, explain
from roost_router.fleet.fleet import Fleet
from roost_router.http.record import LostLeg, RequestRecord
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.receipts import MAX_BYTES, MAX_MODEL_CHARS, MAX_RECEIPTS, Receipts
from roost_wire.load_report import LoadReport

LIMITS = RouterConfig(replicas=("http://127.0.0.1:8101",))
CANARY = b"canary of a prompt "


def placements(number: int, num_replicas: int = 8) -> list[Placement]:
    """Conversations over a fleet that is busy: caches, queues and streams differ."""
    index = PrefixIndex()
    fleet = Fleet(index, [f"http://127.0.0.1:{8101 + n}" for n in range(num_replicas)])
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport(kv_capacity_tokens=1 << 20))
    placer, rng = Placer(index, fleet, CostPolicy, Random(1)), Random(2)
    found = []
    for now in range(number):
        prompt = CANARY * 50 + rng.randbytes(8) * rng.randrange(1, 8_000)
        found.append(placer.place(RoutingFields("m", stream=True, prompt=prompt), float(now)))
        if len(found) > 100:
            placer.first_byte(found[-50], now + 0.5, streamed=True)
            placer.finish(found[-100], now + 0.7)
    return found


PLACED = placements(300)


def record(number: int, *given: Placement | None, **changes: object) -> RequestRecord:
    """Of the placement given, else of one of PLACED."""
    (placement,) = given or (PLACED[number % len(PLACED)],)
    answer = Answer(b"{}", LIMITS, None, 0.0)
    answer.prompt_tokens, answer.cached_tokens = 70_000 + number, 70_000
    fields = {
        "request_id": b"req-%032x" % number,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "answer": answer,
        "placement": placement,
        "first": placement,
        "lost_legs": (),
        "outcome": "ok",
        "status": 200,
        "error_code": None,
        "started_at": placement.placed_at - 0.001 if placement else 0.0,
        "duration_s": 1.234567,
        "ttft_s": 0.1234567,
    }
    return RequestRecord(**{**fields, **changes})


def explained(receipts: Receipts, request_id: bytes) -> Explanation:
    packed = receipts.get(request_id)
    assert packed is not None
    return explain(request_id, packed, lambda moment: f"at {moment}")


def test_a_receipt_tells_all_that_the_policy_saw():
    receipts, placement = Receipts(), PLACED[200]
    receipts.add(record(1, placement))

    told = explained(receipts, b"req-%032x" % 1)

    assert (told.id, told.at) == (f"req-{1:032x}", f"at {placement.placed_at - 0.001}")
    assert (told.outcome, told.status, told.error) == ("ok", 200, None)
    assert (told.prompt_tokens, told.cached_tokens) == (70_001, 70_000)
    assert (told.ttft_s, told.duration_s) == (0.1234567, 1.234567)
    (attempt,) = told.attempts
    assert (attempt.replica, attempt.lost, attempt.then) == (placement.replica.name, None, None)
    assert attempt.at_s == pytest.approx(0.001)
    assert attempt.predicted_prefill_s == placement.prefilled_at - placement.placed_at
    seen = [
        (
            *(c.name, c.matched_tokens, c.uncached_tokens, c.queued_tokens, c.num_decoding),
            *(c.is_told, cost),
        )
        for c, cost in zip(placement.candidates, placement.decision.costs_s, strict=True)
    ]
    assert [msgspec.structs.astuple(row) for row in attempt.candidates] == seen
    assert len(seen) == 8


def test_the_runner_up_is_the_best_of_the_others():
    receipts = Receipts()
    for number, placement in enumerate(PLACED):
        receipts.add(record(number, placement))
        costs = dict(
            zip([c.name for c in placement.candidates], placement.decision.costs_s, strict=True)
        )

        (attempt,) = explained(receipts, b"req-%032x" % number).attempts

        chosen_s = costs.pop(attempt.replica)
        assert costs[attempt.runner_up.replica] == min(costs.values())
        assert attempt.runner_up.behind_s == min(costs.values()) - chosen_s


def test_a_single_candidate_has_no_runner_up():
    receipts = Receipts()
    receipts.add(record(1, placements(1, num_replicas=1)[0]))

    assert explained(receipts, b"req-%032x" % 1).attempts[0].runner_up is None


def test_lost_attempts_come_first_and_the_last_once():
    lost = LostLeg(PLACED[1], "stall", "retried")
    again = LostLeg(PLACED[2], "lost", "failed")
    receipts = Receipts()
    receipts.add(record(1, PLACED[2], lost_legs=(lost,)))
    receipts.add(record(2, PLACED[2], lost_legs=(lost, again)))

    told = [explained(receipts, b"req-%032x" % number).attempts for number in (1, 2)]

    first, second = [[(a.lost, a.then) for a in attempts] for attempts in told]
    assert first == [("stall", "retried"), (None, None)]
    assert second == [("stall", "retried"), ("lost", "failed")]


def test_a_request_that_found_no_replica_has_a_receipt_too():
    receipts = Receipts()
    receipts.add(record(1, None, outcome="server_error", status=503, error_code="no_replica"))

    told = explained(receipts, b"req-%032x" % 1)

    assert (told.attempts, told.status, told.error) == ([], 503, "no_replica")


def test_nothing_of_a_prompt_is_kept():
    receipts = Receipts()
    receipts.add(record(1, PLACED[0], model="x" * MAX_MODEL_CHARS + "canary"))

    packed = receipts.get(b"req-%032x" % 1)

    assert b"canary" not in packed
    assert explained(receipts, b"req-%032x" % 1).model == "x" * MAX_MODEL_CHARS


def test_the_oldest_leave():
    receipts = Receipts(max_receipts=3)
    for number in range(4):
        receipts.add(record(number))

    held = [receipts.get(b"req-%032x" % number) is not None for number in range(4)]

    assert held == [False, True, True, True]
    assert len(receipts) == 3


def test_of_equal_ids_the_last_is_found_until_it_leaves():
    receipts = Receipts(max_receipts=3)
    same = {"request_id": b"same"}
    receipts.add(record(0, **same, status=500))
    receipts.add(record(1, **same, status=200))
    for number in (2, 3):  # the first of the two leaves, and must not take the other along
        receipts.add(record(number))
    assert explained(receipts, b"same").status == 200

    receipts.add(record(4))

    assert receipts.get(b"same") is None
    assert len(receipts) == 3


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=60),
    st.integers(1, 8),
    st.integers(0, 6_000),
)
@settings(deadline=None)
def test_the_ring_is_the_longest_tail_within_its_bounds(added, max_receipts, max_bytes):
    """Against the slow twin: a list, cut from its front until it fits."""
    receipts, twin = Receipts(max_receipts, max_bytes), []
    for number, chars in added:
        one = record(0, request_id=b"id%d" % number, model="x" * chars)
        before = Receipts()
        before.add(one)
        receipts.add(one)
        twin.append((one.request_id, before.get(one.request_id), before.num_bytes))
        while len(twin) > max_receipts or sum(size for *_, size in twin) > max_bytes:
            del twin[0]

    assert len(receipts) == len(twin)
    assert receipts.num_bytes == sum(size for *_, size in twin)
    last = {request_id: packed for request_id, packed, _ in twin}
    for number in range(6):
        assert receipts.get(b"id%d" % number) == last.get(b"id%d" % number)


def test_a_full_ring_takes_at_most_64_mib():
    tracemalloc.start()
    try:
        receipts = Receipts()
        for number in range(MAX_RECEIPTS + 1_000):
            receipts.add(record(number))
        taken, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(receipts) == MAX_RECEIPTS
    assert taken <= receipts.num_bytes <= MAX_BYTES
    assert peak <= MAX_BYTES


def test_receipts_of_many_candidates_leave_by_their_bytes():
    placed = placements(20, num_replicas=64)
    bound = 4 << 20
    tracemalloc.start()
    try:
        receipts = Receipts(max_bytes=bound)
        for number in range(5_000):
            receipts.add(record(number, placed[number % len(placed)]))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert taken <= bound
    assert 0.9 * bound < receipts.num_bytes <= bound
    assert 1_000 < len(receipts) < 5_000
