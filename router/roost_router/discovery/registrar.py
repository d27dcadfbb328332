"""Says in the store that replicas are here, for as long as they answer: `roost register`.

Each replica is asked and told of every BEAT_S, by a task of its own: `GET /health`, or where there
is none `GET /v1/models`. One that does not answer is not told of, until its life is over; a busy
one has several beats to answer. With the end of this process its replicas say goodbye.

A member is this process and one replica. So two registrars of one URL, the old and the new one of
an update, do not disturb each other: the replica is here while one of them says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool
from roost_router.store.errors import StoreError

if TYPE_CHECKING:
    from roost_router.store.members import Members

BEAT_S: Final = 1.0
_ASK_S: Final = 2.0
_BUDGET_S: Final = 1.0
#: Statuses of a server that answers, and wants a key or has no such page.
_ASKS_FOR_KEY: Final = frozenset({401, 403})
_NO_PAGE: Final = frozenset({404, 405, 501})
_log = logging.getLogger(__name__)


class Registrar:
    """Of some replicas."""

    def __init__(self, members: Members, urls: tuple[str, ...], life_s: float) -> None:
        """`urls`: as check_replica_url lets them pass."""
        self._members: Final = members
        self._life_s: Final = life_s
        process = os.urandom(8).hex()
        self._names: Final = {f"{process}.{at}".encode(): url for at, url in enumerate(urls)}
        self._states: Final[dict[bytes, str]] = {}  # as they were logged

    async def run(self) -> None:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name, url in self._names.items():
                tasks.create_task(self._follow(name, url))

    async def leave(self) -> None:
        """Say goodbye, once `run` has ended; as far as the store is there."""
        for name, url in self._names.items():
            if name in self._states:
                with contextlib.suppress(StoreError):
                    await self._members.write(name, url, self._life_s, _BUDGET_S, is_here=False)

    async def _follow(self, name: bytes, url: str) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(UpstreamPool(url, loop, _ASK_S)) as pool:
            while True:
                self._note(name, url, await self._beat(name, url, pool))
                await asyncio.sleep(BEAT_S)

    async def _beat(self, name: bytes, url: str, pool: UpstreamPool) -> str:
        """What it came to, in words."""
        try:
            if not await _answers(pool):
                return "does not serve"
        except (OSError, PageError) as error:
            return f"does not answer: {error or type(error).__name__}"
        try:
            await self._members.write(name, url, self._life_s, _BUDGET_S)
        except StoreError as error:
            return f"cannot be registered: {error}"
        return "is registered"

    def _note(self, name: bytes, url: str, state: str) -> None:
        if self._states.get(name) != state:
            self._states[name] = state
            _log.info("%s %s", url, state)


async def _answers(pool: UpstreamPool) -> bool:
    """Whether the replica serves. Raises PageError and OSError."""
    status = (await get_page(pool, b"/health", None, _ASK_S)).status
    if status in _NO_PAGE:
        status = (await get_page(pool, b"/v1/models", None, _ASK_S)).status
    return status < 300 or status in _ASKS_FOR_KEY
