"""What clients notice when a replica dies or stops in the middle of their work.

    kill   8 clients ask 100 times each; half way an engine gets SIGKILL and does not come back
    stop   64 streams over four replicas; in the middle one gets SIGSTOP: alive, silent, its
           connections open; SIGCONT comes when all is over

Every answer is compared with the undisturbed one.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client, Outcome, at_once
from roost_loadtest.fault_engines import Engine, Router, running, until
from roost_loadtest.fault_kills_report import spread
from roost_loadtest.fault_workload import Job, make_jobs

_MIDDLE_S = 30.0  # the longest wait for the middle of a load


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench fleet`."""

    model: str = "smollm2"
    clients: int = 8
    requests: int = 100  # of each client
    replicas: int = 2  # where one is killed
    streams: int = 64
    stopped_of: int = 4  # replicas where one is stopped
    tokens: int = 16
    stream_tokens: int = 48
    prompts: int = 8
    seed: int = 1
    patience_s: float = 60.0


class FleetReport(msgspec.Struct, kw_only=True):
    """One of the two."""

    title: str
    requests: int
    delivered: int
    lost: dict[str, int]
    examples: list[str]
    hit: int  # requests that were on the replica when it failed
    first_success_ms: float  # from the fault to the next answer that was completed
    first_hit_success_ms: float | None  # of a request that was on the failed replica
    hit_gaps_ms: list[float]  # longest gap of those requests
    other_gaps_ms: list[float]  # of the others


async def run_kill(config: FleetConfig, progress: Callable[[str], None]) -> FleetReport:
    """SIGKILL under clients that ask one request after the other."""
    total = config.clients * config.requests
    done: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        engines = [Engine(n, config.model, Path(name)) for n in range(config.replicas)]
        async with running(engines):
            jobs = await _jobs(engines, config, config.tokens)
            router = Router([engine.url for engine in engines], Path(name))
            async with running([router]):
                await router.until_up()
                rng = random.Random(config.seed)

                async def client() -> None:
                    connection = Client(router.port)
                    for _ in range(config.requests):
                        outcome = await _ask(connection, rng.choice(jobs), config, keep=True)
                        done.append(outcome)
                    await connection.close()

                clients = [asyncio.create_task(client()) for _ in range(config.clients)]
                await until(lambda: len(done) >= total // 2, float("inf"))
                progress(f"SIGKILL after {len(done)} of {total} answers")
                fault_at = time.monotonic()
                await engines[0].kill()
                await asyncio.gather(*clients)
    return _report(f"SIGKILL of 1 of {config.replicas} engines", done, fault_at, "r0")


async def run_stop(config: FleetConfig, progress: Callable[[str], None]) -> FleetReport:
    """SIGSTOP under streams that all began before it."""
    with tempfile.TemporaryDirectory() as name:
        engines = [Engine(n, config.model, Path(name)) for n in range(config.stopped_of)]
        async with running(engines):
            jobs = await _jobs(engines[:2], config, config.stream_tokens)
            router = Router([engine.url for engine in engines], Path(name))
            async with running([router]):
                await router.until_up()
                started: set[int] = set()

                def begun(number: int, _: object) -> bool:
                    started.add(number)
                    return False

                calls = [
                    partial(
                        _ask,
                        Client(router.port),
                        jobs[number % len(jobs)],
                        config,
                        leave=partial(begun, number),
                    )
                    for number in range(config.streams)
                ]
                streams = asyncio.ensure_future(at_once(calls, config.streams))
                await until(lambda: len(started) == config.streams, _MIDDLE_S)
                progress(f"SIGSTOP while {len(started)} streams run")
                fault_at = time.monotonic()
                engines[0].send_all(signal.SIGSTOP)
                try:
                    done = await streams
                finally:
                    engines[0].send_all(signal.SIGCONT)
                await router.until_up()  # it is taken back
    return _report(f"SIGSTOP of 1 of {config.stopped_of} engines", done, fault_at, "r0")


async def _jobs(engines: Sequence[Engine], config: FleetConfig, tokens: int) -> list[Job]:
    return await make_jobs(
        [engine.port for engine in engines],
        await engines[0].model(),
        prompts=config.prompts,
        tokens=tokens,
        seed=config.seed,
        variants=("greedy", "seeded"),
    )


async def _ask(
    client: Client,
    job: Job,
    config: FleetConfig,
    *,
    keep: bool = False,
    leave: Callable[[object], bool] | None = None,
) -> Outcome:
    return await client.ask(
        job.body, job.expected, patience_s=config.patience_s, keep=keep, leave=leave
    )


def _report(title: str, done: Sequence[Outcome], fault_at: float, replica: str) -> FleetReport:
    """`replica`: the router's name of the one that failed."""
    bad = [outcome for outcome in done if outcome.verdict is not Verdict.OK]
    good = [outcome for outcome in done if outcome.verdict is Verdict.OK]
    # The head was sent by the first replica, so it names it even after a move.
    during = [outcome for outcome in done if outcome.sent_at < fault_at < outcome.ended_at]
    hit = [outcome for outcome in during if outcome.headers.get("x-roost-replica") == replica]
    after = [outcome.ended_at - fault_at for outcome in good if outcome.ended_at > fault_at]
    after_hit = [o.ended_at - fault_at for o in hit if o.verdict is Verdict.OK]
    return FleetReport(
        title=title,
        requests=len(done),
        delivered=len(good),
        lost=dict(Counter(outcome.verdict.value for outcome in bad)),
        examples=sorted({outcome.detail for outcome in bad})[:5],
        hit=len(hit),
        first_success_ms=min(after, default=float("inf")) * 1e3,
        first_hit_success_ms=min(after_hit) * 1e3 if after_hit else None,
        hit_gaps_ms=[outcome.gap_s * 1e3 for outcome in hit],
        other_gaps_ms=[outcome.gap_s * 1e3 for outcome in during if outcome not in hit],
    )


def fleet_lines(report: FleetReport) -> list[str]:
    """The report as lines for a terminal."""
    lost = ", ".join(f"{count} {kind}" for kind, count in report.lost.items()) or "none"
    lines = [
        f"{report.title}: {report.delivered}/{report.requests} delivered, lost: {lost}",
        *(f"  {example}" for example in report.examples),
        f"  first success {report.first_success_ms:.0f} ms after the fault",
        f"  requests on the failed replica: {report.hit}",
    ]
    if report.first_hit_success_ms is not None:
        lines.append(f"  first of them complete after {report.first_hit_success_ms:.0f} ms")
    for name, gaps in (("their", report.hit_gaps_ms), ("other", report.other_gaps_ms)):
        if gaps:
            lines.append(f"  {name} longest gaps: {spread(gaps)}")
    return lines
