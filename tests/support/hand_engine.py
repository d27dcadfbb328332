"""Scheduler, pool and fake model, stepped by hand, with every invariant checked on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fake_model import FakeModel, continuation
from resident_set import ResidentSet

from roost_engine.admission import ExpectedOutput
from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.request import Request, RequestState, SamplingParams
from roost_engine.scheduler import Output, Scheduler, Step

VOCAB = 50
NO_EOS: frozenset[int] = frozenset()


class Optimist(ExpectedOutput):
    """Expects every request to end at once, so memory runs short as soon as it can."""

    def remaining_tokens(self, request: Request) -> int:
        return 1


class HandEngine:
    """Add requests, then `step` or `run`."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_step_tokens: int = 32,
        max_running: int = 8,
        eos: frozenset[int] = NO_EOS,
        *,
        num_host_blocks: int = 0,
        expected: ExpectedOutput | None = None,
    ) -> None:
        config = SchedulerConfig(
            max_step_tokens=max_step_tokens, max_running=max_running, max_model_len=256
        )
        self.resident = ResidentSet()
        self.pool = BlockPool(
            num_blocks,
            block_size,
            num_host_blocks=num_host_blocks,
            on_event=self.resident.apply,
        )
        self.scheduler = Scheduler(config, self.pool, eos, expected)
        self.model = FakeModel(block_size, VOCAB)
        self.steps: list[Step] = []
        self.outputs: list[Output] = []

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        ignore_eos: bool = False,
        priority: int = 0,
        deadline_s: float | None = None,
        output: Sequence[int] = (),
    ) -> Request:
        """`output` was generated elsewhere."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        request = Request(
            name,
            prompt,
            sampling,
            arrival_s=0.0,
            priority=priority,
            deadline_s=deadline_s,
            output_ids=output,
        )
        self.scheduler.add(request)
        return request

    def schedule(self) -> Step:
        running = set(self.scheduler.running)
        num_preemptions = self.scheduler.counters.preemptions
        step = self.scheduler.schedule()
        self.check()
        config = self.scheduler.config
        assert step.num_tokens <= config.max_step_tokens
        assert len({request.id for request in step.scheduled}) == len(step.scheduled)
        admitted = set(self.scheduler.running) - running
        if self.scheduler.counters.preemptions > num_preemptions:
            assert not admitted, "a step that preempted admitted somebody"
        self._check_order(admitted)
        self._check_writes(step)
        self.steps.append(step)
        return step

    def finish(self, step: Step) -> list[Output]:
        self.model.copy_blocks(step.copies)
        outputs = self.scheduler.update(step, self.model.next_tokens(step.chunks))
        self.check()
        self.outputs += outputs
        return outputs

    def interrupt(self, step: Step) -> None:
        """The step was begun, and is not computed to its end."""
        self.model.copy_blocks(step.copies)
        self.model.spoil(step.chunks)
        self.scheduler.discard()
        self.check()

    def step(self) -> list[Output]:
        return self.finish(self.schedule())

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            assert self.schedule().scheduled, "work is left, but nothing is computed"
            self.finish(self.steps[-1])
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks - self.scheduler.pins.num_blocks

    def check(self) -> None:
        self.scheduler.check()
        self.resident.check_equals(self.pool)

    def _check_order(self, admitted: set[Request]) -> None:
        """Who was admitted had nobody before it in line, but for those that follow a leader."""
        place_of = self.scheduler._places
        last = max((place_of[request.id] for request in admitted), default=None)
        for request in self.scheduler._waiting:
            if last is not None and request.id not in self.scheduler._sharing._leaders:
                assert place_of[request.id] > last, f"{request!r} was overtaken"

    def _check_writes(self, step: Step) -> None:
        """No chunk writes to a block that somebody else holds or that a lookup can find."""
        holders: dict[int, int] = {}
        for request in self.scheduler.running:
            assert request.state is RequestState.RUNNING
            for block in request.block_table:
                holders[block] = holders.get(block, 0) + 1
        size = self.pool.block_size
        for chunk in step.chunks:
            end = chunk.start + len(chunk.token_ids)
            assert len(chunk.block_table) * size >= end
            for index in range(chunk.start // size, -(-end // size)):
                assert holders[chunk.block_table[index]] == 1
                assert not self.pool.is_cached(chunk.block_table[index])


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
    return [request.id for request in step.scheduled]


def sizes(step: Step) -> Sequence[int]:
    return [len(chunk.token_ids) for chunk in step.chunks]
