"""Clients that go away: how soon their work stops, and what is left behind.

promptness   one client at a time leaves in the middle of its stream; counted is the time
             until the engine holds no request and no block of it
leaks        thousands leave at random moments: before a byte, before the first token, in the
             middle; afterwards engines hold no blocks, the router counts nothing in flight,
             and both have the descriptors they began with
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec

from roost_loadtest.fault_answer import Answer, Verdict
from roost_loadtest.fault_client import Client
from roost_loadtest.fault_engines import Engine, Router, body, running, sample_sum
from roost_loadtest.fault_kills_report import spread
from roost_wire import vllm_metrics as names

_LOAD = (names.NUM_REQUESTS_RUNNING, names.NUM_REQUESTS_WAITING, names.KV_CACHE_USAGE)
_SETTLE_S = 20.0
#: Kept connections to replicas and half-closed ones of the last clients.
_SPARE_FDS = 16


class AbortConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench aborts`."""

    model: str = "smollm2"
    replicas: int = 2
    aborts: int = 10_000
    prompt_aborts: int = 200
    concurrency: int = 32
    seed: int = 1


class Held(msgspec.Struct, frozen=True):
    """What processes hold while nobody asks anything."""

    running: float  # requests in engines
    waiting: float
    used_share: float  # of the engines' blocks
    in_flight: int  # by the router's count
    engine_fds: int
    router_fds: int
    engine_mb: float
    router_mb: float


class AbortReport(msgspec.Struct, kw_only=True):
    """What `run_aborts` found."""

    config: AbortConfig
    stop_ms: list[float]  # until slot and blocks are free; inf: not within a second
    aborts: int
    completed: int  # were complete before their client could leave
    failed: int  # neither complete nor left
    before: Held
    after: Held

    def leaks(self) -> list[str]:
        """What is held after all that was not held before."""
        after, before = self.after, self.before
        found = {
            "requests in engines": after.running + after.waiting,
            "share of blocks in use": after.used_share - before.used_share,
            "requests in flight in the router": after.in_flight,
            "descriptors of engines": after.engine_fds - before.engine_fds - _SPARE_FDS,
            "descriptors of the router": after.router_fds - before.router_fds - _SPARE_FDS,
        }
        return [f"{name}: {value:g}" for name, value in found.items() if value > 0]


async def run_aborts(config: AbortConfig, progress: Callable[[str], None]) -> AbortReport:
    """Both parts. PeerError if a process does not start."""
    with tempfile.TemporaryDirectory() as name:
        engines = [Engine(n, config.model, Path(name)) for n in range(config.replicas)]
        async with running(engines):
            router = Router([engine.url for engine in engines], Path(name))
            async with running([router]):
                await router.until_up()
                run = _Run(config, engines, router, await engines[0].model())
                for _ in range(4):
                    await Client(router.port).ask(run.body(8))  # connections and buffers exist
                stop_ms = [await run.promptness(n) for n in range(config.prompt_aborts)]
                progress(f"{len(stop_ms)} left alone")
                before = await run.held()
                counts = await run.flood(progress)
                after = await run.settled()
    return AbortReport(
        config=config,
        stop_ms=stop_ms,
        aborts=counts[Verdict.LEFT],
        completed=counts[Verdict.OK],
        failed=sum(counts.values()) - counts[Verdict.LEFT] - counts[Verdict.OK],
        before=before,
        after=after,
    )


class _Run:
    """Processes and the random numbers that drive them."""

    def __init__(
        self, config: AbortConfig, engines: Sequence[Engine], router: Router, model: str
    ) -> None:
        self._config = config
        self._engines = engines
        self._router = router
        self._model = model
        self._rng = random.Random(config.seed)

    def body(self, tokens: int) -> dict[str, object]:
        """A request with a prompt of its own, so that it finds little in the cache."""
        number = self._rng.getrandbits(60)
        content = f"Story {number} about the number {number}."
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "stream": True,
            "temperature": 0,
        }

    async def promptness(self, number: int) -> float:
        """Milliseconds from a client's close to free slot and blocks; inf after a second."""
        async with aiohttp.ClientSession() as session:
            before = await asyncio.gather(*(_load(session, e) for e in self._engines))
            events = number % 8  # 0: before the first token
            if events:
                ask = Client(self._router.port).ask(
                    self.body(200), leave=lambda answer: len(answer.arrivals) >= events
                )
            else:
                ask = Client(self._router.port).ask(
                    self.body(200), leave_after_s=self._rng.uniform(0.001, 0.02)
                )
            left_at = (await ask).ended_at
            while (asked_at := time.monotonic()) < left_at + 1:
                if await asyncio.gather(*(_load(session, e) for e in self._engines)) == before:
                    return (asked_at - left_at) * 1e3
        return float("inf")

    async def flood(self, progress: Callable[[str], None]) -> dict[Verdict, int]:
        """All aborts, so many at once; verdicts counted."""
        counts = dict.fromkeys(Verdict, 0)

        async def client() -> None:
            while sum(counts.values()) < self._config.aborts:
                outcome = await self._one()
                counts[outcome] += 1
                if sum(counts.values()) % 1000 == 0:
                    progress(f"{sum(counts.values())} clients")

        await asyncio.gather(*(client() for _ in range(self._config.concurrency)))
        return counts

    async def _one(self) -> Verdict:
        client, rng = Client(self._router.port), self._rng
        kind = rng.random()
        if kind < 0.3:  # at once
            outcome = await client.ask(self.body(64), leave_after_s=0.0)
        elif kind < 0.6:  # sometime
            outcome = await client.ask(self.body(64), leave_after_s=rng.expovariate(20))
        else:  # after some text
            events = rng.randrange(1, 6)

            def has_enough(answer: Answer) -> bool:
                return len(answer.arrivals) >= events

            outcome = await client.ask(self.body(64), leave=has_enough)
        return outcome.verdict

    async def settled(self) -> Held:
        """What is held once engines have noticed, or after 20 s."""
        deadline = time.monotonic() + _SETTLE_S
        held = await self.held()
        while (held.running or held.waiting or held.in_flight) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            held = await self.held()
        await asyncio.sleep(0.5)  # sockets close after the last request
        return await self.held()

    async def held(self) -> Held:
        """What is held now."""
        fleet = json.loads(await body(f"{self._router.admin}/fleet"))
        engines = self._engines
        async with aiohttp.ClientSession() as session:
            loads = [await _load(session, engine) for engine in engines]
        running, waiting, used_share = (sum(column) for column in zip(*loads, strict=True))
        return Held(
            running=running,
            waiting=waiting,
            used_share=used_share,
            in_flight=fleet["totals"]["in_flight"],
            engine_fds=sum(engine.num_fds() for engine in engines),
            router_fds=self._router.num_fds(),
            engine_mb=sum(engine.rss_mb() for engine in engines),
            router_mb=self._router.rss_mb(),
        )


async def _load(session: aiohttp.ClientSession, engine: Engine) -> tuple[float, ...]:
    """Requests running and waiting, share of blocks in use."""
    async with session.get(f"{engine.url}/metrics") as answer:
        page = await answer.text()
    return tuple(sample_sum(page, name) for name in _LOAD)


def abort_lines(report: AbortReport) -> list[str]:
    """The report as lines for a terminal."""
    before, after = report.before, report.after
    late = sum(value == float("inf") for value in report.stop_ms)
    held = {
        "descriptors of engines": (before.engine_fds, after.engine_fds),
        "descriptors of the router": (before.router_fds, after.router_fds),
        "MiB of engines": (before.engine_mb, after.engine_mb),
        "MiB of the router": (before.router_mb, after.router_mb),
    }
    return [
        f"client gone to slot and blocks free: {spread(report.stop_ms)}, over 1 s: {late}",
        f"{report.aborts} aborts, {report.completed} complete before, {report.failed} failed",
        *(f"{name}: {first:.0f}, afterwards {last:.0f}" for name, (first, last) in held.items()),
        f"leaks: {'; '.join(report.leaks()) or 'none'}",
    ]
