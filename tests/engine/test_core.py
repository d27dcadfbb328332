"""The engine thread and its bridge to asyncio, on a model without weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fake_model import FakeModel, continuation

from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.engine_errors import (
    EngineBusyError,
    EngineDeadError,
    EngineStoppingError,
    LogitsError,
)
from roost_engine.request import FinishReason, Request, SamplingParams
from roost_engine.scheduler import PromptTooLong, Scheduler, Step
from roost_engine.token_stream import TokenStream


def request(name: str, prompt: list[int], max_tokens: int = 5) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), 0.0)


def build(max_running: int = 4, max_waiting: int = 100) -> tuple[EngineCore, FakeModel]:
    config = SchedulerConfig(
        max_step_tokens=16, max_running=max_running, max_waiting=max_waiting, max_model_len=4000
    )
    model = FakeModel(block_size=4)
    return EngineCore(Scheduler(config, BlockPool(1000, 4), frozenset()), model), model


@asynccontextmanager
async def running(core: EngineCore) -> AsyncIterator[EngineCore]:
    core.start()
    try:
        yield core
    finally:
        await core.stop()


async def collect(stream: TokenStream) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for delta in stream:
        tokens += delta.token_ids
        reason = delta.finish_reason
    return tokens, reason


async def until_all_free(core: EngineCore) -> None:
    pool = core.scheduler.pool
    while pool.num_free < pool.num_blocks or core.scheduler.has_work:
        await asyncio.sleep(0.005)


async def test_concurrent_requests_get_their_own_tokens() -> None:
    core, _ = build()
    async with running(core):
        prompts = [[index, index + 1, index + 2] for index in range(10)]
        streams = [core.submit(request(str(prompt), prompt)) for prompt in prompts]
        results = await asyncio.gather(*(collect(stream) for stream in streams))

    assert results == [(continuation(prompt, 5, 50), FinishReason.LENGTH) for prompt in prompts]
    assert core.num_in_flight == 0


async def test_an_idle_engine_computes_nothing_and_wakes_up() -> None:
    core, model = build()
    async with running(core):
        await collect(core.submit(request("a", [1])))
        calls = model.calls
        await asyncio.sleep(0.05)
        assert calls == model.calls

        tokens, _ = await collect(core.submit(request("b", [2])))

    assert tokens == continuation([2], 5, 50)


async def test_abort_ends_the_stream_and_frees_the_blocks() -> None:
    core, _ = build()
    async with running(core):
        stream = core.submit(request("a", [1, 2, 3], max_tokens=3000))
        await anext(stream)
        core.abort("a")
        _, reason = await collect(stream)
        await until_all_free(core)

    assert reason is FinishReason.ABORT
    assert core.num_waiting == 0


async def test_a_step_that_raises_fails_everybody_and_later_requests_too() -> None:
    core, model = build()
    model.fail_on_call = 4
    async with running(core):
        streams = [core.submit(request(name, [1, 2], max_tokens=100)) for name in "abcdef"]
        results = await asyncio.gather(*(collect(s) for s in streams), return_exceptions=True)

        assert all(isinstance(result, EngineDeadError) for result in results)
        assert "the model is on fire" in str(results[0])
        assert not core.is_healthy
        with pytest.raises(EngineDeadError):
            core.submit(request("late", [1]))


async def test_every_error_after_a_failure_is_an_object_of_its_own() -> None:
    """One shared object would collect the traceback, and the request, of all who raise it."""
    core, model = build()
    model.fail_on_call = 1
    async with running(core):
        streams = [core.submit(request(name, [1])) for name in "ab"]
        errors = await asyncio.gather(*(collect(s) for s in streams), return_exceptions=True)
        for _ in range(3):
            with pytest.raises(EngineDeadError) as raised:
                core.check_accepts()
            errors.append(raised.value)

    assert len({id(error) for error in errors}) == 5
    assert {str(error) for error in errors} == {"a step failed: RuntimeError: the model is on fire"}
    depths = [depth(error) for error in errors[2:]]
    assert depths == depths[:1] * 3


def depth(error: object) -> int:
    assert isinstance(error, EngineDeadError)
    traceback, count = error.__traceback__, 0
    while traceback is not None:
        traceback, count = traceback.tb_next, count + 1
    return count


async def test_death_is_told_and_a_stop_is_no_death() -> None:
    core, model = build()
    async with running(core):
        model.fail_on_call = 1
        core.submit(request("a", [1]))
        await core.wait_until_dead()
        with pytest.raises(EngineDeadError):
            core.check_alive()

    core, _ = build()
    async with running(core):
        pass
    core.check_alive()
    with pytest.raises(EngineStoppingError):
        core.check_healthy()


async def test_a_request_without_numbers_fails_alone() -> None:
    core, model = build()
    model.spoils = {49}
    async with running(core):
        bad, good = core.submit(request("bad", [49])), core.submit(request("good", [1, 2]))
        with pytest.raises(LogitsError, match="NaN"):
            await collect(bad)

        assert (await collect(good))[0] == continuation([1, 2], 5, 50)
        model.spoils = set()
        assert (await collect(core.submit(request("next", [49]))))[0] == continuation([49], 5, 50)
        assert core.is_healthy
        await until_all_free(core)


async def test_a_scheduler_that_makes_no_progress_is_a_death_not_a_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, _ = build()
    monkeypatch.setattr(core.scheduler, "schedule", lambda: Step([], [], [], []))
    async with running(core):
        with pytest.raises(EngineDeadError, match="no step for <Scheduler running=0 waiting=1>"):
            await collect(core.submit(request("a", [1])))


async def test_stop_lets_running_requests_finish_within_the_grace_period() -> None:
    core, _ = build()
    core.start()
    stream = core.submit(request("a", [1, 2], max_tokens=20))
    await core.stop(grace_s=20)

    assert (await collect(stream))[1] is FinishReason.LENGTH
    assert not core.is_healthy
    with pytest.raises(EngineStoppingError):
        core.submit(request("b", [1]))


async def test_stop_without_grace_fails_what_is_left() -> None:
    core, _ = build()
    core.start()
    stream = core.submit(request("a", [1, 2], max_tokens=3900))
    await anext(stream)
    await core.stop()

    with pytest.raises(EngineStoppingError):
        await collect(stream)


@pytest.mark.parametrize(("max_running", "max_waiting"), [(1, 0), (1, 2), (3, 0), (3, 2)])
async def test_as_many_as_may_run_and_wait_are_taken_and_not_one_more(
    max_running: int, max_waiting: int
) -> None:
    core, _ = build(max_running, max_waiting)
    async with running(core):
        for _ in range(2):  # also when places have become free again
            names = [f"r{index}" for index in range(max_running + max_waiting)]
            streams = [core.submit(request(name, [1])) for name in names]

            with pytest.raises(EngineBusyError):
                core.submit(request("late", [1]))

            for stream in streams:
                await collect(stream)


async def test_what_can_never_fit_is_refused_at_once() -> None:
    core, _ = build()
    async with running(core):
        with pytest.raises(PromptTooLong):
            core.submit(request("a", [1] * 3999))


async def test_an_engine_that_was_not_started_accepts_nothing() -> None:
    core, _ = build()

    with pytest.raises(EngineDeadError, match="does not run"):
        core.submit(request("a", [1]))


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_waiting": -1}, "max_waiting must not be negative"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_step_tokens": 0, "max_running": 0}, "max_step_tokens must be at least 1"),
        ({"max_step_tokens": 3, "max_running": 4}, "at least max_running"),
    ],
)
def test_limits_under_which_nothing_runs_are_refused(limits: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SchedulerConfig(**limits)
