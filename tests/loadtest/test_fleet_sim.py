"""The fleet simulator as a whole: the real router, several views, and the command."""

from __future__ import annotations

import json
import shlex
from random import Random

import msgspec
import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.events import PROGRESS_EVERY, FleetRun, TellsLoad
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import SimReplica
from roost_loadtest.fleet_sim.routers import LeastWaitRouter, RealRouters
from roost_loadtest.fleet_sim.sweep import BOUND, FleetConfig, sweep
from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_router.policy.cost import CostPolicy
from roost_router.policy.registry import make_policy

BLOCK = 64
TIMES = StepTimes()


def chats(num_chats: int = 12, num_turns: int = 6, seed: int = 0) -> Trace:
    """Conversations side by side: each turn extends the one before it by four blocks."""
    rng, requests = Random(seed), []
    for chat in range(num_chats):
        at = rng.uniform(0.0, 5.0)
        for turn in range(num_turns):
            num_blocks = 20 + 4 * turn
            ids = tuple(1000 * (chat + 1) + place for place in range(num_blocks))
            prompt = num_blocks * BLOCK - rng.randrange(BLOCK)
            requests.append(Request(prompt, rng.randrange(1, 60), ids, at))
            at += rng.expovariate(0.2)
    return Trace("chats", BLOCK, sorted(requests, key=lambda request: request.arrives_s))


def run(trace: Trace, *, num_routers: int = 1, hears_after_s: float = 0.0, seed: int = 0):
    """Four replicas; jobs, replicas and routers after the run."""
    replicas = [SimReplica(TIMES, BlockCache(1000), BLOCK) for _ in range(4)]
    routers = RealRouters(
        CostPolicy,
        num_routers=num_routers,
        reports=[replica.report() for replica in replicas],
        block_tokens=BLOCK,
        seed=seed,
    )
    jobs = FleetRun(trace, replicas, routers, hears_after_s=hears_after_s).run()
    return jobs, replicas, routers


@pytest.mark.parametrize("num_routers", [1, 3])
@pytest.mark.parametrize("hears_after_s", [0.0, 0.5])
def test_every_request_ends_once_and_loads_return_to_zero(num_routers, hears_after_s):
    trace = chats()

    jobs, replicas, routers = run(trace, num_routers=num_routers, hears_after_s=hears_after_s)

    assert sorted(id(job.request) for job in jobs) == sorted(map(id, trace.requests))
    for job in jobs:
        prefill_s = TIMES.prefill_s(job.request.prompt_tokens - job.cached_tokens, 0)
        assert job.arrived_s + prefill_s <= job.first_token_s + 1e-9
        assert job.first_token_s <= job.ended_s
    computed = sum(job.request.prompt_tokens - job.cached_tokens for job in jobs)
    assert sum(replica.computed_tokens for replica in replicas) == computed
    for placer in routers.placers:
        for replica in placer.fleet.replicas:
            assert (replica.queued_tokens, replica.num_in_flight, replica.num_decoding) == (0, 0, 0)
        assert len(placer.index) > 0  # each of the routers had its share


def test_a_router_is_told_what_replicas_cached():
    trace = chats()
    replicas = [SimReplica(TIMES, BlockCache(1000), BLOCK)]
    routers = RealRouters(
        CostPolicy, num_routers=1, reports=[replicas[0].report()], block_tokens=BLOCK, seed=0
    )
    told, placer = [], routers.placers[0]
    placer.learn = lambda placement, prompt, cached: told.append((prompt, cached))

    jobs = FleetRun(trace, replicas, routers).run()

    assert sorted(told) == sorted((j.request.prompt_tokens, j.cached_tokens) for j in jobs)
    assert any(cached for _, cached in told)


@pytest.mark.parametrize(("hears_after_s", "num_running"), [(0.0, 1), (0.6, 0)])
def test_routers_poll_the_load_of_replicas(hears_after_s, num_running):
    """One request from 0.8 s on, one at 1.3 s; between them a poll at 1 s, told at once or late."""
    requests = [Request(1000, 500, (), 0.8), Request(1000, 1, (), 1.3), Request(1000, 1, (), 1.7)]
    replicas = [SimReplica(TIMES, BlockCache(1000), BLOCK)]
    routers = RealRouters(
        CostPolicy, num_routers=1, reports=[replicas[0].report()], block_tokens=BLOCK, seed=0
    )
    seen, offer = [], routers.offer

    def watch(job, now):
        seen.append(routers.placers[0].fleet.replicas[0].report)
        return offer(job, now)

    routers.offer = watch
    FleetRun(Trace("t", BLOCK, requests), replicas, routers, hears_after_s=hears_after_s).run()

    assert [report.num_running for report in seen] == [0, num_running, 1]
    assert seen[2].kv_usage == pytest.approx(24 / 1000)
    assert seen[2].kv_capacity_tokens == 1000 * BLOCK


def test_conversations_come_home():
    jobs, _, _ = run(chats())

    ideal = sum(
        min(len(job.request.block_ids) - 4, 20 + 4 * 5) * BLOCK
        for job in jobs
        if len(job.request.block_ids) > 20
    )
    assert sum(job.cached_tokens for job in jobs) >= 0.9 * ideal


def test_a_trace_of_sessions_waits_for_answers_and_for_the_user():
    requests = [
        Request(1000, 50, (), 0.0, session="a"),
        Request(1000, 50, (), 0.0, session="a", think_s=3.0),
        Request(1000, 50, (), 0.0, session="a", think_s=2.0),
        Request(1000, 50, (), 1.0, session="b"),
    ]

    jobs, _, _ = run(Trace("sessions", BLOCK, requests))

    first, second, third = [job for job in jobs if job.request.session == "a"]
    assert first.arrived_s == 0.0
    assert second.arrived_s == pytest.approx(first.ended_s + 3.0)
    assert third.arrived_s == pytest.approx(second.ended_s + 2.0)
    assert [job.arrived_s for job in jobs if job.request.session == "b"] == [1.0]


def test_a_router_that_hears_late_believes_requests_in_flight():
    """Two arrive one after the other's end; the second is decided while the first still counts."""
    trace = Trace("two", BLOCK, [Request(640, 1, (), 0.0), Request(640, 1, (), 1.0)])

    def queued_at_second(hears_after_s: float) -> int:
        replicas = [SimReplica(TIMES, BlockCache(1000), BLOCK)]
        routers = RealRouters(
            CostPolicy,
            num_routers=1,
            reports=[replicas[0].report()],
            block_tokens=BLOCK,
            seed=0,
        )
        seen = []
        offer = routers.offer

        def watch(job, now):
            seen.append(routers.placers[0].fleet.replicas[0].queued_tokens)
            return offer(job, now)

        routers.offer = watch
        FleetRun(trace, replicas, routers, hears_after_s=hears_after_s).run()
        return seen[1]

    assert queued_at_second(0.0) == 0
    assert queued_at_second(2.0) == 640


def test_the_bound_shares_one_cache_and_lets_others_go_on():
    """Memory that is freed on one replica is room for the request that waits on the other."""
    shared = BlockCache(6)
    replicas = [SimReplica(TIMES, shared, BLOCK) for _ in range(2)]
    prompt = tuple(range(4))
    requests = [Request(4 * BLOCK, 10, prompt, 0.0), Request(4 * BLOCK, 10, (7, 8, 9, 10), 0.001)]
    requests.append(Request(4 * BLOCK, 10, prompt, 5.0))
    router = LeastWaitRouter(replicas, seed=0)

    jobs = FleetRun(Trace("t", BLOCK, requests), replicas, router, shares_cache=True).run()

    assert jobs[0].replica != jobs[1].replica
    assert jobs[1].first_token_s > jobs[0].ended_s  # it waited for the other replica's memory
    assert jobs[2].cached_tokens == BLOCK  # the rest was evicted for the second


def test_what_one_replica_computed_is_a_hit_on_the_other():
    shared = BlockCache(100)
    replicas = [SimReplica(TIMES, shared, BLOCK) for _ in range(2)]
    requests = [Request(400, 10, (1, 2, 3), 0.0), Request(400, 10, (1, 2, 4), 0.001)]
    router = LeastWaitRouter(replicas, seed=0)

    first, second = FleetRun(Trace("t", BLOCK, requests), replicas, router, shares_cache=True).run()

    assert first.replica != second.replica
    assert second.cached_tokens == 2 * BLOCK


def figures(config: FleetConfig, trace: Trace):
    return list(sweep(trace, config, loads=(0.5, 1.2), policies={"cost": CostPolicy}))


def test_a_run_is_a_function_of_its_seed():
    trace = chats(num_chats=40)
    config = FleetConfig(num_replicas=4, num_routers=2, kv_tokens=(20_000,))

    assert figures(config, trace) == figures(config, trace)
    other = FleetConfig(num_replicas=4, num_routers=2, kv_tokens=(20_000,), seed=1)
    assert figures(config, trace) != figures(other, trace)


@pytest.mark.parametrize(
    "view", [{"num_routers": 4}, {"hears_after_s": 1.0}, {"poll_interval_s": 0.1}]
)
def test_what_routers_see_changes_what_they_do(view):
    trace = chats(num_chats=40)
    plain = FleetConfig(num_replicas=4, kv_tokens=(20_000,))

    def rows(config: FleetConfig):
        loads, policies = (1.0,), {"llm-d": lambda: make_policy("llm-d")}
        return list(sweep(trace, config, loads=loads, policies=policies, bound=False))

    assert rows(plain) != rows(msgspec.structs.replace(plain, **view))


def test_routers_that_are_told_queues_of_others_wait_less():
    """One prompt after the other that nobody shares, each through one of four routers."""
    rng, at, requests = Random(5), 0.0, []
    for _ in range(400):
        at += rng.expovariate(4.0)
        requests.append(Request(rng.randrange(200, 12_000), 20, (), at))
    trace = Trace("t", BLOCK, requests)

    def mean_s(tells: TellsLoad, hears_after_s: float = 0.0) -> float:
        config = FleetConfig(
            num_replicas=4, num_routers=4, tells=tells, hears_after_s=hears_after_s
        )
        policies = {"late-binding": lambda: make_policy("late-binding")}
        (row,) = sweep(trace, config, loads=(0.9,), policies=policies, bound=False)
        return row.ttft_mean_s

    assert mean_s(TellsLoad.CHANGES) < 0.9 * mean_s(TellsLoad.REQUESTS)
    assert mean_s(TellsLoad.CHANGES, 0.5) < 0.9 * mean_s(TellsLoad.REQUESTS, 0.5)


def test_load_raises_waiting_and_the_bound_is_ahead():
    trace = chats(num_chats=60)
    rows = figures(FleetConfig(num_replicas=4, kv_tokens=(30_000,)), trace)

    assert [(row.policy, row.load) for row in rows] == [
        ("cost", 0.5),
        (BOUND, 0.5),
        ("cost", 1.2),
        (BOUND, 1.2),
    ]
    calm, calm_bound, busy, busy_bound = rows
    assert calm.ttft_mean_s < busy.ttft_mean_s
    assert busy_bound.hit_rate >= busy.hit_rate
    assert busy_bound.ttft_mean_s <= busy.ttft_mean_s
    assert calm_bound.ttft_mean_s <= calm.ttft_mean_s
    assert calm.ttft_p50_s <= calm.ttft_p90_s <= calm.ttft_p99_s
    assert calm.balance >= 1.0


def test_progress_is_told():
    seen = []
    trace = Trace("t", BLOCK, [Request(64, 1, (), 0.01 * n) for n in range(2 * PROGRESS_EVERY)])

    list(
        sweep(
            trace,
            FleetConfig(num_replicas=2),
            loads=(0.5,),
            policies={},
            on_progress=lambda *told: seen.append(told),
        )
    )

    assert seen == [(BOUND, 0.5, PROGRESS_EVERY), (BOUND, 0.5, 2 * PROGRESS_EVERY)]


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for request in chats().requests:
            line = {
                "t": request.arrives_s * 1e3,
                "in": request.prompt_tokens,
                "out": request.output_tokens,
                "hash_ids": request.block_ids,
                "block": BLOCK,
            }
            file.write(json.dumps(line) + "\n")
    return path


def test_the_command_prints_a_table(trace_file):
    result = CliRunner().invoke(
        main,
        shlex.split(
            f"sim {trace_file} --policy cost --policy round-robin --load 0.5 --load 0.9 "
            "--replicas 3 --routers 2 --stale 0.2"
        ),
    )

    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "chats, load 0.5, 72 requests"
    assert [line.split()[0] for line in lines[2:5]] == ["cost", "round-robin", "shared-cache"]
    assert lines[6] == "chats, load 0.9, 72 requests"


def test_the_command_prints_json(trace_file):
    arguments = ["sim", str(trace_file), "--policy", "cost", "--json", "--no-bound"]
    result = CliRunner().invoke(main, [*arguments, "--limit", "50"])

    row = json.loads(result.output)
    assert (row["trace"], row["policy"], row["requests"], row["load"]) == (
        "chats",
        "cost",
        50,
        0.85,
    )
    assert 0.0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
    assert 0.0 < row["hit_rate"] < 1.0
    assert 0.0 <= row["goodput"] <= 1.0


def test_an_slo_that_nobody_meets(trace_file):
    arguments = ["sim", str(trace_file), "--policy", "cost", "--json", "--no-bound"]
    result = CliRunner().invoke(main, [*arguments, "--slo-ttft", "1e-9"])

    assert json.loads(result.output)["goodput"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--policy", "best"], "best"),
        (["--kv-tokens", "1000"], "raise --kv-tokens"),
        (["--load", "0"], "load"),
    ],
)
def test_what_cannot_be_simulated_is_said(trace_file, arguments, cause):
    result = CliRunner().invoke(main, ["sim", str(trace_file), *arguments])

    assert result.exit_code != 0
    assert cause in result.output
