"""Members of a cluster as the store has them: who is here, sealed.

What a member says is sealed together with its name: without the secret nobody adds a replica that
would be sent prompts. Whoever can write to Redis can remove members, or bring back what one said
before; routers then ask a replica that does not answer.

Not here: how long what was heard counts (discovery/registered.py).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from roost_router.discovery.registered import Registration
from roost_router.store import scripts
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.replies import bytes_of, expecting
from roost_router.store.seal import Seal, SealError

if TYPE_CHECKING:
    from roost_router.store.index import Calls
    from roost_router.store.secret import ClusterSecret

_VERSION: Final = 1
_log = logging.getLogger(__name__)


class _Says(msgspec.Struct, frozen=True, array_like=True):
    version: int
    url: str
    life_s: float
    is_here: bool


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Says)


class Members:
    """Of one cluster."""

    def __init__(self, store: Calls, secret: ClusterSecret) -> None:
        self._store: Final = store
        self._key: Final = secret.prefix + b"members"
        self._seal: Final = Seal(secret.seal_key)
        self._refused: set[bytes] = set()  # what could not be read and was told of

    async def write(
        self, member: bytes, url: str, life_s: float, budget_s: float, *, is_here: bool = True
    ) -> None:
        """A member is here for `life_s` seconds from now, or is not any more. Raises StoreError."""
        says = _encoder.encode(_Says(_VERSION, url, life_s, is_here))
        sealed = self._seal.close(says, self._about(member))
        args = (member, round(life_s * 1e3), sealed)
        await self._store.call(scripts.REGISTER, (self._key,), args, budget_s)

    async def read(self, budget_s: float) -> list[Registration]:
        """All members; what was not written with the secret is left out. Raises StoreError."""
        reply = await self._store.call(scripts.LIST_MEMBERS, (self._key,), (), budget_s)
        if not isinstance(reply, list) or len(reply) % 3:
            raise StoreError(StoreFault.NONSENSE, "members are not listed in threes")
        read = []
        unread = set()
        for member, left_ms, sealed in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            registration = self._open(member, left_ms, sealed)
            if registration is None:
                unread.add(bytes_of(member))
            else:
                read.append(registration)
        if unread - self._refused:
            _log.warning("%d members that cannot be read are left out", len(unread))
        self._refused = unread
        return read

    def _open(self, member: Any, left_ms: Any, sealed: Any) -> Registration | None:
        with expecting():
            member, sealed, left_s = bytes_of(member), bytes_of(sealed), int(left_ms) / 1e3
        try:
            says = _decoder.decode(self._seal.open(sealed, self._about(member)))
        except (SealError, msgspec.DecodeError):
            return None
        if says.version != _VERSION:
            return None
        return Registration(member, sealed, says.url, says.life_s, left_s, says.is_here)

    def _about(self, member: bytes) -> bytes:
        return self._key + b" " + member
