"""KV events in the fleet simulator: what replicas tell, when, and what routers make of it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fleet_play import chats
from hypothesis import given, settings
from hypothesis import strategies as st

from roost.cli import main
from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.events import FleetRun
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.prompts import canonical_prompt
from roost_loadtest.fleet_sim.replica import Job, SimReplica
from roost_loadtest.fleet_sim.routers import RealRouters
from roost_loadtest.fleet_sim.told import BlockNews, EventDelays, NoEventsError, check_can_tell
from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_router.openai_request import RoutingFields
from roost_router.policy.cost import CostPolicy
from roost_wire.kv_events import BlockRemoved, BlockStored

BLOCK = 64
#: 1 ms a prompt token, chunks of 256.
TIMES = StepTimes(token_s=0.001, pair_s=0.0, step_s=0.010, context_s=0.0, chunk_tokens=256)


def told_replica(capacity_blocks: int = 100) -> SimReplica:
    news = BlockNews(BLOCK)
    return SimReplica(TIMES, BlockCache(capacity_blocks, news.removed), BLOCK, news)


def job(number: int, prompt: int, ids: tuple[int, ...], out: int = 1) -> Job:
    request = Request(prompt, out, ids, 0.0)
    return Job(number, request, Trace("t", BLOCK, []).num_private(request), 0.0)


def finish(replica: SimReplica) -> None:
    while replica.ends_s is not None:
        replica.step(replica.ends_s)


def replay(events, resident: list[int] | None = None) -> list[int]:
    """What is resident after `events`, oldest first; a parent was stored before its children."""
    resident = [] if resident is None else resident
    for event in events:
        if isinstance(event, BlockStored):
            assert event.parent_hash is None or event.parent_hash in resident
            resident += [block for block in event.block_hashes if block not in resident]
        elif isinstance(event, BlockRemoved):
            for block in event.block_hashes:
                resident.remove(block)
    return resident


def test_blocks_are_told_when_they_are_computed():
    """600 tokens: two whole chunks are one stretch, the last 88 tokens a second one."""
    replica = told_replica()
    replica.submit(job(0, 600, tuple(range(10))), 0.0)
    assert replica.take_news() == []

    replica.step(replica.ends_s)
    assert replay(replica.take_news()) == list(range(8))

    replica.step(replica.ends_s)
    assert replay(replica.take_news(), list(range(8))) == list(range(10))
    assert replica.take_news() == []


def test_of_a_shared_prompt_only_the_rest_is_told():
    replica = told_replica()
    replica.submit(job(0, 128, (1, 2)), 0.0)
    finish(replica)
    replica.take_news()

    replica.submit(job(1, 192, (1, 2, 3)), 1.0)
    finish(replica)

    (stored,) = replica.take_news()
    assert (stored.block_hashes, stored.parent_hash) == ((3,), 2)


def test_evictions_are_told():
    replica = told_replica(capacity_blocks=4)
    for number, ids in enumerate([(1, 2), (3, 4)]):
        replica.submit(job(number, 127, ids), float(number))
        finish(replica)

    replica.submit(job(2, 63, (5,)), 5.0)

    assert replica.take_news()[-1].block_hashes == (2,)  # the tail of the oldest


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=30))
def test_events_replayed_give_what_is_cached(prompts):
    """Families of nested prompts, some side by side; asked when all have ended."""
    replica, resident = told_replica(capacity_blocks=12), []
    for number, (family, length, waits) in enumerate(prompts):
        ids = tuple(100 * family + place for place in range(length))
        replica.submit(job(number, length * BLOCK - 3, ids, out=3), float(number))
        if waits:
            finish(replica)
    finish(replica)
    replay(replica.take_news(), resident)

    assert sorted(resident) == sorted(replica._cache._idle)
    for family in range(4):
        ids = tuple(100 * family + place for place in range(6))
        num_told = next((n for n, block in enumerate(ids) if block not in resident), 6)
        num_held = next((n for n in range(6, 0, -1) if ids[n - 1] in replica._cache._idle), 0)
        assert num_told == num_held


def routers(num_routers: int = 1, num_replicas: int = 2, **delays: float) -> RealRouters:
    reports = [told_replica().report() for _ in range(num_replicas)]
    return RealRouters(
        CostPolicy,
        num_routers=num_routers,
        reports=reports,
        block_tokens=BLOCK,
        seed=0,
        delays=EventDelays(**delays),
    )


def stored(ids: tuple[int, ...]):
    news = BlockNews(BLOCK)
    news.stored(ids, 0, len(ids))
    return news.take()


def candidates(found: RealRouters, one: Job, now: float = 0.0):
    """What the first router weighs for a request, in order of the replicas."""
    prompt = canonical_prompt(one.request, BLOCK, one.number)
    fields = RoutingFields("m", stream=True, prompt=prompt)
    return found.placers[0].weigh(fields, now).candidates


IDS = tuple(range(20))


def test_what_a_replica_tells_counts_once_the_tokens_are_known():
    """The prompt was placed elsewhere, so that nothing but events speaks for the holder."""
    found = routers()
    found.told(1, stored(IDS[:10]))
    first = job(0, 20 * BLOCK, IDS)
    assert [c.matched_tokens for c in candidates(found, first)] == [0, 0]
    found.placers[0].fleet.refused(found.placers[0].fleet.replicas[1])
    assert found.offer(first, 0.0) == 0
    found.polled([told_replica().report()] * 2)

    found.tokenised(first)

    matched = [c.matched_tokens for c in candidates(found, job(1, 20 * BLOCK, IDS))]
    assert matched[1] == 10 * BLOCK


def test_an_evicted_block_is_not_believed_any_more():
    found = routers(tokens_after_s=0.0)
    found.told(1, stored(IDS))
    first = found.offer(job(0, 20 * BLOCK, IDS), 0.0)
    assert first == 1  # known at once, by its tokens
    found.first_token(answered(0), 1.0, 1.0)
    gone = BlockNews(BLOCK)
    gone.removed(IDS[12:])

    found.told(1, gone.take())

    blank, holder = candidates(found, job(1, 20 * BLOCK, IDS), now=10.0)
    assert (blank.matched_tokens, holder.matched_tokens) == (0, 12 * BLOCK)
    assert holder.is_told


def answered(number: int) -> Job:
    """A job whose whole prompt was cached."""
    one = job(number, 20 * BLOCK, IDS)
    one.cached_tokens = 20 * BLOCK - 1
    return one


@pytest.mark.parametrize(("tokens_after_s", "finds"), [(0.0, True), (0.02, False)])
def test_a_router_finds_what_others_placed_if_it_knows_the_tokens(tokens_after_s, finds):
    """A prompt that comes by a router for the first time means nothing to events until then."""
    found = routers(num_routers=4, num_replicas=8, tokens_after_s=tokens_after_s)
    found.told(5, stored(IDS))

    place = found.offer(job(0, 20 * BLOCK, IDS), 0.0)

    assert (place == 5) is finds


@pytest.mark.parametrize(
    ("hears_after_s", "events_after_s", "expected_s"),
    [(0.0, 0.05, 0.25), (0.0, 0.0, 0.2), (0.5, 0.05, 0.7)],
)
def test_events_are_late_by_their_delay_or_that_of_all_news(
    hears_after_s, events_after_s, expected_s
):
    """200 prompt tokens take 0.2 s."""
    replicas, delays = [told_replica()], EventDelays(events_after_s=events_after_s)
    found = RealRouters(
        CostPolicy,
        num_routers=1,
        reports=[replicas[0].report()],
        block_tokens=BLOCK,
        seed=0,
        delays=delays,
    )
    told, tell = [], found.told
    found.told = lambda replica, events: (told.append(replica), tell(replica, events))
    trace = Trace("t", BLOCK, [Request(200, 1, (1, 2, 3), 0.0)])
    run = FleetRun(trace, replicas, found, hears_after_s=hears_after_s, delays=delays)
    heard_s, at = [], run._at

    def watch(moment, event):
        def noting(now):
            num_before = len(told)
            event(now)
            heard_s.extend(now for _ in told[num_before:])

        at(moment, noting)

    run._at = watch

    run.run()

    assert heard_s == [pytest.approx(expected_s)]


@pytest.fixture
def trace_file(tmp_path):
    def write(trace: Trace):
        path = tmp_path / f"{trace.name}.jsonl"
        lines = [
            {
                "t": request.arrives_s * 1e3,
                "in": request.prompt_tokens,
                "out": request.output_tokens,
                "hash_ids": request.block_ids,
                "block": trace.block_tokens,
            }
            for request in trace.requests
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def figures(*arguments: str) -> dict[str, float]:
    result = CliRunner().invoke(
        main, ["sim", *arguments, "--policy", "cost", "--no-bound", "--json"]
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_four_routers_hit_most_if_they_know_tokens_first(trace_file):
    path, common = (
        trace_file(chats(BLOCK, num_chats=40, first_blocks=20, blocks_a_turn=4)),
        ("--routers", "4", "--replicas", "4", "--load", "0.5"),
    )

    blind = figures(path, *common)
    told = figures(path, *common, "--knows", "events")
    told_first = figures(path, *common, "--knows", "events", "--tokens-after", "0")

    assert max(blind["hit_rate"], told["hit_rate"]) < told_first["hit_rate"]


def test_the_bound_is_the_same_with_events(trace_file):
    path = trace_file(chats(BLOCK, num_chats=40, first_blocks=20, blocks_a_turn=4))

    def bound(*more: str) -> dict[str, float]:
        arguments = ["sim", path, "--replicas", "2", "--policy", "round-robin", "--json", *more]
        result = CliRunner().invoke(main, arguments)
        return json.loads(result.output.splitlines()[1])

    assert bound() == bound("--knows", "events")


@pytest.mark.parametrize("block_tokens", [15, 16])
def test_events_are_of_blocks_of_16_tokens_or_more(trace_file, block_tokens):
    trace = Trace("small", block_tokens, [Request(40, 1, (1, 2), 0.0)])
    arguments = ["sim", trace_file(trace), "--policy", "cost", "--knows", "events"]

    result = CliRunner().invoke(main, arguments)

    assert (result.exit_code == 0) is (block_tokens == 16)
    if block_tokens == 15:
        assert "blocks of 15 tokens" in result.output
        with pytest.raises(NoEventsError):
            check_can_tell(trace)
