"""KV events: how a replica tells which blocks of KV cache it holds, as plain data.

    BlockStored(hashes, parent, tokens, tier)   from now on these blocks are resident in the tier
    BlockRemoved(hashes, tier)                  from now on they are not
    AllBlocksCleared()                          nothing is resident in any tier

This is the vocabulary into which kv_dialects/ translates what engines send. Block hashes are names
within one replica and data-parallel rank, unsigned and of 64 bits, whatever the engine calls them.

Events are ordered. Our engine is exact: replaying its events over the empty set gives what it
holds after the last of them, per tier: a hash stands for one block (there are no duplicates to
count), and a block is stored after its parent and removed before it, so what is resident is closed
under prefixes at any moment. Other engines tell some blocks twice, and some with a parent that was
never told (its content is more than tokens, or the event was lost): such a block is not the
beginning of a prompt, it has a parent that is not resident.

A `KvEventBatch` carries a sequence number that counts batches from 0, or from 1. A gap in it:
something was lost. Our engine also tells its epoch, a number that changes when the process starts
anew: all that was known is void. And a digest of each tier, the XOR of the hashes resident after
the batch's last event, which tells a divergence in O(1), and its load. A batch without events is
a heartbeat; one that begins with AllBlocksCleared a snapshot.

Not here: encodings (kv_dialects/), transport, replay buffers.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import msgspec

from roost_wire.told_load import ToldLoad

if TYPE_CHECKING:
    from collections.abc import Iterable


#: Asked for in place of the number of a batch: a snapshot, whatever is kept. It marks the ends of
#: answers, so that no batch has it. Only our engine understands; others have nothing from there on.
SNAPSHOT: Final = 2**64 - 1


class Tier(enum.Enum):
    """Which memory a block lies in."""

    DEVICE = "device"  # where attention reads it
    HOST = "host"  # to be copied back before it is read


class BlockStored(msgspec.Struct, frozen=True, gc=False):
    """Consecutive blocks of a chain became resident.

    Adapter and salt are the chain's: they tell blocks of equal tokens apart. They count where
    `parent_hash` is None; a child inherits its parent's, whatever its own event says.

    Dynamo tells hashes of the blocks' tokens in place of the tokens: then `token_ids` is empty and
    `local_hashes` has one `token_chain.local_hash` for each block.
    """

    block_hashes: tuple[int, ...]  # in chain order, at least one
    parent_hash: int | None  # of the block before the first; None: it begins a prompt
    token_ids: tuple[int, ...]  # of all the blocks, block_size for each; 32 bits each
    block_size: int  # tokens
    tier: Tier
    lora_name: str | None = None
    cache_salt: str | None = None
    local_hashes: tuple[int, ...] = ()


class BlockRemoved(msgspec.Struct, frozen=True, gc=False):
    """Blocks are not resident in this tier any more."""

    block_hashes: tuple[int, ...]
    tier: Tier


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    """The cache was emptied, all tiers of it."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What happened since the batch before, and what that led to."""

    sequence: int  # goes up by one with each batch of an epoch
    events: list[KvEvent]
    epoch: int | None = None  # None: the engine does not tell
    device_digest: int | None = None  # as the epoch
    host_digest: int | None = None  # as the epoch
    load: ToldLoad | None = None  # of the replica, after the batch; as the epoch
    sent_at: float = 0.0  # Unix seconds by the engine's clock; tells two batches of a number apart
    rank: int | None = None  # data-parallel; None: the engine does not tell


def merge_events(events: Iterable[KvEvent]) -> list[KvEvent]:
    """The same history in fewer events: runs of a chain, runs of removals. O(events).

    A prefill stores its blocks one after the other; told one by one they would repeat the parent
    each time.
    """
    merged: list[KvEvent] = []
    run: list[KvEvent] = []
    for event in events:
        if run and not _continues(run[-1], event):
            merged.append(_join(run))
            run = []
        run.append(event)
    if run:
        merged.append(_join(run))
    return merged


def _continues(last: KvEvent, event: KvEvent) -> bool:
    match last, event:
        case BlockStored(), BlockStored():
            return event.parent_hash == last.block_hashes[-1] and (
                (last.tier, last.block_size, last.lora_name, last.cache_salt)
                == (event.tier, event.block_size, event.lora_name, event.cache_salt)
            )
        case BlockRemoved(), BlockRemoved():
            return last.tier is event.tier
    return False


def _join(run: list[KvEvent]) -> KvEvent:
    """One event for a run in which each event continues the one before."""
    first = run[0]
    if len(run) == 1 or isinstance(first, AllBlocksCleared):
        return first
    hashes: list[int] = []
    token_ids: list[int] = []
    local_hashes: list[int] = []
    for event in run:
        assert not isinstance(event, AllBlocksCleared)
        hashes += event.block_hashes
        if isinstance(event, BlockStored):
            token_ids += event.token_ids
            local_hashes += event.local_hashes
    if isinstance(first, BlockStored):
        return msgspec.structs.replace(
            first,
            block_hashes=tuple(hashes),
            token_ids=tuple(token_ids),
            local_hashes=tuple(local_hashes),
        )
    return BlockRemoved(tuple(hashes), first.tier)
