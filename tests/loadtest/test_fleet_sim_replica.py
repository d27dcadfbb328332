"""The simulated replica against cases computed by hand, and a twin that takes single steps."""

from __future__ import annotations

import pytest
from fleet_play import play
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import Happened, Job, SimReplica
from roost_loadtest.fleet_sim.trace import Request

BLOCK = 10
#: 1 ms a prompt token, 10 ms a step that decodes and 1 ms for each of its streams.
PLAIN = StepTimes(token_s=0.001, pair_s=0.0, step_s=0.010, context_s=0.0, chunk_tokens=100)


def job(number: int, prompt: int, out: int, ids: tuple[int, ...] = (), at: float = 0.0) -> Job:
    num_private = -(-(prompt + out) // BLOCK) - len(ids)
    return Job(number, Request(prompt, out, ids, at), num_private, at)


def make(capacity_blocks: int = 1000, times: StepTimes = PLAIN) -> SimReplica:
    return SimReplica(times, BlockCache(capacity_blocks), BLOCK)


def test_one_request_alone():
    """250 tokens in chunks of 100, 100 and 50, then two more tokens of 11 ms each."""
    replica = make()

    assert play(replica, [job(0, 250, 3, at=1.0)]) == [
        (1.25, Happened.FIRST_TOKEN, 0),
        (1.272, Happened.END, 0),
    ]
    assert replica.busy_s == pytest.approx(0.272)
    assert replica.computed_tokens == 250


def test_pairs_and_contexts_cost_what_the_formula_says():
    times = StepTimes(token_s=0.0, pair_s=1e-6, step_s=0.0, context_s=1e-3, chunk_tokens=100)
    one = job(0, 250, 3)

    play(make(times=times), [one])

    assert one.first_token_s == pytest.approx(1e-6 * 250 * 250 / 2)
    assert one.ended_s - one.first_token_s == pytest.approx(1e-3 * (251 + 252))


def test_an_answer_of_one_token_ends_with_the_prefill():
    assert play(make(), [job(0, 40, 1)]) == [
        (0.04, Happened.FIRST_TOKEN, 0),
        (0.04, Happened.END, 0),
    ]


def test_a_shared_prefix_is_computed_once():
    """The second shares 20 of 40 tokens and comes when the first has ended."""
    first = job(0, 40, 1, (1, 2, 3, 4))
    second = job(1, 40, 1, (1, 2, 5, 6), at=1.0)
    replica = make()

    play(replica, [first, second])

    assert (first.cached_tokens, second.cached_tokens) == (0, 20)
    assert second.first_token_s == pytest.approx(1.02)
    assert replica.computed_tokens == 60


def test_siblings_share_the_prefix_that_is_being_computed():
    first, second = job(0, 150, 1, tuple(range(15))), job(1, 150, 1, tuple(range(15)), at=0.01)

    play(make(), [first, second])

    assert second.cached_tokens == 149  # the last token is always computed
    assert first.first_token_s == second.first_token_s == pytest.approx(0.151)


def test_a_full_cache_evicts_what_was_used_least_recently():
    """Room for three prompts of two blocks (of which one token is generated into the second)."""
    a, b, c, d = (job(n, 19, 1, (2 * n, 2 * n + 1), at=float(n)) for n in range(4))
    a_again = job(4, 19, 1, (0, 1), at=1.5)
    late = [job(5 + n, 19, 1, (2 * n, 2 * n + 1), at=10.0 + n) for n in (0, 1)]

    play(make(capacity_blocks=6), [a, b, a_again, c, d, *late])

    assert a_again.cached_tokens == 18
    assert [j.cached_tokens for j in late] == [18, 0]  # b was the oldest when d came


def test_without_room_a_request_waits_for_one_to_end():
    """Two of three blocks each in a memory of five: the second starts when the first has ended."""
    first, second = job(0, 20, 10), job(1, 20, 10, at=0.001)

    play(make(capacity_blocks=5), [first, second])

    assert first.ended_s == pytest.approx(0.020 + 9 * 0.011)
    assert second.first_token_s == pytest.approx(first.ended_s + 0.020)


def test_with_just_enough_room_it_does_not_wait():
    first, second = job(0, 20, 10), job(1, 20, 10, at=0.001)

    play(make(capacity_blocks=6), [first, second])

    assert second.first_token_s == pytest.approx(0.020 + 0.020 + 0.011)


def test_who_waits_for_room_keeps_its_place():
    big, bigger, small = job(0, 20, 10), job(1, 40, 10, at=0.001), job(2, 5, 1, at=0.002)

    play(make(capacity_blocks=5), [big, bigger, small])

    assert big.ended_s < bigger.first_token_s <= small.first_token_s


def test_an_arrival_is_taken_up_at_the_next_step():
    """Streams alone are one stretch; whoever comes waits for the step under way only."""
    first, second = job(0, 20, 101), job(1, 30, 1, at=0.025)

    play(make(), [first, second])

    assert second.first_token_s == pytest.approx(0.031 + 0.030 + 0.011)
    assert first.ended_s == pytest.approx(0.020 + 100 * 0.011 + 0.030)


REQUESTS = st.lists(
    st.tuples(
        st.floats(0.0, 2.0),
        st.integers(1, 350),
        st.integers(1, 40),
        st.integers(0, 2),
        st.integers(0, 8),
    ),
    min_size=1,
    max_size=12,
)


def chain(family: int, shared: int, number: int, num_blocks: int) -> tuple[int, ...]:
    """Block ids of which the first `shared` are the family's."""
    common = tuple(1000 * family + place for place in range(min(shared, num_blocks)))
    return common + tuple(10_000 + 100 * number + place for place in range(len(common), num_blocks))


@settings(max_examples=200, deadline=None)
@given(REQUESTS, st.integers(40, 120))
def test_stretches_give_what_single_steps_give(requests, capacity_blocks):
    times = StepTimes(token_s=0.001, pair_s=1e-6, step_s=0.0103, context_s=1.7e-5, chunk_tokens=100)

    def jobs() -> list[Job]:
        return [
            job(n, prompt, out, chain(family, shared, n, -(-prompt // BLOCK)), at + n * 1e-5)
            for n, (at, prompt, out, family, shared) in enumerate(sorted(requests))
        ]

    fast, slow = jobs(), jobs()
    cache = BlockCache(capacity_blocks)
    replica = SimReplica(times, cache, BLOCK)
    play(replica, fast)
    SteppingReplica(times, BlockCache(capacity_blocks)).play(slow)

    for quick, single in zip(fast, slow, strict=True):
        assert quick.cached_tokens == single.cached_tokens
        assert quick.first_token_s == pytest.approx(single.first_token_s, abs=1e-7)
        assert quick.ended_s == pytest.approx(single.ended_s, abs=1e-7)
    assert replica.num_requests == 0
    assert cache.used_blocks == 0


class SteppingReplica:
    """The slow twin: the same rules, each step by itself, each stream by itself."""

    def __init__(self, times: StepTimes, cache: BlockCache) -> None:
        self.times, self.cache = times, cache
        self.waiting: list[Job] = []
        self.prefilling: list[Job] = []
        self.streams: dict[int, tuple[Job, int]] = {}  # tokens so far

    def play(self, jobs: list[Job]) -> None:
        coming, now = list(jobs), 0.0
        while coming or self.waiting or self.prefilling or self.streams:
            if not (self.waiting or self.prefilling or self.streams):
                now = max(now, coming[0].arrived_s)
            while coming and coming[0].arrived_s <= now:
                self.waiting.append(coming.pop(0))
            now = self.step(now)

    def step(self, now: float) -> float:
        chunks = self.chunks()
        now += self.times.step_s if self.streams else 0.0
        for one, so_far in self.streams.values():
            now += self.times.token_s
            now += self.times.context_s * (one.request.prompt_tokens + so_far)
        for one, num in chunks:
            now += self.times.token_s * num
            now += self.times.pair_s * num * (one.computed_tokens + num / 2)
        self.streams = {n: (one, so_far + 1) for n, (one, so_far) in self.streams.items()}
        for one, num in chunks:
            one.computed_tokens += num
            if not one.uncached_tokens:
                self.prefilling.remove(one)
                one.first_token_s = now
                self.streams[one.number] = (one, 1)
        for one, so_far in list(self.streams.values()):
            if so_far == one.request.output_tokens:
                del self.streams[one.number]
                one.ended_s = now
                self.cache.free(one.request.block_ids, one.num_private)
        return now

    def chunks(self) -> list[tuple[Job, int]]:
        chunks: list[tuple[Job, int]] = []
        budget = self.times.chunk_tokens
        while budget and (len(chunks) < len(self.prefilling) or self.admit()):
            one = self.prefilling[len(chunks)]
            num = min(budget, one.uncached_tokens)
            chunks.append((one, num))
            budget -= num
        return chunks

    def admit(self) -> bool:
        if not self.waiting:
            return False
        first = self.waiting[0]
        matched = self.cache.take(first.request.block_ids, first.num_private)
        if matched is None:
            return False
        first.cached_tokens = min(matched * BLOCK, first.request.prompt_tokens - 1)
        first.computed_tokens = first.cached_tokens
        self.prefilling.append(self.waiting.pop(0))
        return True
