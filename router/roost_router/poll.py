"""Ask every replica, again and again, what it serves and how it is. Decides nothing.

One task a replica: `GET /v1/models` (any OpenAI-compatible server answers it), then, where there
is one, `GET /metrics`. What the answers mean is fleet.py's.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import msgspec

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Replica
from roost_wire.load_report import LoadReport, parse_load_report

_MAX_PAGE_BYTES = 8 << 20
_log = logging.getLogger(__name__)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_models_decoder = msgspec.json.Decoder(_Models)


class Poller:
    """Keeps the fleet's picture of its replicas fresh."""

    def __init__(self, fleet: Fleet, interval_s: float, timeout_s: float) -> None:
        self._fleet = fleet
        self._interval_s = interval_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with (
            aiohttp.ClientSession(timeout=self._timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for replica in self._fleet.replicas:
                tasks.create_task(self._follow(session, replica))

    async def _follow(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        while True:
            was = replica.state
            await self._poll(session, replica)
            if replica.state is not was:
                models = ", ".join(replica.models)
                _log.info("replica %s is %s (%s)", replica.name, replica.state.value, models)
            # A replica that is not up yet is looked at more often: it may be about to be.
            await asyncio.sleep(self._interval_s if replica.is_up else self._interval_s / 4)

    async def _poll(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        base = replica.url.rstrip("/")
        try:
            async with session.get(f"{base}/v1/models") as answer:
                answer.raise_for_status()
                models = _models_decoder.decode(await answer.read())
            report = await self._report(session, base)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                self._fleet.refused(replica)
            else:
                self._fleet.poll_failed(replica)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
            self._fleet.poll_failed(replica)
        else:
            self._fleet.answered(replica, (model.id for model in models.data), report)

    async def _report(self, session: aiohttp.ClientSession, base: str) -> LoadReport:
        """The replica's own figures; an empty report where there is no usable page."""
        async with session.get(f"{base}/metrics") as answer:
            if answer.status != 200:
                return LoadReport()
            page = await answer.content.read(_MAX_PAGE_BYTES)
            return parse_load_report(page.decode("utf-8", "replace"))
