"""Ask every replica, again and again, what it serves and how it is. Decides nothing.

One task a replica, for as long as it belongs to the fleet: `GET /v1/models` (any OpenAI-compatible
server answers it), then, where there is one, `GET /metrics`. What the answers mean is fleet.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
from msgspec import structs

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Replica
from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool
from roost_wire.llama_cpp import LLAMA_CPP, PROPS_PATH, num_slots
from roost_wire.load_report import LoadReport, parse_load_report

#: Seconds that a start waits for slow replicas while another is up.
_SLOW_S = 0.5
_log = logging.getLogger(__name__)


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""
    parent: str | None = None  # of a LoRA adapter: the model that it adapts


class _Models(msgspec.Struct):
    data: list[_Model]


_models_decoder = msgspec.json.Decoder(_Models)


class Poller:
    """Keeps the fleet's picture of its replicas fresh."""

    def __init__(
        self,
        fleet: Fleet,
        interval_s: float,
        timeout_s: float,
        authorization: Callable[[], str | None],
    ) -> None:
        """`authorization`: what the header of that name says, asked anew for every request."""
        self._fleet = fleet
        self._authorization = authorization
        self._interval_s = interval_s
        self._timeout_s = timeout_s  # for a page
        self._unasked: set[str] = set()
        self._has_asked = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None  # while it runs
        self._tasks: dict[str, asyncio.Task[None]] = {}
        fleet.watch(self)

    async def run(self) -> None:
        """Poll until cancelled. Raises what a poll raises by a defect."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for replica in [*self._fleet.replicas, *self._fleet.leaving]:
                    self._start(self._group, replica)
                await asyncio.Event().wait()
        finally:
            self._group = None

    def joined(self, replica: Replica) -> None:
        """Ask it at once."""
        self._unasked.add(replica.name)
        if self._group is not None:
            self._start(self._group, replica)

    def gone(self, replica: Replica) -> None:
        """Ask it no more."""
        self._was_asked(replica)
        task = self._tasks.pop(replica.name, None)
        if task is not None:
            task.cancel()

    def _start(self, group: asyncio.TaskGroup, replica: Replica) -> None:
        self._tasks[replica.name] = group.create_task(self._follow(replica))

    def _was_asked(self, replica: Replica) -> None:
        self._unasked.discard(replica.name)
        self._has_asked.set()

    async def until_asked(self) -> None:
        """Return when every replica was asked once; those that are slow only hold up a start."""
        while self._unasked:
            self._has_asked.clear()
            try:
                async with asyncio.timeout(_SLOW_S if self._fleet.is_ready else None):
                    await self._has_asked.wait()
            except TimeoutError:
                return

    async def _follow(self, replica: Replica) -> None:
        # Apart from the data path's connections: a poll keeps one, and never takes one of theirs.
        loop = asyncio.get_running_loop()
        with contextlib.closing(UpstreamPool(replica.url, loop, self._timeout_s)) as pool:
            await self._look(pool, replica)
            self._was_asked(replica)
            while True:
                # A replica that is not up yet is looked at more often: it may be about to be.
                await asyncio.sleep(self._interval_s if replica.is_up else self._interval_s / 4)
                await self._look(pool, replica)

    async def _look(self, pool: UpstreamPool, replica: Replica) -> None:
        was = replica.state
        await self._poll(pool, replica)
        if replica.state is not was:
            models = ", ".join(replica.models)
            _log.info("replica %s is %s (%s)", replica.name, replica.state.value, models)

    async def _poll(self, pool: UpstreamPool, replica: Replica) -> None:
        try:
            page = await get_page(pool, b"/v1/models", self._authorization(), self._timeout_s)
            if page.status != 200:
                raise PageError(f"/v1/models answered {page.status}")
            models = _models_decoder.decode(page.body)
            dialect = models.data[0].owned_by if models.data else ""
            report = await self._report(pool, dialect)
        except ConnectionRefusedError:
            self._fleet.refused(replica)
        except (OSError, ValueError, RecursionError) as error:
            # TimeoutError is an OSError; PageError, msgspec's and Unicode's errors are
            # ValueErrors. One replica's nonsense must not end the polling of the others.
            _log.debug("poll of %s failed: %r", replica.name, error)
            self._fleet.poll_failed(replica)
        else:
            replica.adapters = frozenset(model.id for model in models.data if model.parent)
            self._fleet.answered(replica, (model.id for model in models.data), report, dialect)

    async def _report(self, pool: UpstreamPool, dialect: str) -> LoadReport | None:
        """The replica's own figures; an empty report where there is no usable page.

        None where it does not come in time: llama.cpp writes this page between two steps only, and
        a step of long prompts takes seconds.
        """
        try:
            page = await get_page(pool, b"/metrics", self._authorization(), self._timeout_s)
        except TimeoutError:
            return None
        text = page.body.decode("utf-8", "replace") if page.status == 200 else ""
        report = parse_load_report(text)
        if dialect == LLAMA_CPP:
            props = await get_page(pool, PROPS_PATH, self._authorization(), self._timeout_s)
            report = structs.replace(report, max_running=num_slots(props.body))
        return report
