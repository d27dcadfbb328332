"""Unlike replicas in the fleet simulator: speeds, memories, and fits that begin wrong."""

from __future__ import annotations

import json
from random import Random

import msgspec
import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.events import FleetRun
from roost_loadtest.fleet_sim.load import TooLargeError
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import Job, SimReplica
from roost_loadtest.fleet_sim.routers import LeastWaitRouter, RealRouters
from roost_loadtest.fleet_sim.sweep import FleetConfig, sweep
from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_router.policy.cost import CostPolicy
from roost_router.policy.registry import make_policy

BLOCK = 64
TIMES = StepTimes()


def singles(num_requests: int = 400) -> Trace:
    """Prompts that share nothing, one after the other at random."""
    rng, requests, at = Random(0), [], 0.0
    for number in range(num_requests):
        ids = tuple(100 * number + place for place in range(rng.randrange(10, 60)))
        requests.append(Request(len(ids) * BLOCK, rng.randrange(1, 40), ids, at))
        at += rng.expovariate(10.0)
    return Trace("singles", BLOCK, requests)


def row(config: FleetConfig, load: float = 0.8, policy: str = "cost"):
    (found,) = sweep(
        singles(),
        config,
        loads=(load,),
        policies={policy: lambda: make_policy(policy)},
        bound=False,
    )
    return found


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_a_replica_of_another_speed_does_the_same_in_another_time(speed):
    def ended(times: StepTimes) -> tuple[float, float]:
        replica = SimReplica(times, BlockCache(1000), BLOCK)
        job = Job(0, Request(5_000, 100, (), 0.0), 80, 0.0)
        replica.submit(job, 0.0)
        while replica.ends_s is not None:
            replica.step(replica.ends_s)
        return job.first_token_s, job.ended_s

    first_s, end_s = ended(TIMES)

    assert ended(TIMES.at_speed(speed)) == pytest.approx((first_s / speed, end_s / speed))


def test_values_go_round():
    config = FleetConfig(num_replicas=5, speeds=(1.0, 2.0), kv_tokens=(1, 2, 3))

    assert config.of_each(config.speeds) == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert config.of_each(config.kv_tokens) == [1, 2, 3, 1, 2]
    assert config.of_each(config.misfits) == []
    assert FleetConfig(num_replicas=2).of_each((7, 8, 9)) == [7, 8]


def test_load_is_of_the_whole_fleet():
    """A fleet that is twice as fast gets the same load in half the time, and is as busy."""
    plain = row(FleetConfig(num_replicas=4))
    fast = row(FleetConfig(num_replicas=4, speeds=(2.0,)))

    assert fast.virtual_s == pytest.approx(plain.virtual_s / 2, rel=0.05)
    assert fast.busy == pytest.approx(plain.busy, rel=0.1)


@pytest.mark.parametrize("policy", ["cost", "late-binding", "llm-d"])
def test_faster_replicas_get_more_of_the_work(policy):
    """Four replicas of which two are four times as fast: they compute most of the tokens."""
    mixed = row(FleetConfig(num_replicas=4, speeds=(1.0, 4.0)), load=0.9, policy=policy)

    assert mixed.balance > 1.2  # the most computed by one, by the mean


def test_the_bound_knows_speeds_and_its_own_prefill():
    """An idle fast replica before an idle slow one."""
    shared = BlockCache(1000)
    replicas = [SimReplica(TIMES.at_speed(speed), shared, BLOCK) for speed in (1.0, 3.0, 0.5)]
    requests = [Request(3_000, 1, (), 10.0 * number) for number in range(5)]

    jobs = FleetRun(
        Trace("t", BLOCK, requests), replicas, LeastWaitRouter(replicas, 0), shares_cache=True
    ).run()

    assert [job.replica for job in jobs] == [1] * 5


def test_requests_must_fit_the_smallest_memory():
    config = FleetConfig(num_replicas=3, kv_tokens=(100_000, 60 * BLOCK - 1))

    with pytest.raises(TooLargeError, match="has 59"):
        row(config)
    assert row(msgspec.structs.replace(config, num_replicas=1)).requests == 400


@pytest.mark.parametrize("num_fitted", [0, 1, 2])
def test_routers_begin_with_the_fits_that_they_are_given(num_fitted):
    """Memories differ, so that each replica has its own fit."""
    replicas = [SimReplica(TIMES, BlockCache(size), BLOCK) for size in (1000, 1100)]
    fits = [10_000.0, 40_000.0][:num_fitted]

    routers = RealRouters(
        CostPolicy,
        num_routers=2,
        reports=[replica.report() for replica in replicas],
        block_tokens=BLOCK,
        seed=0,
        first_fits=fits,
    )

    for placer in routers.placers:
        speeds = [replica.speed for replica in placer.fleet.replicas]
        assert [bool(speed.num_observed) for speed in speeds] == [n < num_fitted for n in range(2)]
        for speed, fit in zip(speeds, fits, strict=False):
            assert speed.prefill_tokens_per_s == pytest.approx(fit, rel=0.02)


def test_misfits_are_of_each_replicas_own_speed():
    """What a router believes at first: 0.5 · 2 and 1.5 · 1 times what `times` say."""
    seen = []

    class Watching(CostPolicy):
        def pick(self, candidates, rng):
            if not seen:
                seen.extend(one.prefill_tokens_per_s * TIMES.token_s for one in candidates)
            return super().pick(candidates, rng)

    config = FleetConfig(
        num_replicas=2, speeds=(2.0, 1.0), misfits=(0.5, 1.5), kv_tokens=(500_000, 400_000)
    )
    list(sweep(singles(50), config, loads=(0.5,), policies={"w": Watching}, bound=False))

    assert seen == pytest.approx([1.0, 1.5], rel=0.02)


def run(*arguments: str):
    return CliRunner().invoke(main, ["sim", *arguments, "--policy", "cost", "--json", "--no-bound"])


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "singles.jsonl"
    with path.open("w") as file:
        for one in singles(100).requests:
            line = {"t": one.arrives_s * 1e3, "in": one.prompt_tokens, "out": one.output_tokens}
            file.write(json.dumps(line | {"hash_ids": one.block_ids, "block": BLOCK}) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "unlike",
    [("--speeds", "1,0.5"), ("--kv-tokens", "20000,4000"), ("--misfits", "0.1,3")],
)
def test_the_command_takes_values_in_turn(trace_file, unlike):
    plain, mixed = run(trace_file), run(trace_file, *unlike)

    assert mixed.exit_code == 0, mixed.output
    assert json.loads(plain.output) != json.loads(mixed.output)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--speeds", "1,0"), "0.0 is not in the range x>0"),
        (("--speeds", "1,,2"), "'' is not a valid float range"),
        (("--misfits", "fast"), "'fast' is not a valid float range"),
        (("--kv-tokens", "1000,0"), "0 is not in the range x>=1"),
    ],
)
def test_values_that_cannot_be_are_refused(trace_file, arguments, cause):
    result = run(trace_file, *arguments)

    assert result.exit_code != 0
    assert cause in result.output
