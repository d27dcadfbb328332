"""Keys of clients, published in the store for all routers: written, read, followed.

One value holds the lines of a file of keys (keys.py: hashes and names, no key), sealed, and a
serial that grows with each publication. Routers read it every LOOK_S, so that a key that is left
out opens nothing soon after.

Invariants
- Until keys were read once, the follower has told nothing, and nobody comes in.
- What was read stays when the store is away, has lost it, or has something unusable or older: who
  can write to Redis, and lacks the secret, lets nobody in, and brings no old list back but to a
  router that starts.
- A store that has lost the keys gets them back from any router that knows them.

Not here: who comes in (access.py, http/gate.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from roost_router.keys import KeyFileError, KeyRing, parse_keys
from roost_router.store.errors import StoreError
from roost_router.store.seal import Seal, SealError

if TYPE_CHECKING:
    from roost_router.store.client import Store
    from roost_router.store.secret import ClusterSecret

#: Seconds between two reads.
LOOK_S: Final = 3.0
#: Until keys were read for the first time.
_FIRST_LOOK_S: Final = 0.25
_BUDGET_S: Final = 1.0
_VERSION: Final = 1
_log = logging.getLogger(__name__)


class _Published(msgspec.Struct, frozen=True, array_like=True):
    version: int
    serial: int
    lines: str


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Published)


class UnusableKeysError(ValueError):
    """What is published cannot be used; the message says why."""


class Publication(NamedTuple):
    """What is published."""

    serial: int
    keys: KeyRing


class PublishedKeys:
    """Of one cluster."""

    def __init__(self, store: Store, secret: ClusterSecret) -> None:
        self._store: Final = store
        self._key: Final = secret.prefix + b"api-keys"
        self._seal: Final = Seal(secret.seal_key)

    async def publish(self, text: str, unix_us: int) -> int:
        """Let routers take the keys of a file from now on; how many there are.

        `unix_us`: microseconds since 1970, of any clock. Raises KeyFileError and StoreError.
        """
        num_keys = len(parse_keys(text))
        serial = unix_us
        before = await self.fetch()
        if before is not None:
            with contextlib.suppress(UnusableKeysError):  # it is replaced
                serial = max(serial, self.read(before).serial + 1)
        lines = [line.strip() for line in text.splitlines()]
        kept = "\n".join(line for line in lines if line and not line.startswith("#"))
        packed = _encoder.encode(_Published(_VERSION, serial, kept))
        await self._store.set(self._key, self._seal.close(packed, self._key), None, _BUDGET_S)
        return num_keys

    async def fetch(self) -> bytes | None:
        """What is published, sealed. Raises StoreError."""
        return await self._store.get(self._key, _BUDGET_S)

    async def restore(self, sealed: bytes) -> None:
        """Give back what `fetch` has given, unless something is there. Raises StoreError."""
        await self._store.set(self._key, sealed, None, _BUDGET_S, is_new=True)

    def read(self, sealed: bytes) -> Publication:
        """Open it. Raises UnusableKeysError."""
        try:
            published = _decoder.decode(self._seal.open(sealed, self._key))
            if published.version != _VERSION:
                raise UnusableKeysError(f"they are of version {published.version}")
            return Publication(published.serial, parse_keys(published.lines))
        except (SealError, KeyFileError, msgspec.DecodeError) as error:
            raise UnusableKeysError(str(error)) from None


class KeyFollower:
    """Tells a router the keys that are published, and each change."""

    def __init__(self, published: PublishedKeys, told: Callable[[KeyRing], None]) -> None:
        self._published: Final = published
        self._told: Final = told
        self._serial = -1
        self._sealed = b""  # what was read last and is in use
        self._note = ""  # what was logged last
        self._has_looked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, wait_s: float) -> None:
        """Begin; return after the first look, or after `wait_s`."""
        self._task = asyncio.create_task(self._run())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._has_looked.wait()

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except StoreError as error:
                self._warn(f"keys cannot be read from the store: {error}")
            except Exception:  # noqa: BLE001
                # A defect of ours must not freeze who may come in.
                _log.exception("following the published keys failed")
            self._has_looked.set()
            await asyncio.sleep(LOOK_S if self._sealed else _FIRST_LOOK_S)

    async def _look(self) -> None:
        sealed = await self._published.fetch()
        if sealed is None:
            if self._sealed:
                await self._published.restore(self._sealed)
                self._warn("the store had lost the keys; they were given back to it")
            else:
                self._warn("nobody comes in: no keys are published, see `roost keys publish`")
            return
        if sealed == self._sealed:
            self._note = ""
            return
        try:
            publication = self._published.read(sealed)
        except UnusableKeysError as error:
            self._warn(f"keys stay as they were: those in the store cannot be used: {error}")
            return
        if publication.serial < self._serial:
            self._warn("keys stay as they were: those in the store are older; publish them again")
            return
        self._serial, self._sealed, self._note = publication.serial, sealed, ""
        self._told(publication.keys)
        _log.info("%d keys are published", len(publication.keys))

    def _warn(self, note: str) -> None:
        if note != self._note:
            self._note = note
            _log.warning("%s", note)
