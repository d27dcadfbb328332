"""Streams killed at random places of real engines' answers: is the text what it would have been?

Two parts. *Cuts* go through fault proxies (fault_proxy.py), by the thousand: the engine lives on,
its stream ends like a dead one's. *Process kills* are SIGKILLs of engines that are then started
again. Either way every client must get, byte for byte, what an undisturbed engine says.

Measured: the longest gap in a killed stream, and of it the share of the router (from the kill to
the next leg's arrival) and of the engine (from there to its first event: waiting and prefill).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client, Outcome
from roost_loadtest.fault_engines import Engine, Router, running
from roost_loadtest.fault_proxy import FAULT_ID, FaultProxy, Kill, KillKind, Plans
from roost_loadtest.fault_workload import VARIANTS, Job, make_jobs

_WEIGHTS = {
    KillKind.RST: 40,
    KillKind.FIN: 25,
    KillKind.TORN: 15,
    KillKind.EOF: 17,
    KillKind.HANG: 3,  # each costs the watchdog's patience
}
_TWICE = 0.1  # of the killed streams are killed again after resuming
_SPARED = 0.1  # of the streams are not killed at all


class KillConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench kills`."""

    model: str = "smollm2"
    kills: int = 1000
    process_kills: int = 30
    replicas: int = 2
    prompts: int = 8
    tokens: int = 32  # of an answer
    concurrency: int = 6
    seed: int = 1
    patience_s: float = 15.0
    variants: tuple[str, ...] = VARIANTS


class Killed(msgspec.Struct, frozen=True):
    """A stream that was killed at least once, or should have been."""

    variant: str
    kinds: list[str]
    after_events: list[int]
    verdict: str
    detail: str
    gap_ms: float
    router_ms: float | None  # of the first kill; None: it was never resumed
    engine_ms: float | None


class KillReport(msgspec.Struct, kw_only=True):
    """What `run_kills` found."""

    config: KillConfig
    num_streams: int = 0
    num_undisturbed: int = 0
    undisturbed_gaps_ms: list[float] = []
    killed: list[Killed] = []
    process_kills: int = 0
    restart_s: list[float] = []
    hit_by_process_kills: list[Killed] = []
    lost: dict[str, int] = {}
    examples: list[str] = []

    @property
    def num_kills(self) -> int:
        """Cuts that came to pass."""
        return sum(len(stream.kinds) for stream in self.killed)


async def run_kills(config: KillConfig, progress: Callable[[str], None]) -> KillReport:
    """Both parts. PeerError if engines or router do not start."""
    report = KillReport(config=config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines = [Engine(n, config.model, folder) for n in range(config.replicas)]
        async with running(engines):
            jobs = await make_jobs(
                [engine.port for engine in engines],
                await engines[0].model(),
                prompts=config.prompts,
                tokens=config.tokens,
                seed=config.seed,
                variants=config.variants,
            )
            progress(f"{len(jobs)} reference answers, equal on {len(engines)} engines")
            run = _Run(config, engines, jobs, report, folder, progress)
            if config.kills:
                await _cuts(run)
            if config.process_kills:
                await _process_kills(run)
    return report


class _Run(NamedTuple):
    """What both parts work with."""

    config: KillConfig
    engines: Sequence[Engine]
    jobs: Sequence[Job]
    report: KillReport
    folder: Path
    progress: Callable[[str], None]


async def _cuts(run: _Run) -> None:
    config, engines, jobs, report, folder, progress = run
    plans, rng = Plans(), random.Random(config.seed)
    async with contextlib.AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(FaultProxy(n, engine.port, plans))
            for n, engine in enumerate(engines)
        ]
        router = Router([proxy.url for proxy in proxies], folder)
        await stack.enter_async_context(running([router]))
        await router.until_up()
        # Positions that a stream does not reach make no kill: more streams than kills.
        limit = config.kills * 3

        async def client() -> None:
            while report.num_kills < config.kills and report.num_streams < limit:
                report.num_streams += 1
                number = report.num_streams
                job, kills = rng.choice(jobs), []
                if rng.random() >= _SPARED:
                    kills = [_draw(rng, job)]
                    if rng.random() < _TWICE:
                        kills.append(_draw(rng, job))
                request_id = f"k{number}"
                plans.add(request_id, kills)
                outcome = await Client(router.port).ask(
                    job.body,
                    job.expected,
                    patience_s=config.patience_s,
                    headers={FAULT_ID: request_id},
                )
                _note(report, job, outcome, plans, request_id)
                if number % 100 == 0:
                    progress(f"{number} streams, {report.num_kills} kills, lost {report.lost}")

        await asyncio.gather(*(client() for _ in range(config.concurrency)))


def _draw(rng: random.Random, job: Job) -> Kill:
    kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    return Kill(kind, rng.randrange(job.num_events))


def _note(report: KillReport, job: Job, outcome: Outcome, plans: Plans, request_id: str) -> None:
    legs = plans.legs.get(request_id, [])
    cut = [leg for leg in legs if leg.killed is not None]
    if outcome.verdict is not Verdict.OK:
        _note_lost(report, f"{job.variant} {[leg.killed for leg in cut]}", outcome)
    if not cut:
        report.num_undisturbed += 1
        report.undisturbed_gaps_ms.append(outcome.gap_s * 1e3)
        return
    router_ms = engine_ms = None
    first = legs.index(cut[0])
    if first + 1 < len(legs) and cut[0].killed_at is not None:
        follower = legs[first + 1]
        router_ms = (follower.started_at - cut[0].killed_at) * 1e3
        if follower.first_event_at is not None:
            engine_ms = (follower.first_event_at - follower.started_at) * 1e3
    report.killed.append(
        Killed(
            variant=job.variant,
            kinds=[leg.killed.kind.value for leg in cut if leg.killed],
            after_events=[leg.killed.after_events for leg in cut if leg.killed],
            verdict=outcome.verdict.value,
            detail=outcome.detail,
            gap_ms=outcome.gap_s * 1e3,
            router_ms=router_ms,
            engine_ms=engine_ms,
        )
    )


def _note_lost(report: KillReport, what: str, outcome: Outcome) -> None:
    name = outcome.verdict.value
    report.lost[name] = report.lost.get(name, 0) + 1
    if len(report.examples) < 10:
        report.examples.append(f"{what}: {name} {outcome.detail}")


async def _process_kills(run: _Run) -> None:
    """Keep clients streaming; kill an engine, let it come back, kill another."""
    config, engines, jobs, report, folder, progress = run
    rng, is_over = random.Random(config.seed), False
    killed_at: list[tuple[float, str]] = []  # when, and the router's name of the engine
    outcomes: list[tuple[Job, Outcome]] = []
    router = Router([engine.url for engine in engines], folder)
    async with running([router]):
        await router.until_up()

        async def client() -> None:
            while not is_over:
                job = rng.choice(jobs)
                outcome = await Client(router.port).ask(
                    job.body, job.expected, patience_s=config.patience_s
                )
                outcomes.append((job, outcome))
                if outcome.verdict is not Verdict.OK:
                    _note_lost(report, f"{job.variant} (process killed)", outcome)

        clients = [asyncio.create_task(client()) for _ in range(config.concurrency)]
        try:
            for number in range(config.process_kills):
                await asyncio.sleep(rng.uniform(0.2, 0.8))
                victim = rng.randrange(len(engines))
                killed_at.append((time.monotonic(), f"r{victim}"))
                await engines[victim].kill()
                report.process_kills += 1
                report.restart_s.append(await engines[victim].start())
                await router.until_up()
                if number % 5 == 4:
                    progress(f"{number + 1} engines killed, lost {report.lost}")
        finally:
            is_over = True
            await asyncio.gather(*clients)
    for job, outcome in outcomes:
        at = [
            sum(arrival < moment for arrival in outcome.arrivals)
            for moment, name in killed_at
            if outcome.sent_at < moment < outcome.ended_at
            and outcome.headers.get("x-roost-replica") == name
        ]
        if at:
            report.hit_by_process_kills.append(
                Killed(
                    variant=job.variant,
                    kinds=["sigkill"] * len(at),
                    after_events=at,
                    verdict=outcome.verdict.value,
                    detail=outcome.detail,
                    gap_ms=outcome.gap_s * 1e3,
                    router_ms=None,
                    engine_ms=None,
                )
            )
    report.num_streams += len(outcomes)
