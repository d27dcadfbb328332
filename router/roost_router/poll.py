"""Ask every replica, again and again, what it serves and how it is. Decides nothing.

One task a replica: `GET /v1/models` (any OpenAI-compatible server answers it), then, where there
is one, `GET /metrics`. What the answers mean is fleet.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import aiohttp
import msgspec

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Replica
from roost_wire.load_report import LoadReport, parse_load_report

_MAX_PAGE_BYTES = 8 << 20
#: Seconds that a start waits for slow replicas while another is up.
_SLOW_S = 0.5
_log = logging.getLogger(__name__)


class _BadPageError(ValueError):
    """A replica answered something that is of no use."""


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""


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
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._num_unasked = len(fleet.replicas)
        self._has_asked = asyncio.Event()

    async def run(self) -> None:
        """Poll until cancelled."""
        async with (
            aiohttp.ClientSession(timeout=self._timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for replica in self._fleet.replicas:
                tasks.create_task(self._follow(session, replica))

    async def until_asked(self) -> None:
        """Return when every replica was asked once; those that are slow only hold up a start."""
        while self._num_unasked:
            self._has_asked.clear()
            try:
                async with asyncio.timeout(_SLOW_S if self._fleet.is_ready else None):
                    await self._has_asked.wait()
            except TimeoutError:
                return

    async def _follow(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        await self._look(session, replica)
        self._num_unasked -= 1
        self._has_asked.set()
        while True:
            # A replica that is not up yet is looked at more often: it may be about to be.
            await asyncio.sleep(self._interval_s if replica.is_up else self._interval_s / 4)
            await self._look(session, replica)

    async def _look(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        was = replica.state
        await self._poll(session, replica)
        if replica.state is not was:
            models = ", ".join(replica.models)
            _log.info("replica %s is %s (%s)", replica.name, replica.state.value, models)

    async def _poll(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        base = replica.url.rstrip("/")
        try:
            async with self._get(session, f"{base}/v1/models") as answer:
                if answer.status != 200:
                    raise _BadPageError(f"/v1/models answered {answer.status}")
                models = _models_decoder.decode(await _read(answer))
            report = await self._report(session, base)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                self._fleet.refused(replica)
            else:
                self._fleet.poll_failed(replica)
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            # TimeoutError is an OSError; msgspec's and Unicode's errors are ValueErrors. One
            # replica's nonsense must not end the polling of the others.
            _log.debug("poll of %s failed: %r", replica.name, error)
            self._fleet.poll_failed(replica)
        else:
            dialect = models.data[0].owned_by if models.data else ""
            self._fleet.answered(replica, (model.id for model in models.data), report, dialect)

    def _get(
        self, session: aiohttp.ClientSession, url: str
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        authorization = self._authorization()
        headers = {} if authorization is None else {"authorization": authorization}
        return session.get(url, headers=headers, allow_redirects=False)

    async def _report(self, session: aiohttp.ClientSession, base: str) -> LoadReport:
        """The replica's own figures; an empty report where there is no usable page."""
        async with self._get(session, f"{base}/metrics") as answer:
            if answer.status != 200:
                return LoadReport()
            return parse_load_report((await _read(answer)).decode("utf-8", "replace"))


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The whole body. _BadPageError if it exceeds _MAX_PAGE_BYTES."""
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _MAX_PAGE_BYTES:
            raise _BadPageError(f"the page exceeds {_MAX_PAGE_BYTES} bytes")
    return bytes(body)
