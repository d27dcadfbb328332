"""Who decides in a simulated fleet: the real router, one or several, or the bound.

The real one is `roost_router.placement.Placer` with its index, fleet, fitted speeds and policy,
and `roost_router.dispatch.Dispatcher` before it, driven as the data path drives them: `offer` when
a request arrives, `look` while any is held, `learn` and `first_byte` with its first token (as with
our engine, whose head tells the cached tokens), `finish` at its end. Load reports come as its
poller brings them. As many requests are held as come: none is refused. With KV events (told.py) the
placer has what they say, too.

A trace has block ids instead of text. The placer gets canonical prompt bytes made of them
(prompts.py). So the text chain is computed and cut as in
the router, with the same loss where its blocks are longer than the trace's.

Several routers each have their own placements, what their answers tell, and the tokens of prompts
that came by them. All hear all KV events. They share nothing else, or tell each other
what they do. Which router a request comes to is drawn at random.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Protocol

from roost_loadtest.fleet_sim.prompts import canonical_prompt
from roost_loadtest.fleet_sim.told import EventDelays, EventView
from roost_router.dispatch import Dispatcher
from roost_router.errors import RouterError
from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.shared.hearing import Hearing
from roost_router.shared.journal import Journal
from roost_router.shared.stamps import Stamps
from roost_wire.told_load import ToldLoad

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.replica import Job, SimReplica
    from roost_router.policy.interface import Policy
    from roost_wire.kv_events import KvEvent
    from roost_wire.load_report import LoadReport

_MODEL = "m"
#: First tokens that make a fit: as many as a replica's remembers, of two sizes.
_FITTED_WORK = (1_000, 8_000) * 10


class Router(Protocol):
    """Decides where each request goes, and hears what becomes of it."""

    def offer(self, job: Job, now: float) -> int | None:
        """The replica that gets `job`; None while it is held."""
        ...

    def look(self, now: float) -> Iterator[tuple[Job, int]]:
        """Jobs that were held, with the replica that each gets now."""
        ...

    @property
    def num_held(self) -> int:
        """Jobs that wait for a look."""
        ...

    def first_token(self, job: Job, at: float, now: float) -> None:
        """The answer to `job` began at `at`; it is `now`."""
        ...

    def ended(self, job: Job, at: float, now: float) -> None:
        """The answer to `job` ended at `at`; it is `now`."""
        ...

    def polled(self, reports: Sequence[LoadReport]) -> None:
        """What all replicas reported of themselves, in order."""
        ...

    def load_told(self, replica: int, report: LoadReport) -> None:
        """What a replica tells of its load unasked."""
        ...

    def told(self, replica: int, events: list[KvEvent]) -> None:
        """What a replica tells of its blocks."""
        ...

    def tokenised(self, job: Job) -> None:
        """The tokens of a prompt that was offered are known."""
        ...

    def exchange(self, now: float) -> None:
        """Routers tell each other what they did, if they do."""
        ...


class _Asked:
    """A job with what the router reads of a request."""

    def __init__(self, job: Job, block_tokens: int) -> None:
        self.job = job
        prompt = canonical_prompt(job.request, block_tokens, job.number)
        self.fields = RoutingFields(_MODEL, stream=True, prompt=prompt)


class RealRouters:
    """One or several real routers before the same replicas."""

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        *,
        num_routers: int,
        reports: Sequence[LoadReport],
        block_tokens: int,
        seed: int,
        tells_tokens: bool = False,
        delays: EventDelays | None = None,
        first_fits: Sequence[float] = (),
        tell_each_other: bool = False,
    ) -> None:
        """`delays`: with which KV events are followed; None: they are not. `tells_tokens`: these
        events have tokens, not ids of the trace's blocks.

        `first_fits`: what routers begin with as fitted prefill speeds, tokens/s of each replica;
        none: as they begin, without a fit. `tell_each_other`: when `exchange` is called.
        """
        rngs = [Random(f"{seed}/{number}") for number in range(num_routers)]
        self.placers: list[Placer] = []
        self._views: list[EventView] = []  # of the routers, if they follow events
        self._journals: list[Journal] = []  # of the routers, if they tell each other
        self._hearings: list[Hearing] = []
        for rng in rngs:
            index = PrefixIndex()
            fleet = Fleet(index, [f"http://replica-{number}" for number in range(len(reports))])
            told = None
            if delays is not None:
                view = EventView(fleet, _MODEL, None if tells_tokens else block_tokens)
                self._views.append(view)
                told = view.told
            journal = None
            if tell_each_other:
                number = len(self.placers)
                journal = Journal(number, Stamps(number))
                journal.open()
                mine = fleet.replicas[number::num_routers]
                journal.feeding = frozenset(replica.url for replica in mine)
                self._journals.append(journal)
                self._hearings.append(Hearing(fleet, index, number, journal.stamps))
            self.placers.append(Placer(index, fleet, make_policy, rng, told, journal=journal))
        self._knows_tokens_first = delays is not None and not delays.tokens_after_s
        self._untokenised: dict[int, tuple[EventView, RoutingFields]] = {}
        self._dispatchers: list[Dispatcher[_Asked]] = [
            Dispatcher(placer, rng, max_held=sys.maxsize)
            for placer, rng in zip(self.placers, rngs, strict=True)
        ]
        self.polled(reports)
        for placer in self.placers:
            for replica, tokens_per_s in zip(placer.fleet.replicas, first_fits, strict=False):
                for work_tokens in _FITTED_WORK:
                    replica.speed.observe_ttft(work_tokens, work_tokens / tokens_per_s)
        self._block_tokens = block_tokens
        self._door = Random(f"{seed}/door")
        self._placed: dict[int, tuple[Placer, Placement]] = {}
        self._number_of = {r.name: i for i, r in enumerate(self.placers[0].fleet.replicas)}

    def offer(self, job: Job, now: float) -> int | None:
        """One of the routers decides. O(prompt bytes + replicas)."""
        place = self._door.randrange(len(self.placers)) if len(self.placers) > 1 else 0
        asked = _Asked(job, self._block_tokens)
        if self._views and self._views[place].wants_tokens(asked.fields):
            self._untokenised[job.number] = self._views[place], asked.fields
            if self._knows_tokens_first:
                self.tokenised(job)
        taken, _ = self._dispatchers[place].offer(asked, now)
        if isinstance(taken, Placement):
            return self._place(job, self.placers[place], taken)
        return None

    def look(self, now: float) -> Iterator[tuple[Job, int]]:
        """As the data path's timer, in all routers at once."""
        for placer, dispatcher in zip(self.placers, self._dispatchers, strict=True):
            for asked, placement in dispatcher.look(now):
                if isinstance(placement, RouterError):  # replicas of a simulation do not leave
                    raise placement
                yield asked.job, self._place(asked.job, placer, placement)

    @property
    def num_held(self) -> int:
        """Jobs that wait in any router."""
        return sum(dispatcher.num_held for dispatcher in self._dispatchers)

    def _place(self, job: Job, placer: Placer, placement: Placement) -> int:
        self._placed[job.number] = placer, placement
        return self._number_of[placement.replica.name]

    def first_token(self, job: Job, at: float, now: float) -> None:
        """As the head and the first bytes of a stream."""
        placer, placement = self._placed[job.number]
        placer.learn(placement, job.request.prompt_tokens, job.cached_tokens)
        placement.replica.news_lag_s = now - at
        placer.first_byte(placement, at, streamed=True)

    def ended(self, job: Job, at: float, now: float) -> None:  # noqa: ARG002
        """As the end of a stream, an event a token."""
        placer, placement = self._placed.pop(job.number)
        placer.finish(placement, at, job.request.output_tokens)

    def polled(self, reports: Sequence[LoadReport]) -> None:
        """As the poller, in all routers at once."""
        for placer in self.placers:
            for replica, report in zip(placer.fleet.replicas, reports, strict=True):
                placer.fleet.answered(replica, [_MODEL], report)

    def load_told(self, replica: int, report: LoadReport) -> None:
        """As the streams of events of our engine, in all routers at once."""
        capacity = report.kv_capacity_tokens or 0
        load = ToldLoad(
            report.num_running or 0,
            report.num_waiting or 0,
            int((report.kv_usage or 0.0) * capacity),
            capacity,
            report.queued_tokens or 0,
        )
        for placer in self.placers:
            placer.fleet.load_told(placer.fleet.replicas[replica], load)

    def told(self, replica: int, events: list[KvEvent]) -> None:
        """As the streams of events, in all routers at once."""
        for view in self._views:
            view.apply(replica, events)

    def exchange(self, now: float) -> None:
        """As through Redis: what each did since the last time, all others hear now."""
        for placer, journal in zip(self.placers, self._journals, strict=False):
            batch = journal.take(placer.fleet.replicas, placer.index)
            if batch is not None:
                for hearing in self._hearings:
                    hearing.hear(batch, now)

    def tokenised(self, job: Job) -> None:
        """As a tokenizer's answer, in the router that had the prompt, if it asked for one."""
        waiting = self._untokenised.pop(job.number, None)
        if waiting is not None:
            view, fields = waiting
            view.bind(fields, job.request)


class LeastWaitRouter:
    """The bound's: sees the replicas themselves, at once, and takes the least wait.

    wait = prefill seconds queued · (1 + seconds of a decode step / seconds of a chunk)
           + seconds of its own prefill

    Meant for replicas that share one cache, so that every replica has every prefix, and its own
    prefill differs where their speeds do.
    """

    def __init__(self, replicas: Sequence[SimReplica], seed: int) -> None:
        self._replicas = replicas
        self._rng = Random(f"{seed}/bound")

    num_held = 0

    def look(self, now: float) -> Iterator[tuple[Job, int]]:  # noqa: ARG002
        """Nothing is held."""
        return iter(())

    def offer(self, job: Job, now: float) -> int:  # noqa: ARG002
        """The replica where it waits least, ties by streams, then at random."""
        return min(
            range(len(self._replicas)),
            key=lambda i: (*self._wait(self._replicas[i], job), self._rng.random()),
        )

    def first_token(self, job: Job, at: float, now: float) -> None:
        """Nothing to learn."""

    def ended(self, job: Job, at: float, now: float) -> None:
        """Nothing to learn."""

    def polled(self, reports: Sequence[LoadReport]) -> None:
        """Nothing to learn."""

    def load_told(self, replica: int, report: LoadReport) -> None:
        """Nothing to learn."""

    def told(self, replica: int, events: list[KvEvent]) -> None:
        """Nothing to learn."""

    def tokenised(self, job: Job) -> None:
        """Nothing to learn."""

    def exchange(self, now: float) -> None:
        """Nothing to tell."""

    def _wait(self, replica: SimReplica, job: Job) -> tuple[float, int]:
        slower = 1.0 + replica.step_decode_s() / replica.chunk_s()
        return replica.queued_s() * slower + replica.prefill_s(job), replica.num_requests
