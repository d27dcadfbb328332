"""What the dialects have in common: the error, what is left out, names of blocks.

A decoder serves one stream of events (one replica, one data-parallel rank), for it may have to
remember what an earlier event said. Fields that it does not know are ignored. Events that it
understands and that do not count, or whose type it does not know, are left out and counted; a
payload that cannot be read raises KvDecodeError and leaves the decoder as it was.

Why some events do not count:

    OTHER_GROUP    layers with a sliding window or a recurrent state keep some blocks only, under
                   the same hashes; a prefix is resident if the layers with full attention have it
    OTHER_MEDIUM   disks and shared stores: getting a block from there costs about what computing
                   it costs, and a shared store says nothing about where to route
    NO_TOKENS      a block that cannot be named: without tokens, or not filled
    NOT_TEXT       images, sounds, embeddings: the content is more than its token ids. Blocks up to
                   there are told; those after it have a parent that nobody was told of
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from roost_wire.kv_events import Tier

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
BlockSize = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=2**16)]
#: As engines write a block's hash.
WireHash = int | bytes

_64_BITS: Final = 2**64 - 1


class KvDecodeError(ValueError):
    """A payload that is not what its dialect says. Only this batch is lost."""


class LeftOut(enum.Enum):
    """Why an event was not told on."""

    UNKNOWN_TYPE = "unknown_type"
    OTHER_GROUP = "other_group"
    OTHER_MEDIUM = "other_medium"
    NO_TOKENS = "no_tokens"
    NOT_TEXT = "not_text"


_TIERS: Final = {
    None: Tier.DEVICE,  # engines of 2025 knew no other
    "GPU": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
}


def tier_of(medium: str | None) -> Tier | None:
    """The tier of vLLM's and SGLang's media; None: one that does not count."""
    return _TIERS.get(medium)


def block_name(wire_hash: WireHash) -> int:
    """An engine's hash as an unsigned number of 64 bits.

    vLLM's hashes are bytes, or their last eight as a number: both give the same name. SGLang's
    numbers are signed.
    """
    if isinstance(wire_hash, bytes):
        return int.from_bytes(wire_hash[-8:])
    return wire_hash & _64_BITS


def block_names(wire_hashes: tuple[WireHash, ...]) -> tuple[int, ...]:
    """`block_name` of each; the same tuple if it has nothing but names. O(hashes)."""
    try:
        lowest = min(wire_hashes, default=0)
    except TypeError:  # numbers and bytes mixed
        lowest = b""
    if isinstance(lowest, int) and lowest >= 0:
        return wire_hashes  # type: ignore[return-value]
    return tuple(map(block_name, wire_hashes))
