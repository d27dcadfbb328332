"""When a step is interrupted, and what the engine does with one that was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from fake_model import FakeModel, continuation
from hand_engine import HandEngine, assert_right, names, prompt_of, sizes

from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.interruption import LEAST_SAVED_TOKENS, Interruption, StepInterruptedError
from roost_engine.request import FinishReason, Request, SamplingParams
from roost_engine.scheduler import Scheduler, Step
from roost_engine.token_stream import TokenStream

# -- when ---------------------------------------------------------------------------------------


def step_of(**num_tokens: int) -> Step:
    """A step with so many tokens for each request."""
    sampling = SamplingParams(max_tokens=1)
    requests = [Request(name, [1] * num, sampling, 0.0) for name, num in num_tokens.items()]
    chunks = [Chunk(request.token_ids, 0, [0], False) for request in requests]
    return Step(requests, chunks, [], [])


def begun(**num_tokens: int) -> Interruption:
    interruption = Interruption()
    interruption.begin(step_of(**num_tokens))
    return interruption


@pytest.mark.parametrize(
    ("gone", "stays", "expected"),
    [
        (LEAST_SAVED_TOKENS, LEAST_SAVED_TOKENS - 1, True),
        (LEAST_SAVED_TOKENS, LEAST_SAVED_TOKENS, False),
        (LEAST_SAVED_TOKENS - 1, 1, False),
        (257, 255, True),
        (256, 256, False),
        (1, 0, True),
    ],
)
def test_a_step_is_interrupted_if_most_of_it_is_for_nobody(
    gone: int, stays: int, expected: bool
) -> None:
    others = {"stays": stays} if stays else {}

    assert begun(gone=gone, **others).leave("gone") is expected


def test_those_who_leave_one_after_the_other_are_counted_together() -> None:
    interruption = begun(a=100, b=100, c=100, d=1)

    assert [interruption.leave(name) for name in "dabc"] == [False, False, True, False]


def test_who_is_not_in_the_step_interrupts_nothing() -> None:
    interruption = begun(a=500)
    assert not interruption.leave("waiting")

    interruption.end(was_interrupted=False)
    assert not interruption.leave("a"), "no step is under way"


def test_others_do_not_lose_two_steps_running() -> None:
    interruption = begun(a=500, decode=1)
    assert interruption.leave("a")
    interruption.end(was_interrupted=True)

    interruption.begin(step_of(b=500, decode=1))
    assert not interruption.leave("b")
    assert interruption.leave("decode"), "nobody is left who could lose"
    interruption.end(was_interrupted=False)  # it came too late

    interruption.begin(step_of(c=500, d=1))
    assert interruption.leave("c")


# -- what then, in the scheduler -----------------------------------------------------------------


def test_a_discarded_step_is_chosen_again() -> None:
    engine = HandEngine(max_step_tokens=16)
    decode = engine.add("decode", prompt_of(5, 1), max_tokens=9)
    engine.step()
    prefill = engine.add("prefill", prompt_of(40, 2), max_tokens=9)
    engine.step()
    num_events = engine.resident.num_events

    interrupted = engine.schedule()
    engine.interrupt(interrupted)
    again = engine.schedule()

    assert engine.resident.num_events == num_events, "something was registered"
    assert (names(again), sizes(again)) == (names(interrupted), sizes(interrupted))
    assert [chunk.start for chunk in again.chunks] == [5 + 1, 15]
    engine.finish(again)
    engine.run()
    assert_right(decode, prefill)
    assert engine.scheduler.counters.interrupted_steps == 1


def test_copies_of_a_discarded_step_are_not_lost() -> None:
    engine = HandEngine(num_blocks=8, num_host_blocks=8)
    first = engine.add("first", prompt_of(20, 1))
    engine.run()
    engine.add("other", prompt_of(24, 2))
    engine.run()
    again = engine.add("again", [*prompt_of(20, 1), 3])

    step = engine.schedule()
    assert step.copies
    engine.interrupt(step)
    assert not engine.schedule().copies
    engine.finish(engine.steps[-1])
    engine.run()

    assert engine.scheduler.counters.restored_tokens > 0
    assert_right(first, again)


# -- what then, in the engine --------------------------------------------------------------------


HOLD = 77  # a token that is never generated


class HeldModel(FakeModel):
    """Stays in a step with a token of `holds` until it is interrupted, or `go` is set."""

    def __init__(self) -> None:
        super().__init__(block_size=4)
        self.holds: set[int] = set()
        self.is_held = threading.Event()
        self.go = threading.Event()
        self.num_interrupts = 0

    def interrupt(self) -> None:
        self.num_interrupts += 1
        self.go.set()

    def next_tokens(self, chunks: Sequence[Chunk]) -> list[int | None]:
        if any(self.holds.intersection(chunk.token_ids) for chunk in chunks):
            self.go.clear()
            self.is_held.set()
            self.go.wait()
            if self.num_interrupts:
                self.spoil(chunks)
                raise StepInterruptedError
        return super().next_tokens(chunks)


def build() -> tuple[EngineCore, HeldModel]:
    config = SchedulerConfig(max_step_tokens=128, max_running=4, max_model_len=4000)
    model = HeldModel()
    return EngineCore(Scheduler(config, BlockPool(1000, 4), frozenset()), model), model


def ask(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 5) -> TokenStream:
    return core.submit(
        Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), 0.0)
    )


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


async def test_a_prefill_whose_client_leaves_is_ended_and_the_others_go_on() -> None:
    core, model = build()
    model.holds = {HOLD}
    core.start()
    try:
        stays = ask(core, "stays", [HOLD, 2, 3], max_tokens=40)
        await asyncio.to_thread(model.is_held.wait)
        leaves = ask(core, "leaves", [HOLD] * 100)
        model.is_held.clear()
        model.go.set()
        await asyncio.to_thread(model.is_held.wait)
        core.abort("leaves")

        assert await tokens_of(stays) == continuation([HOLD, 2, 3], 40, 50)
        assert (await anext(leaves)).finish_reason is FinishReason.ABORT
    finally:
        await core.stop()

    assert model.num_interrupts == core.scheduler.counters.interrupted_steps == 1
    core.scheduler.check()
    assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks


async def test_a_step_that_others_need_more_is_not_interrupted() -> None:
    core, model = build()
    model.holds = {HOLD}
    core.start()
    try:
        ask(core, "first", [HOLD], max_tokens=1)
        await asyncio.to_thread(model.is_held.wait)
        ask(core, "leaves", [HOLD] + [1] * 39)
        stays = ask(core, "stays", [2] * 60)
        model.is_held.clear()
        model.go.set()
        await asyncio.to_thread(model.is_held.wait)
        assert core.scheduler.num_running == 2
        core.abort("leaves")
        model.go.set()

        assert await tokens_of(stays) == continuation([2] * 60, 5, 50)
    finally:
        await core.stop()

    assert model.num_interrupts == core.scheduler.counters.interrupted_steps == 0


async def test_a_step_whose_client_has_left_before_it_begins_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, model = build()
    schedule = core.scheduler.schedule
    is_chosen, may_go_on = threading.Event(), threading.Event()

    def schedule_slowly() -> Step:
        step = schedule()
        is_chosen.set()
        may_go_on.wait()
        return step

    monkeypatch.setattr(core.scheduler, "schedule", schedule_slowly)
    core.start()
    try:
        ask(core, "leaves", [1] * 100)
        await asyncio.to_thread(is_chosen.wait)
        core.abort("leaves")
        may_go_on.set()
        while core.scheduler.has_work:
            await asyncio.sleep(0.005)
    finally:
        await core.stop()

    assert model.calls == 0
    assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks
