"""Asks all sources of replicas and does to the fleet what roster.py says. Decides nothing.

Each source has a task of its own. One that breaks by a defect of ours fails like one that cannot be
asked, and is begun anew: the router goes on with the replicas that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Final

from roost_router.discovery.roster import Roster, SourceStatus, Told
from roost_router.discovery.source import Failed, Source
from roost_router.fleet.fleet import Fleet

#: Time passes for absences and failures that often.
TICK_S: Final = 1.0
#: Seconds until a source that broke is begun anew.
_ANEW_S: Final = 5.0
#: Seconds for which a start waits for the first answers.
START_S: Final = 3.0
_STATIC: Final = "command line"
_log = logging.getLogger(__name__)


class Discovery:
    """The sources of one router's replicas."""

    def __init__(self, fleet: Fleet, sources: Iterable[Source], clock: Callable[[], float]) -> None:
        """Replicas that `fleet` has by now were given for good."""
        self._fleet: Final = fleet
        self._sources: Final = list(sources)
        self._clock: Final = clock
        self._roster: Final = Roster()
        self._roster.open(_STATIC, is_fixed=True)
        self._has_news = asyncio.Event()
        self._num_beyond = 0
        self._failing: set[str] = set()
        for source in self._sources:
            self.open(source.name, linger_s=source.linger_s)
        self.told(_STATIC, [Told(replica.url) for replica in fleet.replicas])

    def open(self, source: str, *, linger_s: float = 0.0) -> None:
        """One more source, whose owner calls `told` and `failed`."""
        self._roster.open(source, linger_s=linger_s)

    def told(self, source: str, view: Iterable[Told]) -> None:
        """All that a source knows of."""
        if source in self._failing:
            self._failing.remove(source)
            _log.info("%s answers again", source)
        for note in self._roster.told(source, view, self._clock()):
            _log.warning("left out of what %s tells: %s", source, note)
        self._has_news.set()
        self.look()

    def failed(self, source: str, reason: str) -> None:
        """A source could not be asked."""
        self._failing.add(source)
        if self._roster.failed(source, reason, self._clock()):
            _log.warning("%s: %s; replicas stay as they are", source, reason)
        self._has_news.set()

    def hurry(self) -> None:
        """Have all sources look now."""
        for source in self._sources:
            source.hurry()

    def status(self) -> list[SourceStatus]:
        """How each source does."""
        return self._roster.status()

    async def run(self) -> None:
        """Follow all sources until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(self._follow(source))
            while True:
                await asyncio.sleep(TICK_S)
                try:
                    self.look()
                except Exception:  # noqa: BLE001
                    # A defect of ours, about one replica, must not end the following of all.
                    _log.exception("the fleet could not be changed")

    async def until_told(self) -> None:
        """Return when each source has answered or failed once, or START_S is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                while not self._roster.is_told:
                    self._has_news.clear()
                    await self._has_news.wait()

    def look(self) -> None:
        """Do what the sources' words and the time that has passed come to."""
        fleet, now = self._fleet, self._clock()
        changes = self._roster.look(now, self._answers)
        for told in changes.joined:
            replica = fleet.add(told.url)
            fleet.set_draining(replica, is_draining=told.is_draining)
            if self._sources:
                _log.info("replica %s joins: %s %s", replica.name, replica.url, told.name)
        for url, is_draining in changes.draining:
            found = fleet.find(url)
            if found is not None:
                fleet.set_draining(found, is_draining=is_draining)
                what = "drains" if is_draining else "takes requests again"
                _log.info("replica %s %s", found.name, what)
        for url in changes.left:
            found = fleet.find(url)
            if found is not None:
                fleet.remove(found, now)
                _log.info("replica %s leaves: %s", found.name, url)
        if self._roster.num_beyond != self._num_beyond:
            self._num_beyond = self._roster.num_beyond
            if self._num_beyond:
                _log.error("%d replicas are left out: too many are told", self._num_beyond)

    def _answers(self, url: str) -> bool:
        replica = self._fleet.find(url)
        return replica is not None and replica.is_up

    async def _follow(self, source: Source) -> None:
        while True:
            try:
                async with contextlib.aclosing(source.answers()) as answers:
                    async for answer in answers:
                        if isinstance(answer, Failed):
                            self.failed(source.name, answer.reason)
                        else:
                            self.told(source.name, answer)
            except Exception:  # noqa: BLE001
                _log.exception("following %s failed", source.name)
                self.failed(source.name, "a defect of the router")
            await asyncio.sleep(_ANEW_S)
