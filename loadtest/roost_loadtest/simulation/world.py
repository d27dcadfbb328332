"""One run: build a world for a scenario, let it happen, and find what is wrong with it.

What must hold after every run, whatever went wrong in it:

    every request has one outcome, in time, and one that the scenario allows
    what clients got is right (judge.py)
    no replica was asked what a correct router does not ask
    no more legs than attempts and resumes allow; none for a client that has left
    no replica gets a request while it is no member of the fleet, or drains
    loads, exchanges, connections, tasks and timers of the router: all gone at the end; and all that
    is kept for replicas that have left
    the router's write buffers stayed bounded
    nothing unexpected was logged or reached the event loop

Not here: scenarios (families.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from math import inf
from random import Random
from typing import Any, cast

import msgspec

from roost_loadtest.simulation.client import Call, Manner, SimClient
from roost_loadtest.simulation.faults import NO_FAULT, Fault
from roost_loadtest.simulation.judge import Ask, Outcome
from roost_loadtest.simulation.loop import StuckError, VirtualLoop
from roost_loadtest.simulation.network import Conditions, Network
from roost_loadtest.simulation.replica import MODEL, Body, Leg, Pace, SimReplica, Style
from roost_router.app import build_placer
from roost_router.config import RouterConfig
from roost_router.http.service import DataService
from roost_router.metrics import RouterMetrics
from roost_wire.load_report import LoadReport

MAX_STEPS = 400_000
MAX_TIME_S = 3600.0
#: How long after the last answer everything must have come to rest.
_SETTLE_S = 15.0
_DRAIN_S = 8.0
#: What a client's leaving may take to reach a replica, besides the network's latency.
_ABORT_S = 0.05
#: How late a deadline may be noticed, the way there and back included.
_LATE_S = 0.5
#: A head and the longest event of a stream: what a buffer may hold beyond its marks and what was
#: under way.
_EVENT_BYTES = 2048


def _no_fault(body: Body, now: float) -> Fault:  # noqa: ARG001
    return NO_FAULT


#: How long a request may be on its way to a replica: it dials, or waits before it tries again.
_ON_ITS_WAY_S = 0.2


class Move(Enum):
    """What becomes of a replica's membership."""

    JOIN = "joins"
    LEAVE = "leaves"
    DRAIN = "drains"
    RETURN = "drains no more"


class ReplicaPlan(msgspec.Struct, kw_only=True):
    """A replica of a scenario."""

    style: Style = Style()
    pace: Pace = Pace()
    next_fault: Callable[[Body, float], Fault] = _no_fault
    listens: bool = True
    #: Faults of the whole host: when, and what.
    strikes: list[tuple[float, Fault]] = []
    #: Whether the fleet has it: when that changes, in order, and how. At first it is a member.
    moves: list[tuple[float, Move]] = []


class ClientPlan(msgspec.Struct, kw_only=True):
    """A client of a scenario."""

    asks: list[Ask]
    manner: Manner = Manner()


class Scenario(msgspec.Struct, kw_only=True):
    """What is to happen."""

    replicas: list[ReplicaPlan]
    clients: list[ClientPlan]
    conditions: Conditions = Conditions()
    config: dict[str, Any] = {}
    #: Whether polls see what is wrong with a replica; else they always say that it is well.
    polls_see: bool = False
    drains_at: float | None = None
    #: How a request may end if its client does not leave.
    allowed: frozenset[Outcome] = frozenset({Outcome.OK})
    #: The same for answers that are not streamed: they show no progress, so a replica that never
    #: answers is noticed only when the client's own time is over.
    allowed_whole: frozenset[Outcome] | None = None
    max_wait_s: float = 60.0
    #: Whether every usage must be there and exact (judge.py).
    is_counted: bool = True
    #: Nothing is wrong, so each request has one leg.
    is_sound: bool = False
    #: Every replica fails, so the retry budget bounds the legs.
    is_storm: bool = False
    #: The first replica always fails: it must be left alone soon.
    most_legs_of_first: int | None = None
    #: It is well again from here on, and must be used again before the end.
    first_is_back_at: float | None = None


class Result(msgspec.Struct, kw_only=True):
    """What came of a run."""

    findings: list[str]
    calls: list[Call]
    num_legs: int
    num_resumed: int
    log: list[tuple[Any, ...]]

    def rendered_log(self) -> list[str]:
        """Lines: seconds, who, what."""
        return [
            f"{at:10.6f} {who:8} {' '.join(str(word) for word in words)}"
            for at, who, *words in self.log
        ]


class World:
    """All that takes part in one run."""

    def __init__(self, scenario: Scenario, rng: Random) -> None:
        self._scenario = scenario
        self.loop = VirtualLoop(  # type: ignore[abstract]  # what the router does not use is not there
            rng, max_steps=MAX_STEPS, max_time_s=MAX_TIME_S
        )
        self.network = Network(self.loop, rng, scenario.conditions)
        self.log: list[tuple[Any, ...]] = []
        self.ledger: dict[int, list[Leg]] = {}
        self.findings: list[str] = []
        self._away: dict[str, list[tuple[float, float]]] = {}  # by replica: from when to when
        self._rng = rng
        self.replicas = [
            self._replica(f"r{number}", plan) for number, plan in enumerate(scenario.replicas)
        ]
        self.clients = [
            SimClient(
                self.network,
                rng,
                f"c{number}",
                plan.asks,
                plan.manner,
                ledger=self.ledger,
                log=self.note,
                is_counted=scenario.is_counted,
            )
            for number, plan in enumerate(scenario.clients)
        ]

    def note(self, *words: object) -> None:
        """Write into the log."""
        self.log.append((self.loop.time(), *words))

    def run(self) -> Result:
        """Let it happen."""
        with _collected_errors(self.findings), _seeded_urandom(self._rng):
            try:
                self.loop.run(self._main())
            except StuckError as error:
                self.findings.append(str(error))
            except Exception as error:  # noqa: BLE001  whatever the router raised at its owner
                self.findings.append(f"the run ended with {error!r}")
        self._check_calls()
        calls = [call for client in self.clients for call in client.calls]
        legs = [leg for legs in self.ledger.values() for leg in legs]
        self.findings += self.loop.unhandled
        for client in self.clients:
            self.findings += [f"{client.name}: {text}" for text in client.faults]
        for replica in self.replicas:
            self.findings += [f"{replica.name}: {text}" for text in replica.complaints]
        return Result(
            findings=self.findings,
            calls=calls,
            num_legs=len(legs),
            num_resumed=sum(leg.resumed_from > 0 for leg in legs),
            log=self.log,
        )

    def _replica(self, name: str, plan: ReplicaPlan) -> SimReplica:
        replica = SimReplica(
            self.network.add_host(name),
            self.loop,
            self._rng,
            style=plan.style,
            pace=plan.pace,
            next_fault=plan.next_fault,
            ledger=self.ledger,
            log=self.note,
        )
        if not plan.listens:
            replica.host.listener = None
        for at, fault in plan.strikes:
            self.loop.at(at, replica.strike, fault)
        return replica

    async def _main(self) -> None:
        scenario = self._scenario
        urls = tuple(_url(replica) for replica in self.replicas)
        config = RouterConfig(replicas=urls, **scenario.config)
        placer = build_placer(config, self._rng)
        service = DataService(config, placer, RouterMetrics(), self.loop.time, self._rng)
        self._config, self._service = config, service
        for replica, plan in zip(self.replicas, scenario.replicas, strict=True):
            self._poll(replica)
            for at, move in plan.moves:
                self.loop.at(at, self._move, replica, move)
        await service.listen(cast("socket.socket", None))
        draining = None
        if scenario.drains_at is not None:
            await asyncio.sleep(scenario.drains_at)
            self.note("router", "drains")
            draining = asyncio.create_task(service.drain(_DRAIN_S))
        while not all(client.is_over for client in self.clients):  # noqa: ASYNC110  costs nothing
            await asyncio.sleep(0.25)
        await asyncio.sleep(_SETTLE_S)
        self._check_rest()
        await (draining or service.drain(_DRAIN_S))
        await asyncio.sleep(1.0)
        self._check_end()

    def _poll(self, replica: SimReplica) -> None:
        """What the poller does, without HTTP."""
        if getattr(self, "_is_over", False):
            return
        self._look(replica)
        self.loop.at(self.loop.time() + self._config.poll_interval_s, self._poll, replica)

    def _look(self, replica: SimReplica) -> None:
        host, fleet = replica.host, self._service.placer.fleet
        seen = fleet.find(_url(replica))
        if seen is None:
            return
        is_silent = host.is_frozen or host.is_unreachable
        if self._scenario.polls_see and is_silent:
            fleet.poll_failed(seen)
        elif self._scenario.polls_see and host.listener is None:
            fleet.refused(seen)
        else:
            report = LoadReport(started_at=replica.started_at)
            fleet.answered(seen, [MODEL], report, replica.style.dialect)

    def _move(self, replica: SimReplica, move: Move) -> None:
        """What a source of replicas tells."""
        fleet, now = self._service.placer.fleet, self.loop.time()
        self.note(replica.name, move.value)
        away = self._away.setdefault(replica.name, [])
        if move is Move.JOIN:
            fleet.add(_url(replica))
            self._look(replica)
        seen = fleet.find(_url(replica))
        if seen is not None and move is Move.LEAVE:
            fleet.remove(seen, now)
        elif seen is not None and move is not Move.JOIN:
            fleet.set_draining(seen, is_draining=move is Move.DRAIN)
        is_away = move in {Move.LEAVE, Move.DRAIN}
        if is_away and (not away or away[-1][1] < inf):
            away.append((now, inf))
        elif not is_away and away and away[-1][1] == inf:
            away[-1] = (away[-1][0], now)

    # what must hold

    def _check_rest(self) -> None:
        """All answers are over and time has passed: nobody works, nothing is reserved."""
        service = self._service
        if service.num_exchanges:
            self.findings.append(f"{service.num_exchanges} exchanges never ended")
        fleet = service.placer.fleet
        if fleet.leaving:
            self.findings.append(f"replicas never left: {fleet.leaving}")
        names = sorted(replica.name for replica in fleet.replicas)
        kept = sorted(service._pools)  # noqa: SLF001
        if kept != names:
            self.findings.append(f"connections of {kept} are kept, not of {names}")
        for replica in fleet.replicas:
            if replica.num_in_flight or replica.num_decoding or replica.queued_tokens:
                self.findings.append(f"load was not released: {replica!r}")
        for sim in self.replicas:
            if sim.num_working:
                self.findings.append(f"{sim.name} still works on {sim.num_working} requests")

    def _check_end(self) -> None:
        """The router has shut down: nothing of it is left."""
        self._is_over = True
        open_ones = [repr(transport) for transport in self.network.router.transports]
        if open_ones:
            self.findings.append(f"connections left open: {open_ones[:5]}")
        for kind, left in (
            ("tasks", self.loop.pending_tasks()),
            ("timers", self.loop.pending_timers()),
        ):
            if left:
                self.findings.append(f"{len(left)} {kind} left behind: {left[:3]}")
        conditions = self._scenario.conditions
        limit = 2 * conditions.window_bytes + _EVENT_BYTES
        if self.network.most_buffered_bytes > limit:
            excess = self.network.most_buffered_bytes
            self.findings.append(f"a write buffer grew {excess} bytes beyond its high water")

    def _check_calls(self) -> None:
        for client in self.clients:
            for call in client.calls:
                self._check_call(client, call)
        self._check_legs()

    def _check_legs(self) -> None:
        """Not more than needed, and where they should be."""
        scenario = self._scenario
        calls = [call for client in self.clients for call in client.calls]
        legs = [leg for legs in self.ledger.values() for leg in legs]
        if scenario.is_sound and len(legs) > len(calls):
            self.findings.append(f"{len(legs)} legs for {len(calls)} calls, though all is well")
        if scenario.is_storm:
            # Linkerd's budget: a fifth of the first attempts, and 10 a second, 10 s of it at once.
            first = sum(not call.retry for call in calls)
            spare = 0.2 * first + 10.0 * (10.0 + max(call.ended_at for call in calls))
            num_legs = sum(not leg.looks_stale for leg in legs)
            if num_legs > len(calls) + spare:
                self.findings.append(f"{num_legs} legs for {len(calls)} calls: over the budget")
        for leg in legs:
            for since, until in self._away.get(leg.replica, ()):
                if since + _ON_ITS_WAY_S < leg.at < until:
                    self.findings.append(f"{leg.replica} got #{leg.number} while it was away")
        at_first = [leg for leg in legs if leg.replica == "r0"]
        most, back_at = scenario.most_legs_of_first, scenario.first_is_back_at
        if most is not None and len(at_first) > most:
            self.findings.append(f"{len(at_first)} legs on a replica that always fails")
        if back_at is not None and not any(leg.at > back_at for leg in at_first):
            self.findings.append("a replica that is well again gets no requests")

    def _check_call(self, client: SimClient, call: Call) -> None:
        scenario, name = self._scenario, f"{client.name}'s request {call.ask.number}"
        if call.outcome is None:
            self.findings.append(f"{name} never ended")
            return
        allowed = scenario.allowed
        if scenario.allowed_whole is not None and not call.ask.stream:
            allowed = scenario.allowed_whole
        if call.outcome is not Outcome.GONE and call.outcome not in allowed:
            self.findings.append(f"{name} ended as {call.outcome.value} {call.status}")
        waited_s, limit_s = call.ended_at - call.sent_at, scenario.max_wait_s
        if client.manner.pipelines:  # each waits for those before it as well
            limit_s *= len(client.calls)
        elif call.ask.timeout_s is not None:
            limit_s = min(limit_s, call.ask.timeout_s + _LATE_S)
        if waited_s > limit_s and not client.manner.reads_slowly_s:
            self.findings.append(f"{name} took {waited_s:.3f} s, at most {limit_s:.3f} s allowed")
        if call.request_id is None:
            return
        legs = [leg for leg in self.ledger.get(call.ask.number, ()) if
                leg.request_id == call.request_id]  # fmt: skip
        most = self._config.max_attempts + self._config.max_resumes
        if sum(not leg.looks_stale for leg in legs) > most:
            self.findings.append(f"{name} had {len(legs)} legs")
        if call.outcome is Outcome.GONE:
            self._check_abort(name, call, legs)

    def _check_abort(self, name: str, call: Call, legs: list[Leg]) -> None:
        """The client left: its leg ends, and no other begins."""
        struck = {replica.name for replica in self.replicas if replica.was_struck}
        limit_s = _ABORT_S + 10 * self._scenario.conditions.latency_s
        for leg in legs:
            if leg.replica in struck:
                continue
            if leg.at > call.ended_at + limit_s:
                self.findings.append(f"{name} went to {leg.replica} after its client had left")
            if leg.ended_at is None or leg.ended_at > call.ended_at + limit_s:
                self.findings.append(f"{leg.replica} worked on {name} after its client had left")


def _url(replica: SimReplica) -> str:
    return f"http://{replica.name}:8000"


@contextmanager
def _collected_errors(findings: list[str]) -> Iterator[None]:
    """Errors that the router logs are findings; warnings are its daily work."""

    class _Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = f": {record.exc_info[1]!r}" if record.exc_info else ""
            findings.append(f"logged: {record.getMessage()}{cause}")

    log, handler = logging.getLogger("roost_router"), _Collector(logging.ERROR)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


@contextmanager
def _seeded_urandom(rng: Random) -> Iterator[None]:
    """Request ids that the router makes up are drawn from the seed as well."""
    real, os.urandom = os.urandom, rng.randbytes
    try:
        yield
    finally:
        os.urandom = real
