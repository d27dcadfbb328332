"""Scheduler under random operations: nothing is lost, nobody starves, every token is right.

HandEngine checks all invariants of scheduler and pool after each step, and that the KV events so
far lead to exactly what is resident.
"""

from __future__ import annotations

import contextlib
import random

from hand_engine import VOCAB, HandEngine, Optimist, assert_right, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_engine.admission import ExpectedOutput
from roost_engine.pins import PinRefused
from roost_engine.request import FinishReason, Request


class RandomUse:
    """Drives an engine with random operations; `now` is virtual."""

    def __init__(self, engine: HandEngine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.capacity = engine.pool.num_blocks * engine.pool.block_size
        self.stems = [prompt_of(rng.randint(1, self.capacity), index) for index in range(3)]
        self.requests: list[Request] = []
        self.now = 0.0

    def add(self) -> None:
        rng, index = self.rng, len(self.requests)
        max_tokens = rng.randint(1, max(1, self.capacity // 2))
        stem = rng.choice(self.stems)[: rng.randint(1, max(1, self.capacity - max_tokens - 1))]
        prompt = (stem + prompt_of(rng.randint(0, 3), index))[: self.capacity - max_tokens]
        if prompt:
            request = self.engine.add(
                f"r{index}",
                prompt,
                max_tokens,
                ignore_eos=rng.random() < 0.3,
                priority=rng.choice((0, 0, 1, -1)),
                deadline_s=self.now + rng.randint(0, 30) if rng.random() < 0.2 else None,
            )
            self.requests.append(request)

    def step(self) -> None:
        self.now += 1
        self.engine.outputs += self.engine.scheduler.expire(self.now)
        self.engine.check()
        step = self.engine.schedule()
        if self.rng.random() < 0.1:
            self.abort()
        if self.rng.random() < 0.2:
            self.engine.interrupt(step)
        else:
            self.engine.finish(step)

    def abort(self) -> None:
        if self.requests:
            self.engine.scheduler.abort(self.rng.choice(self.requests).id)

    def pin(self) -> None:
        rng = self.rng
        name, until_s = rng.choice("ab"), self.now + rng.randint(0, 40)
        pins, budget = self.engine.scheduler.pins, self.engine.pool.num_blocks // 2
        with contextlib.suppress(PinRefused):
            assert 1 <= pins.pin(name, rng.choice(self.stems), until_s) <= budget
        if rng.random() < 0.3:
            pins.release(rng.choice("ab"))
        self.engine.check()

    def spoil(self) -> None:
        spoils = self.engine.model.spoils
        spoils ^= {self.rng.randrange(VOCAB)}
        if len(spoils) > 2:
            spoils.clear()

    def clear(self) -> None:
        self.engine.pool.clear()
        self.engine.scheduler.pins.drop_uncached()
        self.engine.check()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 40),
    num_host_blocks=st.sampled_from([0, 1, 5, 40]),
    block_size=st.integers(1, 4),
    max_step_tokens=st.integers(4, 40),
    max_running=st.integers(1, 4),
    optimist=st.booleans(),
    spoiling=st.booleans(),
)
def test_random_use_ends_with_right_tokens_and_a_full_pool(
    seed: int,
    num_blocks: int,
    num_host_blocks: int,
    block_size: int,
    max_step_tokens: int,
    max_running: int,
    optimist: bool,
    spoiling: bool,
) -> None:
    engine = HandEngine(
        num_blocks,
        block_size,
        max_step_tokens,
        max_running,
        num_host_blocks=num_host_blocks,
        expected=Optimist() if optimist else None,
    )
    use = RandomUse(engine, random.Random(seed))
    operations = [use.add] * 4 + [use.step] * 8 + [use.abort, use.pin, use.clear]
    for _ in range(60):
        use.rng.choice(operations + [use.spoil] * spoiling)()

    engine.model.spoils = set()
    engine.run()

    assert_right(*use.requests)
    for request in use.requests:
        assert request.finish_reason is not None
        if request.finish_reason is FinishReason.LENGTH:
            assert request.num_output_tokens == request.sampling.max_tokens
        assert spoiling or request.finish_reason is not FinishReason.ERROR


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), block_size=st.integers(1, 5), chunk=st.integers(8, 40))
def test_nobody_is_preempted_where_all_of_max_tokens_is_expected(
    seed: int, block_size: int, chunk: int
) -> None:
    """The estimator never lies: shared prefixes, prefills that take turns and early ends included.

    Sharing is by prompts that were computed before, as well as by prompts in one batch.
    """
    rng = random.Random(seed)
    engine = HandEngine(
        30, block_size, chunk, 8, num_host_blocks=rng.choice([0, 9]), expected=ExpectedOutput(1, 1)
    )
    use = RandomUse(engine, rng)
    for _ in range(40):
        rng.choice([use.add, use.step, use.step])()

    engine.run()

    assert engine.scheduler.counters.preemptions == 0
    assert_right(*use.requests)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_within_a_priority_nobody_waits_for_more_than_those_before_it(seed: int) -> None:
    """First come, first served bounds the wait; HandEngine checks each admission's order."""
    rng = random.Random(seed)
    engine = HandEngine(12, 4, 16, 3, expected=Optimist())
    requests = [
        engine.add(f"r{index}", prompt_of(rng.randint(1, 20), index), rng.randint(1, 20))
        for index in range(12)
    ]

    engine.run()

    first: dict[str, int] = {}
    for number, step in enumerate(engine.steps):
        for request in step.scheduled:
            first.setdefault(request.id, number)
    started = [first[request.id] for request in requests]
    assert started == sorted(started)
    work = [len(request.token_ids) for request in requests]
    for index in range(1, len(requests)):
        # Whoever is in the first place is never preempted and gets a token at least in each step.
        assert started[index] <= sum(work[:index])
