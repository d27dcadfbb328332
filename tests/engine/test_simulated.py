"""The twin: step times by the formula, and the scheduler's own decisions in virtual time."""

from __future__ import annotations

import random

import pytest
from fake_model import continuation
from hand_engine import VOCAB, HandEngine, prompt_of

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.request import FinishReason, Request, SamplingParams
from roost_engine.scheduler import Output, PromptTooLong
from roost_engine.simulated import SimulatedReplica, StepTime

STEP_TIME = StepTime(overhead_s=0.5, read_weights_s=4.0, token_s=1.0, context_s=0.25, pair_s=0.125)


def replica(*, num_host_blocks: int = 0, step_time: StepTime = STEP_TIME) -> SimulatedReplica:
    cache = CacheConfig(num_blocks=16, block_size=4, num_host_blocks=num_host_blocks)
    limits = SchedulerConfig(max_step_tokens=16, max_running=4, max_model_len=64)
    return SimulatedReplica(cache, limits, step_time)


def request_of(
    name: str, prompt: list[int], max_tokens: int = 8, *, deadline_s: float | None = None
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(name, prompt, sampling, 0.0, deadline_s=deadline_s)


def run(twin: SimulatedReplica) -> list[tuple[float, Output]]:
    outputs: list[tuple[float, Output]] = []
    while (now := twin.next_event_s()) is not None:
        outputs += [(now, output) for output in twin.step(now)]
        twin.scheduler.check()
    return outputs


def chunk(count: int, start: int = 0) -> Chunk:
    return Chunk([0] * count, start, [], True)


@pytest.mark.parametrize(
    ("chunks", "seconds"),
    [
        ([chunk(1)], 0.5 + 4.0 + 0.25),
        ([chunk(1, start=9)], 0.5 + 4.0 + 10 * 0.25),
        ([chunk(1)] * 4, 0.5 + 4.0 + 4 * 0.25),
        ([chunk(1)] * 5, 0.5 + 5.0 + 5 * 0.25),
        ([chunk(8)], 0.5 + 8.0 + 36 * 0.125),
        ([chunk(8, start=10)], 0.5 + 8.0 + (80 + 36) * 0.125),
        ([chunk(1, start=3), chunk(2)], 0.5 + 4.0 + 4 * 0.25 + 3 * 0.125),
    ],
)
def test_step_times_follow_the_formula(chunks: list[Chunk], seconds: float) -> None:
    assert STEP_TIME.predict_s(chunks) == seconds


def test_copies_between_the_tiers_take_time() -> None:
    assert StepTime(overhead_s=1.0, read_weights_s=0.0, token_s=0.0, copy_block_s=0.5).predict_s(
        [chunk(1)], num_copies=3
    ) == pytest.approx(2.5)


def test_a_request_generates_what_it_says_and_ends() -> None:
    twin = replica()
    twin.submit(request_of("a", prompt_of(8), max_tokens=3), [11, 12, 13, 14], now=100.0)

    outputs = run(twin)

    assert [output.token_id for _, output in outputs] == [11, 12, 13]
    assert outputs[-1][1].finish_reason is FinishReason.LENGTH
    prefill = 0.5 + 8.0 + 36 * 0.125
    assert outputs[0][0] == 100.0 + prefill
    decodes = 2 * 4.5 + (9 + 10) * 0.25
    assert outputs[-1][0] == pytest.approx(100.0 + prefill + decodes)
    assert twin.busy_s == pytest.approx(prefill + decodes)
    assert twin.next_event_s() is None


def test_a_request_that_has_nothing_more_to_say_stops() -> None:
    twin = replica()
    request = request_of("a", prompt_of(8))
    twin.submit(request, [11, 12], now=0.0)

    assert [output.finish_reason for _, output in run(twin)] == [None, None, FinishReason.STOP]
    assert request.num_output_tokens == 3


def test_the_next_turn_hits_what_the_first_left() -> None:
    twin = replica()
    first = request_of("a", prompt_of(8), max_tokens=5)
    twin.submit(first, [1, 2, 3, 4, 5], now=0.0)
    run(twin)
    again = request_of("b", [*first.token_ids, 7])
    twin.submit(again, [1], now=50.0)
    run(twin)

    assert again.num_cached_tokens == 12


def test_who_comes_during_a_step_is_computed_from_the_next_one() -> None:
    twin = replica()
    twin.submit(request_of("a", prompt_of(8), max_tokens=1), [1], now=0.0)
    ends = twin.next_event_s()
    assert ends is not None
    twin.submit(request_of("b", prompt_of(4, 1), max_tokens=1), [1], now=1.0)

    assert twin.next_event_s() == ends
    assert [output.request.id for output in twin.step(ends)] == ["a"]
    assert twin.next_event_s() == ends + 0.5 + 4.0 + 10 * 0.125


def test_an_aborted_request_gives_no_more_tokens() -> None:
    twin = replica()
    twin.submit(request_of("a", prompt_of(8)), [1, 2, 3], now=0.0)
    twin.submit(request_of("b", prompt_of(8, 1), max_tokens=2), [1, 2], now=0.0)
    twin.abort("a")
    twin.abort("a")

    assert {output.request.id for _, output in run(twin)} == {"b"}


def test_who_waits_beyond_its_deadline_is_dropped() -> None:
    twin = replica()
    for index in range(4):
        twin.submit(request_of(f"r{index}", prompt_of(4, index)), [1] * 8, now=0.0)
    twin.submit(request_of("late", prompt_of(4, 9), deadline_s=10.0), [1], now=0.0)

    late = [(now, output) for now, output in run(twin) if output.request.id == "late"]

    ((now, output),) = late
    assert now >= 10.0
    assert (output.token_id, output.finish_reason) == (None, FinishReason.ABORT)


def test_a_refused_request_leaves_no_trace() -> None:
    twin = replica()
    with pytest.raises(PromptTooLong):
        twin.submit(request_of("a", prompt_of(60)), [1], now=0.0)

    twin.submit(request_of("a", prompt_of(8), max_tokens=1), [1], now=0.0)
    assert len(run(twin)) == 1


@pytest.mark.parametrize("num_host_blocks", [0, 8])
def test_the_twin_decides_as_the_engine_does(num_host_blocks: int) -> None:
    """The same requests at the same steps: chunk for chunk the same, and the same cache hits."""
    rng = random.Random(3)
    engine = HandEngine(16, 4, 16, 4, num_host_blocks=num_host_blocks)
    twin = replica(num_host_blocks=num_host_blocks)
    pairs: list[tuple[Request, Request]] = []
    for index in range(30):
        prompt = prompt_of(rng.randint(1, 30), rng.randrange(3)) + prompt_of(
            rng.randint(0, 4), index
        )
        max_tokens = rng.randint(1, 20)
        real = engine.add(f"r{index}", prompt, max_tokens)
        virtual = request_of(f"r{index}", prompt, max_tokens)
        # The engine takes requests between its steps, the twin before it starts one.
        was_idle = twin.next_event_s() is None
        twin.submit(virtual, continuation(prompt, max_tokens, VOCAB), now=0.0)
        pairs.append((real, virtual))
        if was_idle:
            pending = engine.schedule()
        for _ in range(rng.randint(1, 6)):
            now = twin.next_event_s()
            if now is None:
                break
            assert twin._step is not None
            assert pending.chunks == twin._step.chunks
            twin.step(now)
            engine.finish(pending)
            if engine.scheduler.has_work:
                pending = engine.schedule()

    while (now := twin.next_event_s()) is not None:
        assert twin._step is not None
        assert pending.chunks == twin._step.chunks
        twin.step(now)
        engine.finish(pending)
        if engine.scheduler.has_work:
            pending = engine.schedule()
    for real, virtual in pairs:
        assert real.token_ids == virtual.token_ids
        assert real.num_cached_tokens == virtual.num_cached_tokens
