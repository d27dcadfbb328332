"""The index in Redis, for those who were not there when it was told. A thin shell over scripts.

Feeders open *holders* and write; anybody looks up. Long chains go in chunks, so that no call keeps
Redis from others for much more than a millisecond. What a call did is known by its reply alone:
StoreError means that some chunks may be written, and adding and removing again is harmless.

Not here: what lies in Redis and why (scripts.py); what values say (masks.py); when to sweep, who
feeds (leases.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from roost_router.store import scripts
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.masks import bucket_blocks, depth_classes, levels, thinned
from roost_wire.kv_events import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A key that is not refreshed for so long vanishes, and so does a holder that nobody writes for.
TTL_S: Final = 86_400
ID_BYTES: Final = 8
#: Ids of one call: about 1 ms of Redis' CPU.
CHUNK_IDS: Final = 256
#: Ids of a lookup; of longer chains every second is sent, or every fourth, ... Reading 2,048 costs
#: Redis a third of the call.
LOOKUP_IDS: Final = 512
#: So many of them are looked at, at most: some 0.3 ms.
MAX_PROBES: Final = 192
#: Of one call of `sweep`; about 1 ms.
SWEEP_BUCKETS: Final = 256
SWEEP_BLOCKS: Final = 1024


class IndexRefusalError(Exception):
    """The index does not take this write. Only what is below is raised."""


class HolderGoneError(IndexRefusalError):
    """The holder is retired, or was lost with the whole index: open it again, tell it anew."""


class FencedError(IndexRefusalError):
    """Another feeder has a greater fence, or knows a newer epoch: stop writing."""


class IndexFullError(IndexRefusalError):
    """All numbers are taken until the sweep has been round: try later."""


class Calls(Protocol):
    """What is needed of client.Store."""

    async def call(
        self,
        script: scripts.Script,
        keys: Sequence[bytes],
        args: Sequence[bytes | int],
        budget_s: float,
    ) -> Any:
        """See client.Store."""


@dataclass(frozen=True, slots=True)
class Holder:
    """One epoch of one replica in one tier, as a feeder with this fence writes for it."""

    number: int  # its bit in masks
    serial: bytes
    fence: int


@dataclass(frozen=True, slots=True)
class HolderName:
    """Whose blocks a bit of a mask stands for."""

    replica: bytes
    tier: Tier
    epoch: int


@dataclass(frozen=True, slots=True)
class Found:
    """Who holds how much of a chain: (leading blocks, mask of numbers in `holders`)."""

    levels: list[tuple[int, int]]
    holders: dict[int, HolderName]


@dataclass(frozen=True, slots=True)
class Written:
    """Blocks new or gone, others evicted for them, ids skipped because their key was poisoned."""

    changed: int
    evicted: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Swept:
    """What a call of the sweep did."""

    is_round_over: bool
    blocks: int  # seen
    removed: int  # of them nobody living had
    freed: int  # numbers that may be given away again
    strange: int  # keys that were no buckets


class RedisIndex:
    """The index of one namespace. Every method raises StoreError; `budget_s` is of each chunk."""

    def __init__(self, store: Calls, prefix: bytes, *, max_blocks: int) -> None:
        """`prefix` has the hash tag: b"roost:{1a2b3c4d}:". See masks.bucket_blocks."""
        self._store = store
        self._keys = (prefix + b"holders",)
        self._bucket_blocks = bucket_blocks(max_blocks)
        self._version = b""  # of the table that `_holders` and `_live` are from
        self._holders: dict[int, HolderName] = {}
        self._live = 0

    async def open_holder(
        self,
        replica: bytes,
        tier: Tier,
        epoch: int,
        fence: int,
        *,
        anew: bool = False,
        budget_s: float = 0.5,
    ) -> Holder:
        """Begin or go on writing for an epoch of a replica; the one before it is dead at once.

        `anew`: what the index says of this epoch is dead, too, in O(1) (the replica dropped its
        cache, or what was told of it was missed). Numbers of 0 and above only. Raises FencedError
        and IndexFullError. Call it now and then for replicas that change nothing: a holder that is
        not written for is given up after TTL_S.
        """
        args = (replica, tier.value.encode(), epoch, fence, int(anew), TTL_S)
        _, number, serial, _ = await self._call(scripts.OPEN_HOLDER, args, budget_s, 4)
        return Holder(number, serial, fence)

    async def retire_holder(self, holder: Holder, budget_s: float = 0.5) -> None:
        """All that it holds is dead at once. Raises HolderGoneError and FencedError."""
        args = (holder.number, holder.serial, holder.fence)
        await self._call(scripts.RETIRE_HOLDER, args, budget_s, 1)

    async def add(
        self, holder: Holder, ids: bytes, first_depth: int, budget_s: float = 0.5
    ) -> Written:
        """Blocks became resident: `ids` one after the other, the first at `first_depth` (from 0).

        As `add_each`.
        """
        depths = range(first_depth, first_depth + len(ids) // ID_BYTES)
        return await self.add_each(holder, ids, depths, budget_s)

    async def add_each(
        self, holder: Holder, ids: bytes, depths: Sequence[int], budget_s: float = 0.5
    ) -> Written:
        """Blocks of any chains became resident, parents before their children; each at its depth.

        Where a bucket is full, what nobody living has goes, then the deepest blocks. Raises
        HolderGoneError, FencedError; ValueError for ids that are not whole, or are not as many as
        `depths`.
        """
        changed = evicted = skipped = 0
        chunks, classes = _chunks(ids), depth_classes(depths)
        if len(classes) * ID_BYTES != len(ids):
            raise ValueError(f"{len(classes)} depths are not for {len(ids)} bytes of ids")
        for at, chunk in chunks:
            args = (
                *(holder.number, holder.serial, holder.fence, TTL_S, self._bucket_blocks),
                *(classes[at : at + CHUNK_IDS], chunk),
            )
            reply = await self._call(scripts.ADD, args, budget_s, 4)
            changed, evicted, skipped = changed + reply[1], evicted + reply[2], skipped + reply[3]
        return Written(changed, evicted, skipped)

    async def remove(self, holder: Holder, ids: bytes, budget_s: float = 0.5) -> Written:
        """Blocks are gone from a holder. Raises as `add`."""
        changed = skipped = 0
        for _, chunk in _chunks(ids):
            args = (holder.number, holder.serial, holder.fence, TTL_S, chunk)
            reply = await self._call(scripts.REMOVE, args, budget_s, 3)
            changed, skipped = changed + reply[1], skipped + reply[2]
        return Written(changed, 0, skipped)

    async def lookup(self, ids: bytes, budget_s: float) -> Found:
        """Who holds how much of the chain `ids`.

        Exact up to LOOKUP_IDS blocks; depths of longer chains are a power of two too coarse,
        rounded down, by less than 1/256 of the chain. One call; a second where the holders changed
        since the last. Raises ValueError for ids that are not whole.
        """
        _check_whole(ids)
        asked, step = thinned(ids, LOOKUP_IDS)
        args = (asked, MAX_PROBES)
        version, *runs = await self._call(scripts.LOOKUP, args, budget_s, 0) or (b"",)
        if version != self._version:
            await self._read_holders(budget_s)
        return Found(levels(runs, self._live, step), self._holders)

    async def holders(self, budget_s: float = 0.5) -> dict[int, HolderName]:
        """Whose blocks the index has, by number. O(holders)."""
        await self._read_holders(budget_s)
        return {number: name for number, name in self._holders.items() if self._live >> number & 1}

    async def sweep(self, budget_s: float = 0.5) -> Swept:
        """Clean the next buckets of who is dead, where the last call, anybody's, ended.

        A round is 128 calls where nobody is dead, and one for each 1,024 blocks where somebody is.
        It renews the life of what it passes, too: an index has to be swept once a day to stay.
        """
        args = (SWEEP_BUCKETS, SWEEP_BLOCKS, TTL_S)
        reply = await self._call(scripts.SWEEP, args, budget_s, 1)
        if reply[0] == b"EMPTY":
            return Swept(True, 0, 0, 0, 0)
        _, cursor, _, *counts = reply
        return Swept(cursor == 0, *counts)

    async def _read_holders(self, budget_s: float) -> None:
        reply = await self._call(scripts.LIST_HOLDERS, (), budget_s, 0)
        version, live, *records = reply or (b"", b"")
        names = {
            number: _holder_name(record)
            for number, record in zip(records[::2], records[1::2], strict=True)
        }
        self._holders = {number: name for number, name in names.items() if name is not None}
        known = sum(1 << number for number in self._holders)
        self._version, self._live = version, int.from_bytes(live, "little") & known

    async def _call(
        self, script: scripts.Script, args: tuple[bytes | int, ...], budget_s: float, least: int
    ) -> Any:
        reply = await self._store.call(script, self._keys, args, budget_s)
        if not isinstance(reply, list):
            raise StoreError(StoreFault.NONSENSE, f"{script.name} replied no list")
        match reply[:1]:
            case [b"GONE"]:
                raise HolderGoneError
            case [b"FENCED"]:
                raise FencedError
            case [b"FULL"]:
                raise IndexFullError
        if len(reply) < least:
            raise StoreError(StoreFault.NONSENSE, f"{script.name} replied {len(reply)} items")
        return reply


def _holder_name(record: bytes) -> HolderName | None:
    """None for a record that no script wrote."""
    try:
        _, _, epoch, tier, replica = record.split(b" ", 4)
        return HolderName(replica, Tier(tier.decode()), int(epoch))
    except ValueError:
        return None


def _check_whole(ids: bytes) -> None:
    if len(ids) % ID_BYTES:
        raise ValueError(f"ids are {ID_BYTES} bytes each, these are {len(ids)} bytes")


def _chunks(ids: bytes) -> list[tuple[int, bytes]]:
    """Parts of at most CHUNK_IDS ids, each with the place of its first."""
    _check_whole(ids)
    size = ID_BYTES * CHUNK_IDS
    return [(at // ID_BYTES, ids[at : at + size]) for at in range(0, len(ids), size)]
