"""Replicas that registered themselves in the store, as a source. Decides nothing.

Asked every LOOK_S. What it tells lives on as registered.py says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Final

from roost_router.discovery.registered import Register
from roost_router.discovery.roster import Told
from roost_router.discovery.source import Failed
from roost_router.store.errors import StoreError

if TYPE_CHECKING:
    from roost_router.store.members import Members

LOOK_S: Final = 0.5
_BUDGET_S: Final = 1.0


class RegistrySource:
    """The members that one store has."""

    name: Final = "redis"
    linger_s: Final = 0.0  # registered.py counts their lives

    def __init__(self, members: Members, clock: Callable[[], float]) -> None:
        self._members: Final = members
        self._clock: Final = clock
        self._register: Final = Register()
        self._must_look = asyncio.Event()

    def hurry(self) -> None:
        """Ask now."""
        self._must_look.set()

    async def answers(self) -> AsyncGenerator[list[Told] | Failed, None]:
        """What each look says."""
        was_away = False
        while True:
            try:
                there = await self._members.read(_BUDGET_S)
            except StoreError as error:
                was_away = True
                yield Failed(str(error))
            else:
                now = self._clock()
                if was_away:
                    self._register.reprieve(now)
                was_away = False
                yield self._register.hear(there, now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._must_look.wait()
            self._must_look.clear()
