"""The event loop of a simulated fleet: arrivals, replicas, and what routers hear of them.

A heap of moments. Six kinds of events: a request arrives, routers look at what they hold, a
replica ends a stretch of steps, a router hears of an answer (at once, or `hears_after_s` later; it
is told when it happened, and what it placed itself it knows at once), routers poll the replicas,
and where KV events are followed, they and the tokens of prompts become known (told.py). Events of
one moment happen in the order in which they were planned, so that a run is a function of its
arguments.

Invariants, checked at the end: every request ended, and no replica has one left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from msgspec import structs

from roost_loadtest.fleet_sim.replica import Happened, Job
from roost_router.policy.late_binding import LOOK_INTERVAL_S, MIN_LOOK_S

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.replica import Replica
    from roost_loadtest.fleet_sim.routers import Router
    from roost_loadtest.fleet_sim.told import EventDelays
    from roost_loadtest.fleet_sim.trace import Request, Trace
    from roost_wire.load_report import LoadReport

#: Requests between two calls of `on_progress`.
PROGRESS_EVERY = 1000


class TellsLoad(Enum):
    """What replicas tell of their load."""

    REQUESTS = "requests"  # how many run and wait, when polled: vLLM
    QUEUES = "queues"  # and the tokens of prompts that are left to compute
    CHANGES = "changes"  # the same, polled and whenever another number runs or waits: our engine


class FleetRun:
    """One trace on one fleet under one router."""

    def __init__(
        self,
        trace: Trace,
        replicas: Sequence[Replica],
        router: Router,
        *,
        time_scale: float = 1.0,
        hears_after_s: float = 0.0,
        poll_interval_s: float = 1.0,
        tells: TellsLoad = TellsLoad.REQUESTS,
        delays: EventDelays | None = None,
        news_after_s: float | None = None,
        shares_cache: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`time_scale` multiplies arrival times; `shares_cache`: memory that one replica frees
        may let another go on. `news_after_s`: what a router does is known to the others so much
        later; None: never. `delays` of KV events, if there are any; none of them comes earlier
        than other news.
        """
        self.jobs: list[Job] = []  # in order of arrival
        self._trace = trace
        self._replicas = replicas
        self._router = router
        self._hears_after_s = hears_after_s
        self._poll_interval_s = poll_interval_s
        self._tells = tells
        self._counts: list[tuple[int, int]] = [(0, 0)] * len(replicas)  # as told
        self._delays = delays
        self._news_after_s = news_after_s
        self._has_news = False  # an exchange is planned
        self._shares_cache = shares_cache
        self._on_progress = on_progress
        self._num_ended = 0
        self._next_look: float | None = None  # when it is planned
        self._looked_at = -inf
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._planned: list[float | None] = [None] * len(replicas)
        self._turns: dict[int | str, deque[Request]] = {}  # of sessions, those to come
        self._opening = [
            (request.arrives_s * time_scale, request) for request in self._first_turns(trace)
        ]

    def run(self) -> list[Job]:
        """Play the trace to its end. O(events · log(events under way)), which are few a request."""
        heap, opening = self._heap, self._opening
        place = 0
        self._at(self._poll_interval_s, self._poll)
        while heap or place < len(opening):
            if place < len(opening) and (not heap or opening[place][0] < heap[0][0]):
                now, request = opening[place]
                place += 1
                self._arrive(request, now)
            else:
                now, _, event = heappop(heap)
                event(now)
        assert self._num_ended == len(self.jobs) == len(self._trace.requests)
        assert not any(replica.num_requests for replica in self._replicas)
        return self.jobs

    def _first_turns(self, trace: Trace) -> list[Request]:
        first = []
        for request in trace.requests:
            if request.session is None:
                first.append(request)
            elif request.session in self._turns:
                self._turns[request.session].append(request)
            else:
                self._turns[request.session] = deque()
                first.append(request)
        return first

    def _at(self, moment: float, event: Callable[[float], None]) -> None:
        self._order += 1
        heappush(self._heap, (moment, self._order, event))

    def _arrive(self, request: Request, now: float) -> None:
        job = Job(len(self.jobs), request, self._trace.num_private(request), now)
        self.jobs.append(job)
        replica = self._router.offer(job, now)
        self._plan_exchange(now)
        if self._delays is not None and self._delays.tokens_after_s:
            self._at(now + self._delays.tokens_after_s, lambda _: self._router.tokenised(job))
        if replica is not None:
            self._submit(job, replica, now)
        elif self._next_look is None:
            self._plan_look(now + LOOK_INTERVAL_S)

    def _plan_look(self, at: float) -> None:
        if self._next_look is None or at < self._next_look:
            self._next_look = at
            self._at(at, self._look_if_planned)

    def _look_if_planned(self, now: float) -> None:
        if now == self._next_look:  # none came before
            self._look(now)

    def _look(self, now: float) -> None:
        self._next_look, self._looked_at = None, now
        for job, replica in self._router.look(now):
            self._submit(job, replica, now)
        self._plan_exchange(now)
        if self._router.num_held:
            self._plan_look(now + LOOK_INTERVAL_S)

    def _plan_exchange(self, now: float) -> None:
        """Something happened that other routers should know."""
        if self._news_after_s is not None and not self._has_news:
            self._has_news = True
            self._at(now + self._news_after_s, self._exchange)

    def _exchange(self, now: float) -> None:
        self._has_news = False
        self._router.exchange(now)

    def _submit(self, job: Job, replica: int, now: float) -> None:
        job.replica = replica
        self._replicas[replica].submit(job, now)
        self._plan(replica, now)

    def _plan(self, number: int, now: float) -> None:
        """Note when the replica is due, if that has changed; pass on what it tells."""
        if self._tells is TellsLoad.CHANGES:
            self._tell_load(number, now)
        if self._delays is not None and (told := self._replicas[number].take_news()):
            later_s = max(self._delays.events_after_s, self._hears_after_s)
            self._at(now + later_s, lambda _: self._router.told(number, told))
        due = self._replicas[number].ends_s
        if due is not None and due != self._planned[number]:
            self._planned[number] = due
            self._at(due, lambda now: self._step(number, now))

    def _step(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        if replica.ends_s != now:  # cut short since
            return
        self._planned[number] = None
        has_freed = False
        for what, job in replica.step(now):
            if what is Happened.END:
                has_freed = True
                self._ended(job, now)
            self._tell(what, job, now)
        self._plan(number, now)
        if has_freed and self._shares_cache:
            self._look_all(now)

    def _look_all(self, now: float) -> None:
        for number, replica in enumerate(self._replicas):
            if replica.num_waiting:
                replica.look(now)
                self._plan(number, now)

    def _ended(self, job: Job, now: float) -> None:
        self._num_ended += 1
        session = job.request.session
        turns = self._turns.get(session) if session is not None else None
        if turns:
            request = turns.popleft()
            self._at(now + request.think_s, lambda then: self._arrive(request, then))
        if self._on_progress is not None and self._num_ended % PROGRESS_EVERY == 0:
            self._on_progress(self._num_ended)

    def _pass_on(self, at: float, hear: Callable[[float], None]) -> None:
        """Routers hear of what happened at this moment: at once, or as late as all news."""
        if self._hears_after_s:
            self._at(at + self._hears_after_s, hear)
        else:
            hear(at)

    def _tell(self, what: Happened, job: Job, at: float) -> None:
        self._pass_on(at, lambda now: self._hear(what, job, at, now))

    def _hear(self, what: Happened, job: Job, at: float, now: float) -> None:
        hear = self._router.first_token if what is Happened.FIRST_TOKEN else self._router.ended
        hear(job, at, now)
        self._plan_exchange(now)
        if self._next_look is not None:
            self._plan_look(max(now, self._looked_at + MIN_LOOK_S))

    def _report(self, replica: Replica) -> LoadReport:
        report = replica.report()
        if self._tells is TellsLoad.REQUESTS:
            return report
        return structs.replace(report, queued_tokens=replica.queued_tokens())

    def _tell_load(self, number: int, now: float) -> None:
        """Pass on the load of a replica, if other requests run or wait there."""
        replica = self._replicas[number]
        counts = replica.num_requests, replica.num_waiting
        if counts != self._counts[number]:
            self._counts[number] = counts
            report = self._report(replica)
            self._pass_on(now, lambda _: self._router.load_told(number, report))

    def _poll(self, now: float) -> None:
        if self._num_ended == len(self._trace.requests):
            return
        reports = [self._report(replica) for replica in self._replicas]
        self._pass_on(now, lambda _: self._router.polled(reports))
        self._at(now + self._poll_interval_s, self._poll)
