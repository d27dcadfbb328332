"""KV events: how a replica tells which blocks of KV cache it holds, as plain data.

    BlockStored(hashes, parent, tokens, tier)   from now on these blocks are resident in the tier
    BlockRemoved(hashes, tier)                  from now on they are not
    AllBlocksCleared()                          nothing is resident in any tier

Events are ordered. Replaying them over the empty set gives exactly what the replica holds after
the last of them, per tier: a hash stands for one block (there are no duplicates to count), and a
block is stored after its parent and removed before it, so what is resident is closed under
prefixes at any moment.

A `KvEventBatch` carries the replica's epoch, a number that changes when the process starts anew,
and a sequence number that counts batches of that epoch from 0. Another epoch: all that was known
is void. A gap in the sequence: something was lost. It also carries a digest of each tier, the XOR
of the hashes resident after its last event, which tells a divergence in O(1). A batch without
events is a heartbeat; one that begins with AllBlocksCleared a snapshot.

Not here: the encodings of other engines, transport, replay buffers.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable


class Tier(enum.Enum):
    """Which memory a block lies in."""

    DEVICE = "device"  # where attention reads it
    HOST = "host"  # to be copied back before it is read


class BlockStored(msgspec.Struct, frozen=True):
    """Consecutive blocks of a chain became resident."""

    block_hashes: tuple[int, ...]  # in chain order, at least one
    parent_hash: int | None  # of the block before the first; None: it begins a prompt
    token_ids: tuple[int, ...]  # of all the blocks, block_size for each
    block_size: int  # tokens
    tier: Tier


class BlockRemoved(msgspec.Struct, frozen=True):
    """Blocks are not resident in this tier any more."""

    block_hashes: tuple[int, ...]
    tier: Tier


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """The cache was emptied, all tiers of it."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True):
    """What happened since the batch before, and what that led to."""

    epoch: int
    sequence: int  # 0 for the first batch of an epoch, then without gaps
    events: list[KvEvent]
    device_digest: int
    host_digest: int


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
            same = (last.tier, last.block_size) == (event.tier, event.block_size)
            return same and event.parent_hash == last.block_hashes[-1]
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
    for event in run:
        assert not isinstance(event, AllBlocksCleared)
        hashes += event.block_hashes
        if isinstance(event, BlockStored):
            token_ids += event.token_ids
    if isinstance(first, BlockStored):
        return BlockStored(
            tuple(hashes), first.parent_hash, tuple(token_ids), first.block_size, first.tier
        )
    return BlockRemoved(tuple(hashes), first.tier)
