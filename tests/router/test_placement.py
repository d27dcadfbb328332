"""The brain without I/O: every moment of a placement's life, with a clock of our own."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.errors import ModelNotFoundError, NoReplicaError
from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import TEXT_BLOCK_BYTES
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_router.policy.cost import CostPolicy
from roost_wire.load_report import LoadReport

BLOCKS = 20
PROMPT = bytes(range(256)) * BLOCKS  # 20 blocks, 1,280 tokens at 4 bytes a token


def make_placer(num_replicas: int = 2, capacity_tokens: int = 65536, seed: int = 0) -> Placer:
    index = PrefixIndex()
    fleet = Fleet(index, [f"http://127.0.0.1:{8101 + n}" for n in range(num_replicas)])
    for replica in fleet.replicas:
        fleet.answered(replica, ["m"], LoadReport(kv_capacity_tokens=capacity_tokens))
    return Placer(index, fleet, CostPolicy, Random(seed))


def ask(prompt: bytes) -> RoutingFields:
    return RoutingFields("m", stream=True, prompt=prompt)


def complete(placer: Placer, prompt: bytes, now: float, cached_tokens: int | None = None):
    """Place, answer and finish one request within a second."""
    placement = placer.place(ask(prompt), now)
    placer.first_byte(placement, now + 0.5, streamed=True)
    placer.learn(placement, len(prompt) // 4, cached_tokens)
    placer.finish(placement, now + 1.0, num_events=11)
    return placement


def other_prompt(number: int, blocks: int = BLOCKS) -> bytes:
    return (f"{number:08d}".encode() * 32) * blocks


def loads(placer: Placer) -> list[tuple[int, int, int]]:
    return [(r.queued_tokens, r.num_in_flight, r.num_decoding) for r in placer.fleet.replicas]


def test_load_is_counted_from_decision_to_end():
    placer = make_placer(1)
    placement = placer.place(ask(PROMPT), 0.0)
    assert loads(placer) == [(1280, 1, 0)]

    placer.first_byte(placement, 1.0, streamed=True)
    assert loads(placer) == [(0, 1, 1)]

    placer.finish(placement, 2.0, num_events=10)
    placer.finish(placement, 3.0)
    assert loads(placer) == [(0, 0, 0)]


def test_a_request_comes_home():
    placer = make_placer(8)
    home = complete(placer, PROMPT, 0.0).replica

    again = placer.place(ask(PROMPT + b"a question"), 10.0)

    assert home is again.replica
    assert again.matched_blocks == BLOCKS
    assert again.uncached_tokens < 10


def test_siblings_of_a_burst_see_each_other_before_anything_was_answered():
    placer = make_placer(4)
    first = placer.place(ask(PROMPT + b"one"), 0.0)

    second = placer.place(ask(PROMPT + b"two"), 0.0)
    third = placer.place(ask(PROMPT + b"three"), 0.0)

    assert second.matched_blocks == third.matched_blocks == BLOCKS
    assert first.replica is second.replica is third.replica


def test_unrelated_prompts_spread_though_every_count_is_zero():
    placer = make_placer(4)

    homes = Counter(complete(placer, other_prompt(n), 5.0 * n).replica.name for n in range(40))

    assert set(homes) == {"r0", "r1", "r2", "r3"}
    assert min(homes.values()) >= 4


def test_a_prompt_that_was_never_answered_is_not_believed_resident():
    placer = make_placer(1)
    first = placer.place(ask(PROMPT), 0.0)
    sibling = placer.place(ask(PROMPT[: 5 * TEXT_BLOCK_BYTES]), 0.0)

    placer.finish(first, 1.0)

    assert sibling.matched_blocks == 5
    depths = placer.index.lookup(first.chain, 1 << first.holder)
    assert {first.holder: 5} == depths  # what the sibling touched stays


def test_an_eviction_is_deduced_from_cached_tokens():
    """Least recently used first: with the old prompt, all that is older still is gone."""
    placer = make_placer(1)
    oldest = complete(placer, other_prompt(1), 0.0)
    complete(placer, PROMPT, 10.0)
    newest = complete(placer, other_prompt(2), 20.0)

    complete(placer, PROMPT, 30.0, cached_tokens=0)

    mask = 1 << oldest.holder
    assert placer.index.lookup(oldest.chain, mask) == {}
    assert {newest.holder: BLOCKS} == placer.index.lookup(newest.chain, mask)
    assert placer.place(ask(PROMPT), 40.0).matched_blocks == BLOCKS  # recomputed, so resident


def test_a_part_that_was_evicted_dates_the_rest():
    placer = make_placer(1)
    oldest = complete(placer, other_prompt(1), 0.0)
    complete(placer, PROMPT, 10.0)
    complete(placer, PROMPT[: 10 * TEXT_BLOCK_BYTES], 20.0)  # touches the head again
    between = complete(placer, other_prompt(2), 21.0)

    # Half is cached: the tail, last touched at 10, is gone; the head, touched at 20, is not.
    complete(placer, PROMPT, 30.0, cached_tokens=640)

    assert placer.index.lookup(oldest.chain, 1) == {}
    assert {between.holder: BLOCKS} == placer.index.lookup(between.chain, 1)


def test_a_sibling_still_in_prefill_is_late_not_evicted():
    placer = make_placer(1)
    old = complete(placer, other_prompt(1), 0.0)
    pending = placer.place(ask(PROMPT), 10.0)

    sibling = placer.place(ask(PROMPT), 10.0)
    placer.first_byte(sibling, 11.0, streamed=True)
    placer.learn(sibling, 1280, 0)

    assert {old.holder: BLOCKS} == placer.index.lookup(old.chain, 1)
    placer.finish(pending, 12.0)


@pytest.mark.parametrize("cached_tokens", [None, 1280, 1264, 1152, 5000])
def test_small_misses_and_silence_correct_nothing(cached_tokens):
    placer = make_placer(1)
    old = complete(placer, other_prompt(1), 0.0)
    complete(placer, PROMPT, 10.0)

    complete(placer, PROMPT, 20.0, cached_tokens=cached_tokens)

    assert {old.holder: BLOCKS} == placer.index.lookup(old.chain, 1)


def test_bytes_per_token_follow_the_traffic_and_capacities_follow_them():
    placer = make_placer(1, capacity_tokens=6400)
    before = placer.place(ask(PROMPT), 0.0)
    assert before.uncached_tokens == 1280

    for n in range(200):  # two bytes a token: twice as many tokens, half as many blocks
        placement = placer.place(ask(other_prompt(n)), float(n))
        placer.first_byte(placement, n + 0.1, streamed=True)
        placer.learn(placement, len(other_prompt(n)) // 2, None)
        placer.finish(placement, n + 0.2)

    assert placer.fleet.bytes_per_token("m") == pytest.approx(2.0, rel=0.02)
    assert placer.fleet.bytes_per_token("another model") == 4.0
    assert placer.index.num_blocks(placer.fleet.replicas[0].holder) == pytest.approx(50, abs=3)


@pytest.mark.parametrize("prompt_tokens", [-5, 0, 1, 3, 10**9, 10**308])
def test_counts_that_cannot_be_true_teach_nothing(prompt_tokens):
    placer = make_placer(1)
    placement = placer.place(ask(PROMPT), 0.0)

    placer.learn(placement, prompt_tokens, -7)

    assert placer.fleet.bytes_per_token("m") == 4.0
    assert placer.place(ask(PROMPT), 0.0).matched_blocks == BLOCKS


@pytest.mark.parametrize("cached_tokens", [-1, 1281, 10**12])
def test_cached_tokens_that_cannot_be_true_correct_nothing(cached_tokens):
    placer = make_placer(1)
    old = complete(placer, other_prompt(1), 0.0)
    complete(placer, PROMPT, 10.0)

    complete(placer, PROMPT, 20.0, cached_tokens=cached_tokens)

    assert {old.holder: BLOCKS} == placer.index.lookup(old.chain, 1)


def test_a_dense_prefix_before_a_sparse_tail_is_not_taken_for_an_eviction():
    """English at 4.5 bytes a token, fully cached, then a hex dump at 2: nothing was evicted."""
    placer = make_placer(1)
    old = complete(placer, other_prompt(1), 0.0)
    complete(placer, PROMPT, 10.0)
    dump = bytes(range(255, -1, -1)) * 20

    mixed = placer.place(ask(PROMPT + dump), 20.0)
    placer.first_byte(mixed, 21.0, streamed=True)
    placer.learn(mixed, round(5120 / 4.5 + 5120 / 2), round(5120 / 4.5))

    assert {old.holder: BLOCKS} == placer.index.lookup(old.chain, 1)


def test_a_prompt_that_is_refused_evicts_nothing():
    placer = make_placer(1, capacity_tokens=6400)  # 100 blocks
    resident = complete(placer, PROMPT, 0.0)

    giant = placer.place(ask(other_prompt(3, blocks=500)), 1.0)
    placer.finish(giant, 2.0)

    assert {resident.holder: BLOCKS} == placer.index.lookup(resident.chain, 1)
    assert placer.index.num_blocks(resident.holder) == BLOCKS


def test_whole_answers_leave_the_queue_when_their_prefill_must_be_over():
    placer = make_placer(1)
    whole = RoutingFields("m", stream=False, prompt=PROMPT)
    first = placer.place(whole, 0.0)
    assert [(1280, 1, 0)] == loads(placer)

    placer.place(whole, 100.0)
    assert placer.fleet.replicas[0].num_decoding == 1
    placer.finish(first, 101.0)

    assert placer.fleet.replicas[0].num_decoding == 0


def test_a_decision_explains_itself():
    placer = make_placer(2)
    complete(placer, PROMPT, 0.0)

    text = placer.place(ask(PROMPT), 10.0).explain()

    assert "*r" in text
    assert "matched 1279" in text
    assert "matched 0, uncached 1280" in text


def test_tried_replicas_come_last_as_long_as_they_are_up():
    placer = make_placer(2)
    first = placer.place(ask(PROMPT), 0.0)
    second = placer.place(ask(PROMPT), 0.0, frozenset({first.replica.name}))

    assert first.replica is not second.replica
    tried = frozenset({"r0", "r1"})
    placer.place(ask(PROMPT), 0.0, tried)  # a second attempt beats none
    for replica in placer.fleet.replicas:
        placer.fleet.refused(replica)
    with pytest.raises(NoReplicaError, match="2 tried"):
        placer.place(ask(PROMPT), 0.0, tried)


def test_unknown_models_and_empty_fleets_are_told_apart():
    placer = make_placer(1)
    with pytest.raises(ModelNotFoundError, match="served: m"):
        placer.place(RoutingFields("x", stream=False, prompt=b""), 0.0)
    placer.fleet.refused(placer.fleet.replicas[0])
    with pytest.raises(NoReplicaError):
        placer.place(ask(b""), 0.0)
    with pytest.raises(ModelNotFoundError):  # it told before it went what it serves
        placer.place(RoutingFields("x", stream=False, prompt=b""), 0.0)
    empty = PrefixIndex()
    fleet = Fleet(empty, ["http://a:1"])
    with pytest.raises(NoReplicaError):
        Placer(empty, fleet, CostPolicy, Random()).place(ask(b""), 0.0)


def test_a_refused_or_restarted_replica_starts_a_new_epoch():
    placer = make_placer(1)
    replica = placer.fleet.replicas[0]
    placement = complete(placer, PROMPT, 0.0)
    placer.fleet.refused(replica)
    assert not placer.fleet.is_ready
    placer.fleet.answered(replica, ["m"], LoadReport(started_at=1.0))
    assert placer.place(ask(PROMPT), 2.0).matched_blocks == 0

    placer.fleet.answered(replica, ["m"], LoadReport(started_at=1.0))
    assert placer.place(ask(PROMPT), 3.0).matched_blocks == BLOCKS
    placer.fleet.answered(replica, ["m"], LoadReport(started_at=2.0))
    assert placer.place(ask(PROMPT), 4.0).matched_blocks == 0
    placer.finish(placement, 5.0)


def test_what_an_old_epoch_learnt_does_not_touch_the_new_one():
    placer = make_placer(1)
    complete(placer, PROMPT, 0.0)
    old = placer.place(ask(PROMPT), 1.0)
    placer.fleet.refused(placer.fleet.replicas[0])
    placer.fleet.answered(placer.fleet.replicas[0], ["m"], LoadReport())
    new = complete(placer, PROMPT, 2.0)

    placer.learn(old, 1280, 0)
    placer.finish(old, 3.0)

    assert {new.holder: BLOCKS} == placer.index.lookup(new.chain, 1 << new.holder)


def test_a_page_that_lacks_a_figure_once_unmakes_nothing():
    placer = make_placer(1, capacity_tokens=6400)
    replica = placer.fleet.replicas[0]
    placer.fleet.answered(replica, ["m"], LoadReport(started_at=1.0, kv_capacity_tokens=6400))
    placement = complete(placer, PROMPT, 0.0)

    placer.fleet.answered(replica, ["m"], LoadReport())
    assert replica.kv_capacity_tokens == 6400
    assert placement.holder == replica.holder

    placer.fleet.answered(replica, ["m"], LoadReport(started_at=2.0))
    assert placement.holder != replica.holder


def test_a_replica_is_down_only_after_three_late_polls():
    placer = make_placer(1)
    replica = placer.fleet.replicas[0]
    for expected in (True, True, False):
        placer.fleet.poll_failed(replica)
        assert replica.is_up is expected
    placer.fleet.answered(replica, ["m"], LoadReport())
    assert replica.is_up
    assert repr(replica) == "<Replica r0 up | 0 in flight, 0 decoding, 0 tokens queued>"


def test_a_replica_without_history_is_taken_at_the_fleets_median_speed():
    placer = make_placer(3)
    for replica, speed in zip(placer.fleet.replicas, (100.0, 300.0), strict=False):
        for _ in range(50):
            for work in (100, 1000):
                replica.speed.observe_ttft(work, work / speed)

    fitted = [placer.fleet.prefill_tokens_per_s(r) for r in placer.fleet.replicas]

    assert fitted[2] == pytest.approx(sum(fitted[:2]) / 2)


actions = st.tuples(
    st.sampled_from(["place", "first_byte", "learn", "finish", "refuse", "answer"]),
    st.integers(0, 9),
    st.integers(0, 1500),
)


@settings(deadline=None)
@given(st.lists(actions, max_size=80))
def test_any_history_leaves_no_load_behind(history):
    placer, open_placements, now = make_placer(3), [], 0.0
    for action, number, tokens in history:
        now += 0.1
        replica = placer.fleet.replicas[number % 3]
        chosen = open_placements[number % len(open_placements)] if open_placements else None
        if action == "place":
            if placer.fleet.is_ready:
                prompt = other_prompt(number % 4, blocks=1 + number)
                open_placements.append(placer.place(ask(prompt), now))
        elif action == "refuse":
            placer.fleet.refused(replica)
        elif action == "answer":
            placer.fleet.answered(replica, ["m"], LoadReport(started_at=float(number // 5)))
        elif chosen is not None and action == "first_byte":
            placer.first_byte(chosen, now, streamed=bool(tokens % 2))
        elif chosen is not None and action == "learn":
            placer.learn(chosen, 1280, tokens)
        elif chosen is not None:
            placer.finish(chosen, now, num_events=tokens % 5)
            open_placements.remove(chosen)
    for placement in open_placements:
        placer.finish(placement, now)

    assert loads(placer) == [(0, 0, 0)] * 3
    assert all(not pending for pending in placer._pending.values())


def test_matched_tokens_follow_the_bytes_of_growing_blocks():
    placer = make_placer(1, capacity_tokens=1 << 20)
    prompt = bytes(range(256)) * 256  # 64 KB, 16,384 tokens
    complete(placer, prompt[: 40 << 10], 0.0)

    placement = placer.place(ask(prompt), 10.0)

    assert placement.matched_tokens == (40 << 10) / 4
    assert placement.uncached_tokens == (24 << 10) / 4


def test_a_finished_request_is_forgotten_though_its_prefill_was_to_last_longer():
    placer = make_placer(1)
    fields = RoutingFields("m", stream=False, prompt=PROMPT)

    placer.finish(placer.place(fields, 0.0), 0.001)

    assert placer._silent == {"r0": {}}
    assert loads(placer) == [(0, 0, 0)]


def test_a_cache_that_does_not_keep_what_it_is_given_is_trusted_less():
    """Missing each time, though younger than anything: no least recent use explains that."""
    placer = make_placer(2)
    replica = placer.place(ask(PROMPT), 0.0).replica
    for number in range(1, 200):
        placement = placer.place(ask(PROMPT), float(number))
        placer.learn(placement, 1280, 0)
        placer.finish(placement, number + 0.5)
        if placement.replica is not replica:
            break
        assert replica.kept.share < 1.0

    assert placement.replica is not replica
    chosen = placement.candidates[1 - placement.decision.chosen]
    assert chosen.hoped_tokens == pytest.approx(
        chosen.matched_tokens * (replica.kept.share - 1.0), abs=chosen.uncached_tokens
    )


def test_a_cache_that_keeps_all_is_trusted_whole_and_a_new_process_anew():
    placer = make_placer(1)
    for number in range(5):
        complete(placer, PROMPT, 10.0 * number, cached_tokens=1280 - 16)
    (replica,) = placer.fleet.replicas
    assert replica.kept.share > 0.99

    replica.kept.learn(1000, 0)
    placer.fleet.refused(replica)
    assert replica.kept.share == 1.0


def share_while_running(placer: Placer, rounds: int, cached_tokens: int) -> None:
    """Of a running request's prompt the next one finds so much; once it has ended, all."""
    for number in range(rounds):
        now, prompt = 10.0 * number, other_prompt(number)
        running = []
        for moment, cached in ((now, 0), (now + 0.6, cached_tokens)):
            placement = placer.place(ask(prompt), moment)
            placer.first_byte(placement, moment + 0.5, streamed=True)
            placer.learn(placement, 1280, cached)
            running.append(placement)
        for placement in running:
            placer.finish(placement, now + 2.0, num_events=11)
        complete(placer, prompt, now + 3.0, cached_tokens=1264)


def test_where_running_requests_do_not_share_their_prompts_one_waits_for_their_end():
    """llama.cpp: a prompt is cached in the slot that computed it, which is busy meanwhile."""
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    share_while_running(placer, 40, 0)

    assert replica.ended_holder is not None
    assert replica.kept.is_by_slot
    assert replica.kept.share > 0.9
    running = placer.place(ask(PROMPT), 1000.0)
    placer.first_byte(running, 1000.5, streamed=True)
    (candidate,) = placer.weigh(ask(PROMPT), 1001.0).candidates
    assert candidate.matched_tokens == 0
    placer.finish(running, 1002.0, num_events=11)
    (candidate,) = placer.weigh(ask(PROMPT), 1003.0).candidates
    assert candidate.matched_tokens == 1279


def test_llama_cpp_is_taken_to_keep_running_prompts_until_it_shows_else():
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    placer.fleet.answered(replica, ["m"], None, "llamacpp")
    assert replica.kept.is_by_slot
    share_while_running(placer, 20, 1264)
    assert not replica.kept.is_by_slot

    placer.fleet.refused(replica)
    placer.fleet.answered(replica, ["m"], None, "llamacpp")
    assert replica.kept.is_by_slot
    placer.fleet.refused(replica)
    placer.fleet.answered(replica, ["m"], None, "vllm")
    assert not replica.kept.is_by_slot


def test_a_server_that_shares_running_prompts_is_believed_to():
    """Misses come from a cache that is smaller than it says; those of running requests hit."""
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    replica.kept.learn(20_000, 0)
    complete(placer, PROMPT, 0.0)
    complete(placer, PROMPT, 10.0, cached_tokens=0)
    assert replica.ended_holder is not None
    share_while_running(placer, 20, 1264)
    assert not replica.kept.is_by_slot


def test_what_ended_is_forgotten_with_the_process_and_bounded_like_all_else():
    placer = make_placer(1, capacity_tokens=3000)
    (replica,) = placer.fleet.replicas
    replica.kept.learn(20_000, 0)
    complete(placer, PROMPT, 0.0)
    complete(placer, PROMPT, 10.0, cached_tokens=0)
    for number in range(9):
        complete(placer, other_prompt(number), 20.0 + number)
    holder = replica.ended_holder
    assert holder is not None
    assert 0 < placer.index.num_bytes(holder) <= placer.index.capacity_bytes(holder)
    assert placer.index.capacity_bytes(holder) == placer.index.capacity_bytes(replica.holder)

    placer.fleet.refused(replica)
    assert replica.ended_holder is None
    assert replica.kept.share == 1.0


def test_a_prompt_that_was_computed_against_belief_does_not_look_like_a_slow_replica():
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    for number in range(20):
        prompt, now = other_prompt(number), 10.0 * number
        for moment in (now, now + 2.0):  # the second is believed cached, and is not
            placement = placer.place(ask(prompt), moment)
            placer.first_byte(placement, moment + 1.28, streamed=True)  # 1,000 tokens/s
            placer.learn(placement, 1280, 0)
            placer.finish(placement, moment + 1.5, num_events=11)

    assert replica.speed.num_observed == 40
    assert replica.speed.prefill_tokens_per_s == pytest.approx(1000, rel=0.1)


def test_a_first_token_is_observed_once_with_or_without_usage():
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    complete(placer, PROMPT, 0.0)
    complete(placer, PROMPT, 10.0, cached_tokens=1264)
    told = placer.place(ask(PROMPT), 20.0)
    placer.first_byte(told, 20.1, streamed=True)
    assert replica.speed.num_observed == 2
    placer.finish(told, 21.0, num_events=3)  # it never said
    assert replica.speed.num_observed == 3
    lost = placer.place(ask(PROMPT), 30.0)
    placer.finish(lost, 31.0)
    assert replica.speed.num_observed == 3


def test_queues_drain_while_news_is_on_its_way_but_not_for_ever():
    placer = make_placer(1)
    (replica,) = placer.fleet.replicas
    placer.place(ask(PROMPT), 0.0)  # 1,280 tokens at 2,000 a second

    def queued(now: float) -> int:
        return placer.weigh(ask(b""), now).candidates[0].queued_tokens

    assert queued(0.5) == 1280  # fresh news: nothing was heard, so nothing is done
    replica.dialled(0.4)
    assert queued(0.5) == 280
    assert queued(0.7) == 0
    assert queued(0.64 + 2 * 0.4 + 0.01) == 1280  # overdue: something holds it up


@pytest.mark.parametrize(("took_s", "lag_s"), [(0.0099, 0.0), (0.01, 0.01), (0.3, 0.3)])
def test_news_is_late_by_the_least_that_dials_took(took_s, lag_s):
    (replica,) = make_placer(1).fleet.replicas
    replica.dialled(5.0)
    replica.dialled(took_s)
    assert replica.news_lag_s == lag_s

    replica.dialled(9.0)
    assert replica.news_lag_s == pytest.approx(1.05 * took_s if 1.05 * took_s >= 0.01 else 0.0)
