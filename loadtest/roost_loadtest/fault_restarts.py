"""Rolling restarts of the router under load: does any client notice?

Three kinds of clients at once: on kept connections, on a new connection for each request, and
with streams that are longer than a restart takes. Every answer is judged (fault_answer.py).
"Notice" is a refused or reset connection, a cut stream, an error status, wrong text.

Two ways to restart:

    reload    SIGHUP to a router with --processes: its supervisor keeps the listening sockets and
              changes the process behind them
    replace   SIGTERM, wait for the end, start again: what a router without sockets to hand on
              can do, for comparison
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client, Outcome
from roost_loadtest.fault_engines import Router, running, until
from roost_loadtest.fault_replica import FaultyReplica
from roost_loadtest.fault_words import expected, request_body
from roost_loadtest.peers import PeerError

Way = Literal["reload", "replace"]

_RELOAD_S = 30.0
_PATIENCE_S = 20.0


class _Load(msgspec.Struct, frozen=True):
    """What clients of one kind do."""

    kind: str
    tokens: int
    keep: bool


class RestartConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench restarts`."""

    restarts: int = 20
    way: Way = "reload"
    kept: int = 8  # clients on kept connections
    fresh: int = 8  # clients with a new connection for each request
    long: int = 4  # clients with long streams
    tokens: int = 8
    long_tokens: int = 400  # 2 s at the replica's pace
    pause_s: float = 0.5  # between restarts


class Tally(msgspec.Struct):
    """Requests of one kind of client."""

    delivered: int = 0
    lost: dict[str, int] = {}
    examples: list[str] = []
    connections: int = 0
    slowest_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.slowest_s = max(self.slowest_s, outcome.ended_at - outcome.sent_at)
        if outcome.verdict is Verdict.OK:
            self.delivered += 1
            return
        name = outcome.verdict.value
        self.lost[name] = self.lost.get(name, 0) + 1
        if len(self.examples) < 3:
            self.examples.append(f"{name}: {outcome.status} {outcome.detail}")


class RestartReport(msgspec.Struct, kw_only=True):
    """What `run_restarts` found."""

    config: RestartConfig
    restart_s: list[float]
    tallies: dict[str, Tally]

    @property
    def num_lost(self) -> int:
        """Over all kinds of clients."""
        return sum(sum(tally.lost.values()) for tally in self.tallies.values())


async def run_restarts(config: RestartConfig, progress: Callable[[str], None]) -> RestartReport:
    """Load on, restart so many times, load off. PeerError if a restart does not end."""
    restart_s: list[float] = []
    tallies = {"kept": Tally(), "new": Tally(), "long": Tally()}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = []
        for _ in range(2):
            replica = await FaultyReplica("roost", first_s=0.005, pace_s=0.005).start()
            stack.push_async_callback(replica.stop)
            replicas.append(replica)
        options = ["--processes", "1"] if config.way == "reload" else []
        router = Router([replica.url for replica in replicas], folder, options)
        await stack.enter_async_context(running([router]))
        await router.until_up()
        is_over = asyncio.Event()
        kinds = (
            (config.kept, _Load("kept", config.tokens, keep=True)),
            (config.fresh, _Load("new", config.tokens, keep=False)),
            (config.long, _Load("long", config.long_tokens, keep=True)),
        )
        tasks = [
            asyncio.create_task(_client(router.port, load, number, tallies[load.kind], is_over))
            for count, load in kinds
            for number in range(count)
        ]
        try:
            for number in range(config.restarts):
                await asyncio.sleep(config.pause_s)
                restart_s.append(await _restart(router, config.way))
                lost = {kind: tally.lost for kind, tally in tallies.items() if tally.lost}
                progress(f"restart {number + 1} took {restart_s[-1]:.2f} s, lost {lost or 'none'}")
            await asyncio.sleep(config.pause_s)
        finally:
            is_over.set()
            await asyncio.gather(*tasks)
    return RestartReport(config=config, restart_s=restart_s, tallies=tallies)


async def _client(
    port: int, load: _Load, number: int, tally: Tally, is_over: asyncio.Event
) -> None:
    client, count = Client(port), 0
    while not is_over.is_set():
        count += 1
        prompt = f"{load.kind} client {number} asks {count}"
        outcome = await client.ask(
            request_body(prompt, load.tokens),
            expected(prompt, load.tokens, exact_usage=True),
            patience_s=_PATIENCE_S,
            keep=load.keep,
        )
        tally.add(outcome)
        if outcome.verdict is not Verdict.OK:
            await asyncio.sleep(0.05)  # or a refused connection would be asked for without end
    tally.connections += client.num_connections
    await client.close()


async def _restart(router: Router, way: Way) -> float:
    """Seconds that one restart took, until only new processes serve."""
    started = time.monotonic()
    if way == "replace":
        await router.stop()
        await router.start()
        return time.monotonic() - started
    old = set(router.pids()) - {router.pid}
    router.send(signal.SIGHUP)

    def is_renewed() -> bool:
        workers = set(router.pids()) - {router.pid}
        return bool(workers) and not workers & old

    if not await until(is_renewed, _RELOAD_S):
        raise PeerError(f"the router has not changed its processes {_RELOAD_S:.0f} s after SIGHUP")
    await router.until_up()
    return time.monotonic() - started


def restart_lines(report: RestartReport) -> list[str]:
    """The report as lines for a terminal."""
    took = report.restart_s
    lines = [
        f"{len(took)} restarts ({report.config.way}), {min(took):.2f} to {max(took):.2f} s each"
    ]
    for kind, tally in report.tallies.items():
        lost = ", ".join(f"{count} {name}" for name, count in Counter(tally.lost).most_common())
        lines.append(
            f"{kind:<5} {tally.delivered} delivered over {tally.connections} connections, "
            f"lost: {lost or 'none'}, slowest {tally.slowest_s:.2f} s"
        )
        lines += [f"  {example}" for example in tally.examples]
    return lines
