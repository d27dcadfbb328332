"""Scheduler: budget, order, chunking, preemption, sharing, aborts; tokens checked throughout.

Every run uses FakeModel, whose tokens depend on the whole context it finds in its cache, so
"the output is right" means that no block was lost, shared wrongly or overwritten.
"""

from __future__ import annotations

import pytest
from fake_model import continuation
from hand_engine import (
    VOCAB,
    HandEngine,
    Optimist,
    assert_right,
    names,
    outputs_of,
    prompt_of,
    sizes,
)

from roost_engine.admission import ExpectedOutput
from roost_engine.request import FinishReason, Request, RequestState, SamplingParams
from roost_engine.scheduler import PromptTooLong


def test_one_request_gets_its_tokens_and_gives_everything_back() -> None:
    engine = HandEngine()
    request = engine.add("a", prompt_of(10), max_tokens=5)

    engine.run()

    assert request.state is RequestState.FINISHED
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_output_tokens == 5
    assert [output.finish_reason for output in engine.outputs][-2:] == [None, "length"]
    assert_right(request)


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once_at_its_end() -> None:
    engine = HandEngine(max_step_tokens=8)
    request = engine.add("a", prompt_of(20), max_tokens=2)

    engine.run()

    assert [sizes(step) for step in engine.steps] == [[8], [8], [4], [1]]
    assert [len(step.sampling) for step in engine.steps] == [0, 0, 1, 1]
    assert_right(request)


def test_decodes_come_before_chunks_and_chunks_before_new_requests() -> None:
    engine = HandEngine(max_step_tokens=10)
    engine.add("a", prompt_of(4, 1), max_tokens=9)
    engine.step()
    engine.add("b", prompt_of(30, 2))
    engine.add("c", prompt_of(4, 3))
    engine.step()

    step = engine.schedule()

    assert names(step) == ["a", "b"]
    assert sizes(step) == [1, 9]


def test_requests_start_in_order_of_arrival_and_share_the_budget() -> None:
    engine = HandEngine(max_step_tokens=10)
    for index in range(4):
        engine.add(f"r{index}", prompt_of(4, index))

    step = engine.schedule()

    assert names(step) == ["r0", "r1", "r2"]
    assert sizes(step) == [4, 4, 2]


def test_no_more_than_max_running_hold_blocks() -> None:
    engine = HandEngine(max_running=2)
    requests = [engine.add(f"r{index}", prompt_of(4, index)) for index in range(5)]

    engine.run()

    assert max(len(step.scheduled) for step in engine.steps) == 2
    assert_right(*requests)


def test_a_request_that_does_not_fit_is_not_overtaken_by_a_smaller_one() -> None:
    engine = HandEngine(num_blocks=8)
    engine.add("running", prompt_of(16, 1), max_tokens=8)
    engine.step()
    engine.add("large", prompt_of(20, 2))
    engine.add("small", prompt_of(4, 3))

    assert names(engine.schedule()) == ["running"]
    assert engine.scheduler.num_waiting == 2


def test_end_of_sequence_stops_unless_it_is_ignored() -> None:
    prompt = prompt_of(6)
    eos = continuation(prompt, 3, VOCAB)[2]
    engine = HandEngine(eos=frozenset({eos}))
    stops = engine.add("stops", prompt, max_tokens=8)
    goes_on = engine.add("goes-on", prompt, max_tokens=8, ignore_eos=True)

    engine.run()

    assert stops.finish_reason is FinishReason.STOP
    assert eos in outputs_of(stops)[-1:]
    assert goes_on.finish_reason is FinishReason.LENGTH
    assert_right(stops, goes_on)


def test_end_of_sequence_at_max_tokens_counts_as_stop() -> None:
    prompt = prompt_of(6)
    eos = continuation(prompt, 1, VOCAB)[0]
    engine = HandEngine(eos=frozenset({eos}))
    request = engine.add("a", prompt, max_tokens=1)

    engine.run()

    assert request.finish_reason is FinishReason.STOP


# -- prefix cache -------------------------------------------------------------------------


def test_a_second_prompt_hits_what_the_first_left() -> None:
    engine = HandEngine()
    first = engine.add("a", prompt_of(10))
    engine.run()
    second = engine.add("b", [*prompt_of(10), 1, 2])
    engine.run()

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert engine.scheduler.counters.prefix_hits_tokens == 8
    assert engine.scheduler.counters.prefix_queries_tokens == 22
    assert engine.scheduler.counters.prefill_tokens == 10 + 4
    assert_right(first, second)


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    engine = HandEngine()
    engine.add("a", prompt_of(8))
    engine.run()
    again = engine.add("b", prompt_of(8))
    engine.run()

    assert again.num_cached_tokens == 4
    assert_right(again)


def test_generated_blocks_are_cached_for_the_next_turn() -> None:
    engine = HandEngine()
    first = engine.add("a", prompt_of(6), max_tokens=7)
    engine.run()
    turn = engine.add("b", [*first.token_ids, 3, 3])
    engine.run()

    assert turn.num_cached_tokens == 12
    assert_right(turn)


def test_siblings_wait_until_the_first_has_filled_the_prefix() -> None:
    engine = HandEngine(max_step_tokens=16)
    shared = prompt_of(24)
    first = engine.add("first", [*shared, 1, 1])
    second = engine.add("second", [*shared, 2, 2])
    other = engine.add("other", prompt_of(4, 9))
    engine.step()
    assert names(engine.schedule()) == ["first", "other"]
    engine.finish(engine.steps[-1])
    assert "second" in names(engine.schedule())
    engine.finish(engine.steps[-1])
    engine.run()

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 24)
    assert_right(first, second, other)


def test_a_sibling_goes_on_when_its_leader_is_aborted() -> None:
    engine = HandEngine(max_step_tokens=8)
    shared = prompt_of(24)
    engine.add("leader", [*shared, 1])
    follower = engine.add("follower", [*shared, 2])
    engine.step()
    engine.scheduler.abort("leader")

    engine.run()

    assert follower.num_cached_tokens == 8
    assert_right(follower)


def test_waiting_for_a_leader_lets_the_others_pass() -> None:
    engine = HandEngine(max_step_tokens=12, num_blocks=64)
    shared = prompt_of(100)
    engine.add("leader", shared)
    followers = [engine.add(f"f{index}", [*shared, index]) for index in range(3)]
    engine.step()
    others = [engine.add(f"o{index}", prompt_of(5, 50 + index)) for index in range(3)]
    engine.run()

    assert {follower.num_cached_tokens for follower in followers} == {100}
    assert_right(*followers, *others)


def test_a_follower_keeps_its_place_in_the_line() -> None:
    engine = HandEngine(max_step_tokens=12, max_running=2)
    shared = prompt_of(58)  # the last chunk leaves 2 tokens of budget to others
    engine.add("leader", shared)
    engine.add("follower", [*shared, 1])
    engine.add("passes", prompt_of(5, 1), max_tokens=40)
    engine.add("later", prompt_of(5, 2))

    engine.run()

    started = [name for step in engine.steps for name in names(step)]
    assert started.index("passes") < started.index("follower") < started.index("later")


def test_equal_prompts_in_one_step_end_up_in_the_same_blocks() -> None:
    engine = HandEngine(max_step_tokens=32)
    requests = [engine.add(f"r{index}", prompt_of(9), max_tokens=6) for index in range(4)]
    for _ in range(4):
        engine.step()

    tables = {tuple(request.block_table[:2]) for request in requests}

    assert len(tables) == 1
    engine.run()
    assert_right(*requests)


# -- memory -------------------------------------------------------------------------------


def test_the_newest_request_is_preempted_and_goes_on_with_the_same_tokens() -> None:
    engine = HandEngine(num_blocks=7, expected=Optimist())
    old = engine.add("old", prompt_of(8, 1), max_tokens=16)
    new = engine.add("new", prompt_of(8, 2), max_tokens=16)

    engine.run()

    assert engine.scheduler.counters.preemptions > 0
    assert (old.num_cached_tokens, new.num_cached_tokens) == (0, 0)
    finished = [output.request.id for output in engine.outputs if output.finish_reason]
    assert finished == ["old", "new"]
    assert_right(old, new)


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    engine = HandEngine(num_blocks=7, expected=Optimist())
    engine.add("old", prompt_of(8, 1), max_tokens=16)
    engine.add("new", prompt_of(8, 2), max_tokens=16)
    while not engine.scheduler.counters.preemptions:
        step = engine.schedule()
        engine.finish(step)

    assert names(step) == ["old"]


def test_a_preempted_request_is_first_in_line() -> None:
    engine = HandEngine(num_blocks=7, expected=Optimist())
    engine.add("old", prompt_of(8, 1), max_tokens=16)
    engine.add("new", prompt_of(8, 2), max_tokens=16)
    while not engine.scheduler.counters.preemptions:
        engine.step()
    engine.add("later", prompt_of(4, 3))
    num_before = len(engine.steps)

    engine.run()

    after = [name for step in engine.steps[num_before:] for name in names(step)]
    assert after.index("new") < after.index("later")


def test_what_can_never_fit_is_refused_up_front() -> None:
    engine = HandEngine(num_blocks=4, block_size=4)

    with pytest.raises(PromptTooLong) as refused:
        engine.add("a", prompt_of(13), max_tokens=4)

    assert refused.value.limit_tokens == 16
    engine.add("b", prompt_of(12), max_tokens=4)
    engine.run()


# -- aborts -------------------------------------------------------------------------------


def test_abort_while_waiting() -> None:
    engine = HandEngine(max_running=1)
    first, waiting = engine.add("a", prompt_of(4)), engine.add("b", prompt_of(4, 1))
    engine.step()

    assert engine.scheduler.abort("b") is waiting

    engine.run()
    assert waiting.finish_reason is FinishReason.ABORT
    assert_right(first)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_abort_while_prefilling_or_decoding(num_steps: int) -> None:
    engine = HandEngine(max_step_tokens=8)
    engine.add("a", prompt_of(20), max_tokens=10)
    for _ in range(num_steps):
        engine.step()

    engine.scheduler.abort("a")

    engine.scheduler.check()
    assert not engine.scheduler.has_work
    assert engine.pool.num_free == engine.pool.num_blocks


def test_abort_between_schedule_and_update_drops_the_token() -> None:
    engine = HandEngine()
    engine.add("a", prompt_of(6))
    stays = engine.add("b", prompt_of(6, 1))
    step = engine.schedule()
    engine.scheduler.abort("a")

    outputs = engine.finish(step)

    assert [output.request.id for output in outputs] == ["b"]
    engine.run()
    assert_right(stays)


def test_abort_of_somebody_unknown_or_finished_is_nothing() -> None:
    engine = HandEngine()
    engine.add("a", prompt_of(4), max_tokens=1)
    engine.run()

    assert engine.scheduler.abort("a") is None
    assert engine.scheduler.abort("never") is None


# -- logits that are no numbers -----------------------------------------------------------


def test_a_request_without_numbers_ends_alone() -> None:
    engine = HandEngine()
    bad, good = engine.add("bad", [1, 2, 3, 99]), engine.add("good", prompt_of(6))
    engine.model.spoils = {99}

    engine.run()

    assert bad.finish_reason is FinishReason.ERROR
    assert [output.token_id for output in engine.outputs if output.request is bad] == [None]
    assert good.finish_reason is FinishReason.LENGTH
    assert_right(good)


@pytest.mark.parametrize("max_step_tokens", [8, 64])
def test_nobody_inherits_what_spoiled_a_request(max_step_tokens: int) -> None:
    """Also not the chunks of its prompt that were cached before anybody saw the logits."""
    engine = HandEngine(max_step_tokens=max_step_tokens)
    prompt = [99, *prompt_of(20)]
    engine.model.spoils = {99}
    engine.add("bad", prompt)
    engine.run()
    engine.model.spoils = set()

    again = engine.add("again", prompt)
    engine.run()

    assert (again.finish_reason, again.num_cached_tokens) == (FinishReason.LENGTH, 0)
    assert_right(again)


def test_a_decode_without_numbers_keeps_what_came_before() -> None:
    prompt = prompt_of(10)
    engine = HandEngine()
    request = engine.add("a", prompt, max_tokens=8)
    engine.step()
    engine.step()
    engine.model.spoils = {request.token_ids[-1]}
    engine.run()

    assert request.finish_reason is FinishReason.ERROR
    assert_right(request)


# -- priorities and deadlines ---------------------------------------------------------------


def test_better_priority_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = HandEngine(max_running=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -5), ("e", 0)):
        engine.add(name, prompt_of(4, ord(name)), max_tokens=1, priority=priority)

    engine.run()

    assert [names(step) for step in engine.steps] == [["d"], ["b"], ["e"], ["a"], ["c"]]


def test_an_urgent_prompt_goes_before_a_prefill_under_way() -> None:
    engine = HandEngine(max_step_tokens=8)
    engine.add("patient", prompt_of(30, 1), priority=1)
    engine.step()
    engine.add("as patient", prompt_of(6, 2), priority=1)
    engine.add("urgent", prompt_of(10, 3), max_tokens=1)
    engine.run()

    assert [names(step) for step in engine.steps[:4]] == [
        ["patient"],
        ["urgent"],
        ["urgent", "patient"],
        ["patient"],
    ]
    assert list(sizes(engine.steps[2])) == [2, 6]


def test_the_worst_priority_is_preempted_though_it_came_first() -> None:
    engine = HandEngine(num_blocks=7, expected=Optimist())
    patient = engine.add("patient", prompt_of(8, 1), max_tokens=16, priority=1)
    urgent = engine.add("urgent", prompt_of(8, 2), max_tokens=16)

    engine.run()

    assert engine.scheduler.counters.preemptions > 0
    finished = [output.request.id for output in engine.outputs if output.finish_reason]
    assert finished == ["urgent", "patient"]
    assert_right(patient, urgent)


@pytest.mark.parametrize(("now", "expired"), [(4.9, []), (5.0, ["b"]), (9.0, ["b", "c"])])
def test_who_waits_past_its_deadline_is_dropped(now: float, expired: list[str]) -> None:
    engine = HandEngine(max_running=1)
    engine.add("a", prompt_of(4), max_tokens=9, deadline_s=1.0)
    engine.step()
    engine.add("c", prompt_of(4, 2), deadline_s=9.0)
    engine.add("b", prompt_of(4, 3), deadline_s=5.0)
    engine.add("d", prompt_of(4, 4))

    outputs = engine.scheduler.expire(now)

    engine.check()
    assert [output.request.id for output in outputs] == expired
    assert {output.finish_reason for output in outputs} <= {FinishReason.ABORT}
    assert [output.token_id for output in outputs] == [None] * len(expired)
    assert engine.scheduler.counters.expired == len(expired)
    assert engine.scheduler.expire(now) == []
    engine.run()


def test_a_preempted_request_that_has_begun_to_answer_outlives_its_deadline() -> None:
    engine = HandEngine(num_blocks=7, expected=Optimist())
    engine.add("old", prompt_of(8, 1), max_tokens=16)
    new = engine.add("new", prompt_of(8, 2), max_tokens=16, deadline_s=5.0)
    while not engine.scheduler.counters.preemptions:
        engine.step()
    assert new.state is RequestState.WAITING

    assert engine.scheduler.expire(6.0) == []

    engine.run()
    assert_right(new)


def test_who_was_aborted_does_not_expire_as_well() -> None:
    engine = HandEngine(max_running=1)
    engine.add("a", prompt_of(4))
    engine.step()
    engine.add("b", prompt_of(4, 1), deadline_s=5.0)
    engine.scheduler.abort("b")

    assert engine.scheduler.expire(6.0) == []


# -- answers that began on another replica ---------------------------------------------------


@pytest.mark.parametrize("num_given", [0, 1, 3, 4, 5, 11])
def test_a_continued_answer_ends_where_it_would_have(num_given: int) -> None:
    engine = HandEngine(max_step_tokens=8)
    given = continuation(prompt_of(10), num_given, VOCAB)

    request = engine.add("a", prompt_of(10), max_tokens=12, output=given)
    engine.run()

    assert_right(request)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (10, 12)
    assert request.finish_reason is FinishReason.LENGTH
    assert len(engine.outputs) == 12 - num_given
    assert engine.scheduler.counters.generation_tokens == 12 - num_given


def test_a_continued_answer_hits_its_own_tokens_but_tells_of_the_prompts() -> None:
    engine = HandEngine()
    engine.add("a", prompt_of(10), max_tokens=12)
    engine.run()

    output = continuation(prompt_of(10), 9, VOCAB)
    request = engine.add("b", prompt_of(10), max_tokens=12, output=output)
    engine.step()

    assert sizes(engine.steps[-1]) == [3]  # 16 of 19 were cached
    assert request.num_cached_tokens == 10
    assert engine.scheduler.counters.prefix_hits_tokens == 10
    engine.run()
    assert_right(request)


def test_a_continued_answer_that_has_to_wait_has_a_deadline_too() -> None:
    engine = HandEngine(max_running=1)
    engine.add("a", prompt_of(4), max_tokens=9)
    engine.step()
    engine.add("b", prompt_of(4, 3), output=[1, 2], deadline_s=5.0)

    assert [output.request.id for output in engine.scheduler.expire(5.0)] == ["b"]


def test_tokens_that_are_owed_come_whatever_is_sampled() -> None:
    sampling = SamplingParams(max_tokens=9)
    request = Request("a", [1], sampling, 0.0, output_ids=[2, 3, 4], num_owed=2)

    assert request.token_ids == [1, 2]
    for settled in (3, 4, 40):
        request.token_ids.append(request.settle(40))
        assert request.token_ids[-1] == settled
    assert request.num_output_tokens == 4


# -- looking ahead ----------------------------------------------------------------------------


def test_admission_waits_until_the_peak_ahead_fits() -> None:
    """8 + 17 tokens end with 6 blocks: together at once 12, the second five steps later 11."""
    engine = HandEngine(num_blocks=11, expected=ExpectedOutput(1, 1))
    requests = [engine.add(f"r{index}", prompt_of(8, index), max_tokens=17) for index in range(2)]
    engine.run()

    started = [names(step) for step in engine.steps].index(["r0", "r1"])
    assert 1 <= started <= 8
    assert engine.scheduler.counters.preemptions == 0
    assert_right(*requests)


@pytest.mark.parametrize(("num_blocks", "at_once"), [(12, True), (11, True), (10, False)])
def test_a_shared_prefix_is_counted_once(num_blocks: int, at_once: bool) -> None:
    """Each ends with 13 + 15 tokens in 7 blocks, of which 3 are shared: 3 + 4 + 4."""
    engine = HandEngine(num_blocks, expected=ExpectedOutput(1, 1))
    shared = prompt_of(12, 1)
    engine.add("r0", [*shared, 0], max_tokens=16)
    engine.step()
    second = engine.add("r1", [*shared, 1], max_tokens=15)

    assert ("r1" in names(engine.schedule())) == at_once
    engine.finish(engine.steps[-1])
    engine.run()
    assert engine.scheduler.counters.preemptions == 0
    assert_right(second)


# -- host tier --------------------------------------------------------------------------------


def test_what_was_evicted_to_the_host_is_restored_instead_of_computed() -> None:
    engine = HandEngine(num_blocks=8, num_host_blocks=8)
    first = engine.add("first", prompt_of(20, 1))
    engine.run()
    engine.add("other", prompt_of(24, 2))
    engine.run()
    assert engine.pool.num_host_used > 0

    again = engine.add("again", [*prompt_of(20, 1), 3])
    engine.run()

    assert again.num_cached_tokens == 20
    assert engine.scheduler.counters.restored_tokens > 0
    assert_right(first, again)


def test_a_preempted_request_finds_its_blocks_on_the_host() -> None:
    engine = HandEngine(num_blocks=7, num_host_blocks=7, expected=Optimist())
    requests = [engine.add(f"r{index}", prompt_of(8, index), max_tokens=16) for index in range(2)]
    engine.run()

    assert engine.scheduler.counters.preemptions > 0
    assert engine.scheduler.counters.restored_tokens > 0
    assert_right(*requests)
