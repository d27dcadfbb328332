"""Who feeds which replica: a lease each, kept in Redis, renewed by one call a beat.

The first router that asks gets the lease and keeps it while its beats come; when they stop for
TTL_MS, or it says goodbye, whoever beats next takes over. Each change of owner gives a greater
*fence*, and the index refuses writes with a lesser one: a feeder that was only asleep cannot undo
what its successor wrote. All decisions are in scripts/lease.lua, where the clock is.

Not here: what a feeder does (it begins with `RedisIndex.open_holder`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from roost_router.store import scripts
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.index import TTL_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_router.store.index import Calls

#: A router that has not beaten for so long has lost its leases. With a beat each BEAT_S another one
#: feeds 1.8 s after its last beat at the latest, and two beats may be lost without a change.
TTL_MS: Final = 1300
BEAT_S: Final = 0.5
#: Replicas of one call: about 1 ms of Redis' CPU.
_CHUNK: Final = 512


class Leases:
    """The leases of one router."""

    def __init__(self, store: Calls, prefix: bytes, router: bytes) -> None:
        """`router` names this process, and no other one that lives or has lived lately."""
        self._store = store
        self._keys = (prefix + b"leases",)
        self._router = router

    async def beat(self, replicas: Sequence[bytes], budget_s: float = 0.5) -> dict[bytes, int]:
        """Fences of those replicas that this router feeds from now on. Raises StoreError.

        After an error it feeds until TTL_MS after the last beat, and may go on writing: if it is
        not the feeder any more, its writes are refused.
        """
        ours: dict[bytes, int] = {}
        for at in range(0, len(replicas), _CHUNK):
            names = replicas[at : at + _CHUNK]
            args: tuple[bytes | int, ...] = (self._router, TTL_MS, TTL_S, *names)
            reply = await self._store.call(scripts.LEASE, self._keys, args, budget_s)
            if not isinstance(reply, list) or len(reply) != len(names):
                raise StoreError(StoreFault.NONSENSE, "lease replied another number of fences")
            ours |= {name: int(fence) for name, fence in zip(names, reply, strict=True)}
        return {name: fence for name, fence in ours.items() if fence}

    async def release(self, budget_s: float = 0.5) -> None:
        """Goodbye: others take over at their next beat. Raises StoreError."""
        await self._store.call(scripts.RELEASE, self._keys, (self._router,), budget_s)
