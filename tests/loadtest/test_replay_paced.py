"""Paced replicas: what the clock does to them, and what it must not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import Happened, Job
from roost_loadtest.fleet_sim.trace import Request
from roost_loadtest.replay.paced import PacedReplica, SteppedReplica

BLOCK = 10
TIMES = StepTimes(token_s=0.001, pair_s=0.0, step_s=0.010, context_s=0.0, chunk_tokens=100)


class Clock:
    """Seconds that pass when told; timers that fire `late_s` after they are due."""

    def __init__(self, late_s: float) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self._late_s = late_s

    def call_at(self, at: float, call) -> Timer:
        timer = Timer(self, max(self.now, at + self._late_s), call)
        self.timers.append(timer)
        return timer

    def advance(self, until: float) -> None:
        while self.timers and min(t.at for t in self.timers) <= until:
            timer = min(self.timers, key=lambda t: t.at)
            self.timers.remove(timer)
            self.now = max(self.now, timer.at)
            timer.call()
        self.now = max(self.now, until)


class Timer:
    def __init__(self, clock: Clock, at: float, call) -> None:
        self.clock, self.at, self.call = clock, at, call

    def cancel(self) -> None:
        self.clock.timers.remove(self)


def paced(clock: Clock, heard: list[tuple[Happened, Job]]) -> PacedReplica:
    return PacedReplica(
        SteppedReplica(TIMES, BlockCache(1000), BLOCK),
        clock=lambda: clock.now,
        call_at=clock.call_at,
        tell=lambda what, job: heard.append((what, job)),
    )


def job(number: int, prompt: int, out: int) -> Job:
    return Job(number, Request(prompt, out, (), 0.0), -(-(prompt + out) // BLOCK), 0.0)


def play(jobs: list[tuple[float, int, int]], late_s: float) -> list[Job]:
    """Jobs (arrival, prompt, out) through one replica whose timers are late; all of them, ended."""
    clock, heard = Clock(late_s), []
    replica = paced(clock, heard)
    made = [job(number, prompt, out) for number, (_, prompt, out) in enumerate(jobs)]
    for one, (at, _, _) in zip(made, jobs, strict=True):
        clock.advance(at)
        replica.submit(one)
    clock.advance(1e6)
    ended = [one for what, one in heard if what is Happened.END]
    assert sorted(ended, key=lambda one: one.number) == made
    return made


def moments(jobs: list[Job]) -> list[float]:
    return [at for one in jobs for at in (one.first_token_s, one.ended_s)]


arrivals = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 300), st.integers(1, 20)), min_size=1, max_size=8
)


@settings(max_examples=50)
@given(arrivals, st.floats(0.0, 0.5))
def test_lateness_of_timers_changes_nothing_inside(jobs, late_s):
    jobs.sort()

    on_time, late = play(jobs, 0.0), play(jobs, late_s)

    assert moments(on_time) == pytest.approx(moments(late))


def test_how_late_timers_were_is_kept():
    clock = Clock(0.25)
    replica = paced(clock, [])

    replica.submit(job(0, 100, 2))
    clock.advance(10.0)

    assert replica.late_s == pytest.approx([0.25])  # the end was due meanwhile, and came with it


def test_tokens_of_a_stream_grow_one_by_one_and_end_with_it():
    """The prompt takes 0.1 s; each of nine further tokens 0.011 s."""
    clock, heard = Clock(0.0), []
    replica = paced(clock, heard)
    one = job(0, 100, 10)
    replica.submit(one)
    clock.advance(0.1)
    first_step = replica.replica.num_steps

    seen = []
    for number in range(12):
        clock.advance(0.1 + 0.0111 * number)
        seen.append(replica.tokens_of(one, first_step))

    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert heard[-1] == (Happened.END, one)
