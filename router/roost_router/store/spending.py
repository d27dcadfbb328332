"""Tells the store what this router's clients spent of their limits, and hears what is left.

What was spent is told within TELL_S; each LOOK_S all limits are looked at, so that a client that
comes to another router finds the same there. A call that fails is not told again: it may have
been counted.

Not here: what that means for a request (quotas.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from roost_router.quotas import Meter, Quotas
from roost_router.store import scripts
from roost_router.store.errors import StoreError
from roost_router.store.replies import expecting

if TYPE_CHECKING:
    from roost_router.store.link import Link
    from roost_router.store.secret import ClusterSecret

TELL_S: Final = 0.02
LOOK_S: Final = 1.0
_BUDGET_S: Final = 0.5
#: Buckets of one call: some 0.5 ms of Redis' CPU.
_CHUNK: Final = 128
_log = logging.getLogger(__name__)


class Spending:
    """Of one router."""

    def __init__(
        self, link: Link, secret: ClusterSecret, quotas: Quotas, clock: Callable[[], float]
    ) -> None:
        self._link: Final = link
        self._keys: Final = (secret.prefix + b"quota:",)
        self._name: Final = secret.keyed_name
        self._quotas: Final = quotas
        self._clock: Final = clock
        self._looked_at = -LOOK_S

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(TELL_S if self._quotas.has_limits else LOOK_S)

    async def tell(self) -> None:
        """Once, if there is anything to tell or to look at; never raises."""
        now, quotas = self._clock(), self._quotas
        if self._link.is_sharing:  # else as many as last heard
            quotas.num_routers = self._link.hearing.num_peers + 1
        every = now - self._looked_at >= LOOK_S
        if every:
            self._looked_at = now
        meters = quotas.take(every=every)
        for at in range(0, len(meters), _CHUNK):
            chunk = meters[at : at + _CHUNK]
            try:
                await self._spend(chunk)
            except StoreError:
                quotas.failed(chunk)
            except Exception:  # noqa: BLE001
                # A defect of ours must not end the counting for good.
                _log.exception("telling what was spent failed")
                quotas.failed(chunk)

    async def _spend(self, meters: list[Meter]) -> None:
        args: list[bytes | int] = []
        for meter in meters:
            args += (self._name(meter.name), meter.limit, b"%.6f" % meter.in_flight)
        levels = await self._link.store.call(scripts.SPEND, self._keys, args, _BUDGET_S)
        now = self._clock()
        with expecting():
            for meter, level in zip(meters, levels, strict=True):
                self._quotas.heard(meter, float(level), now)
