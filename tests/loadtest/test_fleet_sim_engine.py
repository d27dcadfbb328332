"""The engine's scheduler and block pool as a replica of the fleet simulator, beside the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from fleet_play import chats, play
from hypothesis import given, settings
from hypothesis import strategies as st

from roost.cli import main
from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.engine_replica import BLOCK_TOKENS, EngineReplica
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import Happened, Job, Replica, SimReplica
from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_wire.kv_events import BlockRemoved, BlockStored

BLOCK = 64
#: 1 ms a prompt token, 10 ms a step that decodes and 1 ms for each of its streams.
PLAIN = StepTimes(token_s=0.001, pair_s=0.0, step_s=0.010, context_s=0.0, chunk_tokens=100)
REAL = StepTimes()


def engine(kv_tokens: int = 64_000, times: StepTimes = PLAIN, *, tells: bool = False):
    return EngineReplica(times, kv_tokens, BLOCK, tells=tells)


def model(kv_tokens: int = 64_000, times: StepTimes = PLAIN) -> SimReplica:
    return SimReplica(times, BlockCache(kv_tokens // BLOCK), BLOCK)


def job(number: int, prompt: int, out: int, ids: tuple[int, ...] = (), at: float = 0.0) -> Job:
    request = Request(prompt, out, ids, at)
    return Job(number, request, Trace("t", BLOCK, []).num_private(request), at)


def test_one_request_alone():
    """250 tokens in chunks of 100, 100 and 50, then two more tokens of 11 ms each."""
    replica = engine()

    assert play(replica, [job(0, 250, 3, at=1.0)]) == [
        (1.25, Happened.FIRST_TOKEN, 0),
        (1.272, Happened.END, 0),
    ]
    assert replica.busy_s == pytest.approx(0.272)
    assert replica.computed_tokens == 250
    assert replica.num_requests == 0


@given(
    st.integers(2, 5_000),
    st.integers(1, 300),
    st.builds(
        StepTimes,
        token_s=st.floats(1e-6, 1e-3),
        pair_s=st.floats(0.0, 1e-8),
        step_s=st.floats(0.0, 0.1),
        context_s=st.floats(0.0, 1e-6),
        chunk_tokens=st.integers(16, 4096),
    ),
)
@settings(max_examples=40)
def test_alone_a_request_takes_as_long_in_both(prompt, out, times):
    """But for the rest of a chunk that is one token: the engine's formula takes it for a decode."""
    if prompt % times.chunk_tokens == 1:
        prompt += 1
    one, other = job(0, prompt, out), job(0, prompt, out)

    play(engine(times=times), [one])
    play(model(times=times), [other])

    assert one.first_token_s == pytest.approx(other.first_token_s)
    assert one.ended_s == pytest.approx(other.ended_s)


def test_a_shared_prefix_is_found_in_blocks_of_16_tokens():
    """They share a block of 64 tokens, and the second block's first 36 tokens belong to none."""
    first = job(0, 100, 1, (1, 2))
    second = job(1, 200, 1, (1, 3, 4, 5), at=1.0)
    again = job(2, 100, 1, (1, 2), at=2.0)

    play(engine(), [first, second, again])

    assert [one.cached_tokens for one in (first, second, again)] == [0, 64, 96]


def test_siblings_wait_for_the_prefix_that_is_being_computed():
    ids = tuple(range(15))
    first, second = job(0, 960, 1, ids), job(1, 960, 1, ids, at=0.01)

    play(engine(), [first, second])

    assert second.cached_tokens == 944
    assert second.first_token_s == pytest.approx(first.first_token_s + 0.016)


def test_it_reports_its_load():
    """The second step has a token of the first, 80 of the second and 19 of the third."""
    replica = engine(kv_tokens=BLOCK_TOKENS * 100 + 15)
    for number in range(4):
        replica.submit(job(number, 80, 20), 0.0)
    replica.step(replica.ends_s)

    report = replica.report()

    assert report.kv_capacity_tokens == 1600
    assert (report.num_running, report.num_waiting) == (3, 1)
    assert report.kv_usage == pytest.approx((6 + 5 + 5) / 100)
    assert (replica.num_requests, replica.num_waiting) == (4, 1)


def resident(events) -> list[int]:
    held: list[int] = []
    for event in events:
        if isinstance(event, BlockStored):
            held += event.block_hashes
        elif isinstance(event, BlockRemoved):
            for block in event.block_hashes:
                held.remove(block)
    return held


def test_its_kv_events_are_those_of_its_pool():
    replica = engine(kv_tokens=320, tells=True)
    play(replica, [job(0, 192, 1, (1, 2, 3)), job(1, 192, 1, (4, 5, 6), at=5.0)])

    events = replica.take_news()

    assert any(isinstance(event, BlockRemoved) for event in events)
    assert len(resident(events)) == 20  # all of its memory
    assert replica.take_news() == []


def test_it_keeps_no_events_that_nobody_takes():
    replica = engine()
    play(replica, [job(0, 192, 1, (1, 2, 3))])

    assert replica.take_news() == []


@pytest.mark.parametrize("kv_tokens", [50_000, 1_000_000])
@pytest.mark.parametrize("time_scale", [1.0, 0.4])
def test_both_replicas_agree_on_a_trace(kv_tokens, time_scale):
    """Idle and busy, with a memory that holds all prompts and one that holds a third of them."""

    def figures(replica: Replica) -> tuple[float, float, float]:
        trace = chats(BLOCK, num_chats=30, first_blocks=40, blocks_a_turn=8)
        jobs = [
            Job(number, request, trace.num_private(request), request.arrives_s * time_scale)
            for number, request in enumerate(trace.requests)
        ]
        play(replica, jobs)
        ttft_s = sum(one.first_token_s - one.arrived_s for one in jobs) / len(jobs)
        e2e_s = sum(one.ended_s - one.arrived_s for one in jobs) / len(jobs)
        return ttft_s, e2e_s, sum(one.cached_tokens for one in jobs)

    quick, real = figures(model(kv_tokens, REAL)), figures(engine(kv_tokens, REAL))

    assert real == pytest.approx(quick, rel=0.03)


def test_in_a_memory_that_is_always_short_every_request_ends_once():
    """Requests of up to 5,180 tokens in a memory of 6,000."""
    trace = chats(BLOCK, num_chats=30, first_blocks=40, blocks_a_turn=8)
    jobs = [job(n, r.prompt_tokens, 60, r.block_ids) for n, r in enumerate(trace.requests)]

    happened = play(engine(6_000, REAL), jobs)

    for what in Happened:
        assert sorted(n for _, which, n in happened if which is what) == list(range(len(jobs)))


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for one in chats(BLOCK, num_chats=30, first_blocks=40, blocks_a_turn=8).requests:
            line = {"t": one.arrives_s * 1e3, "in": one.prompt_tokens, "out": one.output_tokens}
            file.write(json.dumps(line | {"hash_ids": one.block_ids, "block": BLOCK}) + "\n")
    return str(path)


def run(*arguments: str) -> list[dict[str, float]]:
    arguments = ("sim", *arguments, "--replicas", "4", "--policy", "cost", "--json")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


def test_routers_follow_its_events(trace_file):
    common = (trace_file, "--replica", "engine", "--routers", "4", "--no-bound")
    (blind,) = run(*common)
    (told,) = run(*common, "--knows", "events", "--tokens-after", "0")

    assert told["hit_rate"] > blind["hit_rate"]


def test_the_bound_is_the_models(trace_file):
    _, quick = run(trace_file)
    _, real = run(trace_file, "--replica", "engine")

    assert quick == real


def test_it_needs_neither_torch_nor_what_the_engine_installs():
    code = (
        "import sys\n"
        "import roost_loadtest.fleet_sim.sweep\n"
        "named = {'torch', 'numpy', 'tokenizers', 'safetensors', 'aiohttp'} & sys.modules.keys()\n"
        "assert not named, named\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
