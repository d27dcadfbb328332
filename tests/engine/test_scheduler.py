"""Scheduler: budget, order, chunking, preemption, sharing, aborts; tokens checked throughout.

Every run uses FakeModel, whose tokens depend on the whole context it finds in its cache, so
"the output is right" means that no block was lost, shared wrongly or overwritten.
"""

from __future__ import annotations

import random

import pytest
from fake_model import FakeModel, continuation
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.request import FinishReason, Request, RequestState, SamplingParams
from roost_engine.scheduler import Output, PromptTooLong, Scheduler, Step

VOCAB = 50
NO_EOS: frozenset[int] = frozenset()


class Engine:
    """Scheduler, pool and fake model, stepped by hand, with every invariant checked."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_step_tokens: int = 32,
        max_running: int = 8,
        eos: frozenset[int] = NO_EOS,
    ) -> None:
        config = SchedulerConfig(
            max_step_tokens=max_step_tokens, max_running=max_running, max_model_len=256
        )
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(config, self.pool, eos)
        self.model = FakeModel(block_size, VOCAB)
        self.steps: list[Step] = []
        self.outputs: list[Output] = []

    def add(
        self, name: str, prompt: list[int], max_tokens: int = 4, *, ignore_eos: bool = False
    ) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        request = Request(name, prompt, sampling, arrival_s=0.0)
        self.scheduler.add(request)
        return request

    def schedule(self) -> Step:
        step = self.scheduler.schedule()
        self.scheduler.check()
        config = self.scheduler.config
        assert step.num_tokens <= config.max_step_tokens
        assert len({entry.request.id for entry in step.scheduled}) == len(step.scheduled)
        self._check_writes(step)
        self.steps.append(step)
        return step

    def finish(self, step: Step) -> list[Output]:
        outputs = self.scheduler.update(step, self.model.next_tokens(step.chunks))
        self.scheduler.check()
        self.outputs += outputs
        return outputs

    def step(self) -> list[Output]:
        return self.finish(self.schedule())

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            assert self.schedule().scheduled, "work is left, but nothing is computed"
            self.finish(self.steps[-1])
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks

    def _check_writes(self, step: Step) -> None:
        """No chunk writes to a block that somebody else holds or that a lookup can find."""
        holders: dict[int, int] = {}
        for request in self.scheduler._running:
            for block in request.block_table:
                holders[block] = holders.get(block, 0) + 1
        for entry in step.scheduled:
            chunk, size = entry.chunk, self.pool.block_size
            end = chunk.start + len(chunk.token_ids)
            assert len(chunk.block_table) * size >= end
            for index in range(chunk.start // size, -(-end // size)):
                assert holders[chunk.block_table[index]] == 1
                assert self.pool._blocks[chunk.block_table[index]].hash is None


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def assert_right(*requests: Request) -> None:
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens]
        expected = continuation(prompt, request.sampling.max_tokens, VOCAB)
        assert expected[: request.num_output_tokens] == outputs_of(request)


def outputs_of(request: Request) -> list[int]:
    return request.token_ids[request.num_prompt_tokens :]


def names(step: Step) -> list[str]:
    return [entry.request.id for entry in step.scheduled]


def sizes(step: Step) -> list[int]:
    return [len(entry.chunk.token_ids) for entry in step.scheduled]


def test_one_request_gets_its_tokens_and_gives_everything_back() -> None:
    engine = Engine()
    request = engine.add("a", prompt_of(10), max_tokens=5)

    engine.run()

    assert request.state is RequestState.FINISHED
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_output_tokens == 5
    assert [output.finish_reason for output in engine.outputs][-2:] == [None, "length"]
    assert_right(request)


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once_at_its_end() -> None:
    engine = Engine(max_step_tokens=8)
    request = engine.add("a", prompt_of(20), max_tokens=2)

    engine.run()

    assert [sizes(step) for step in engine.steps] == [[8], [8], [4], [1]]
    assert [len(step.sampling) for step in engine.steps] == [0, 0, 1, 1]
    assert_right(request)


def test_decodes_come_before_chunks_and_chunks_before_new_requests() -> None:
    engine = Engine(max_step_tokens=10)
    engine.add("a", prompt_of(4, 1), max_tokens=9)
    engine.step()
    engine.add("b", prompt_of(30, 2))
    engine.add("c", prompt_of(4, 3))
    engine.step()

    step = engine.schedule()

    assert names(step) == ["a", "b"]
    assert sizes(step) == [1, 9]


def test_requests_start_in_order_of_arrival_and_share_the_budget() -> None:
    engine = Engine(max_step_tokens=10)
    for index in range(4):
        engine.add(f"r{index}", prompt_of(4, index))

    step = engine.schedule()

    assert names(step) == ["r0", "r1", "r2"]
    assert sizes(step) == [4, 4, 2]


def test_no_more_than_max_running_hold_blocks() -> None:
    engine = Engine(max_running=2)
    requests = [engine.add(f"r{index}", prompt_of(4, index)) for index in range(5)]

    engine.run()

    assert max(len(step.scheduled) for step in engine.steps) == 2
    assert_right(*requests)


def test_a_request_that_does_not_fit_is_not_overtaken_by_a_smaller_one() -> None:
    engine = Engine(num_blocks=8)
    engine.add("running", prompt_of(16, 1), max_tokens=8)
    engine.step()
    engine.add("large", prompt_of(20, 2))
    engine.add("small", prompt_of(4, 3))

    assert names(engine.schedule()) == ["running"]
    assert engine.scheduler.num_waiting == 2


def test_end_of_sequence_stops_unless_it_is_ignored() -> None:
    prompt = prompt_of(6)
    eos = continuation(prompt, 3, VOCAB)[2]
    engine = Engine(eos=frozenset({eos}))
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
    engine = Engine(eos=frozenset({eos}))
    request = engine.add("a", prompt, max_tokens=1)

    engine.run()

    assert request.finish_reason is FinishReason.STOP


# -- prefix cache -------------------------------------------------------------------------


def test_a_second_prompt_hits_what_the_first_left() -> None:
    engine = Engine()
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
    engine = Engine()
    engine.add("a", prompt_of(8))
    engine.run()
    again = engine.add("b", prompt_of(8))
    engine.run()

    assert again.num_cached_tokens == 4
    assert_right(again)


def test_generated_blocks_are_cached_for_the_next_turn() -> None:
    engine = Engine()
    first = engine.add("a", prompt_of(6), max_tokens=7)
    engine.run()
    turn = engine.add("b", [*first.token_ids, 3, 3])
    engine.run()

    assert turn.num_cached_tokens == 12
    assert_right(turn)


def test_siblings_wait_until_the_first_has_filled_the_prefix() -> None:
    engine = Engine(max_step_tokens=16)
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
    engine = Engine(max_step_tokens=8)
    shared = prompt_of(24)
    engine.add("leader", [*shared, 1])
    follower = engine.add("follower", [*shared, 2])
    engine.step()
    engine.scheduler.abort("leader")

    engine.run()

    assert follower.num_cached_tokens == 8
    assert_right(follower)


def test_waiting_for_a_leader_lets_the_others_pass() -> None:
    engine = Engine(max_step_tokens=12, num_blocks=64)
    shared = prompt_of(100)
    engine.add("leader", shared)
    followers = [engine.add(f"f{index}", [*shared, index]) for index in range(3)]
    engine.step()
    others = [engine.add(f"o{index}", prompt_of(5, 50 + index)) for index in range(3)]
    engine.run()

    assert {follower.num_cached_tokens for follower in followers} == {100}
    assert_right(*followers, *others)


def test_a_follower_keeps_its_place_in_the_line() -> None:
    engine = Engine(max_step_tokens=12, max_running=2)
    shared = prompt_of(58)  # the last chunk leaves 2 tokens of budget to others
    engine.add("leader", shared)
    engine.add("follower", [*shared, 1])
    engine.add("passes", prompt_of(5, 1), max_tokens=40)
    engine.add("later", prompt_of(5, 2))

    engine.run()

    started = [name for step in engine.steps for name in names(step)]
    assert started.index("passes") < started.index("follower") < started.index("later")


def test_equal_prompts_in_one_step_end_up_in_the_same_blocks() -> None:
    engine = Engine(max_step_tokens=32)
    requests = [engine.add(f"r{index}", prompt_of(9), max_tokens=6) for index in range(4)]
    for _ in range(4):
        engine.step()

    tables = {tuple(request.block_table[:2]) for request in requests}

    assert len(tables) == 1
    engine.run()
    assert_right(*requests)


# -- memory -------------------------------------------------------------------------------


def test_the_newest_request_is_preempted_and_goes_on_with_the_same_tokens() -> None:
    engine = Engine(num_blocks=7)
    old = engine.add("old", prompt_of(8, 1), max_tokens=16)
    new = engine.add("new", prompt_of(8, 2), max_tokens=16)

    engine.run()

    assert engine.scheduler.counters.preemptions > 0
    assert (old.num_cached_tokens, new.num_cached_tokens) == (0, 0)
    finished = [output.request.id for output in engine.outputs if output.finish_reason]
    assert finished == ["old", "new"]
    assert_right(old, new)


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    engine = Engine(num_blocks=7)
    engine.add("old", prompt_of(8, 1), max_tokens=16)
    engine.add("new", prompt_of(8, 2), max_tokens=16)
    while not engine.scheduler.counters.preemptions:
        step = engine.schedule()
        engine.finish(step)

    assert names(step) == ["old"]


def test_a_preempted_request_is_first_in_line() -> None:
    engine = Engine(num_blocks=7)
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
    engine = Engine(num_blocks=4, block_size=4)

    with pytest.raises(PromptTooLong) as refused:
        engine.add("a", prompt_of(13), max_tokens=4)

    assert refused.value.limit_tokens == 16
    engine.add("b", prompt_of(12), max_tokens=4)
    engine.run()


# -- aborts -------------------------------------------------------------------------------


def test_abort_while_waiting() -> None:
    engine = Engine(max_running=1)
    first, waiting = engine.add("a", prompt_of(4)), engine.add("b", prompt_of(4, 1))
    engine.step()

    assert engine.scheduler.abort("b") is waiting

    engine.run()
    assert waiting.finish_reason is FinishReason.ABORT
    assert_right(first)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_abort_while_prefilling_or_decoding(num_steps: int) -> None:
    engine = Engine(max_step_tokens=8)
    engine.add("a", prompt_of(20), max_tokens=10)
    for _ in range(num_steps):
        engine.step()

    engine.scheduler.abort("a")

    engine.scheduler.check()
    assert not engine.scheduler.has_work
    assert engine.pool.num_free == engine.pool.num_blocks


def test_abort_between_schedule_and_update_drops_the_token() -> None:
    engine = Engine()
    engine.add("a", prompt_of(6))
    stays = engine.add("b", prompt_of(6, 1))
    step = engine.schedule()
    engine.scheduler.abort("a")

    outputs = engine.finish(step)

    assert [output.request.id for output in outputs] == ["b"]
    engine.run()
    assert_right(stays)


def test_abort_of_somebody_unknown_or_finished_is_nothing() -> None:
    engine = Engine()
    engine.add("a", prompt_of(4), max_tokens=1)
    engine.run()

    assert engine.scheduler.abort("a") is None
    assert engine.scheduler.abort("never") is None


# -- logits that are no numbers -----------------------------------------------------------


def test_a_request_without_numbers_ends_alone() -> None:
    engine = Engine()
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
    engine = Engine(max_step_tokens=max_step_tokens)
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
    engine = Engine()
    request = engine.add("a", prompt, max_tokens=8)
    engine.step()
    engine.step()
    engine.model.spoils = {request.token_ids[-1]}
    engine.run()

    assert request.finish_reason is FinishReason.ERROR
    assert_right(request)


# -- random runs --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 40),
    block_size=st.integers(1, 4),
    max_step_tokens=st.integers(4, 40),
    max_running=st.integers(1, 4),
)
def test_random_runs_end_with_right_tokens_and_a_full_pool(
    seed: int, num_blocks: int, block_size: int, max_step_tokens: int, max_running: int
) -> None:
    """Arrivals, aborts and preemptions in any order; nobody starves (`run` has a limit)."""
    rng = random.Random(seed)
    engine = Engine(num_blocks, block_size, max_step_tokens, max_running)
    capacity = num_blocks * block_size
    stems = [prompt_of(rng.randint(1, capacity), index) for index in range(3)]
    requests: list[Request] = []
    for index in range(rng.randint(1, 12)):
        max_tokens = rng.randint(1, max(1, capacity // 2))
        stem = rng.choice(stems)[: rng.randint(1, max(1, capacity - max_tokens - 1))]
        prompt = (stem + prompt_of(rng.randint(0, 3), index))[: capacity - max_tokens]
        if prompt:
            requests.append(engine.add(f"r{index}", prompt, max_tokens))
        for _ in range(rng.randint(0, 4)):
            engine.step()
        if requests and rng.random() < 0.2:
            engine.scheduler.abort(rng.choice(requests).id)

    engine.run()

    assert_right(*requests)
    for request in requests:
        if request.finish_reason is not FinishReason.ABORT:
            assert request.num_output_tokens == request.sampling.max_tokens
