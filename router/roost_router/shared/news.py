"""News: what a router tells the others, and its bytes. Pure.

A *batch* is all that one router has to tell since its last one. It names the replicas that it is
about, each by URL and by the start of its process (the epoch), and then has, in order:

    Expected   a prompt is being computed there        (chain)
    Settled    no more: it was computed, or never will be
    Touched    a prompt was computed there             (stamp, chain)
    Dropped    what lies below a floor is gone there   (index/prefix_index.py)
    Load       what this router has there, as it stands: what a lost batch said is made up for
    View       all that this router believes of it     (floor, touches), for those who missed news
    Anew       before views: all that was expected is settled, but for what comes next

Bytes: msgpack arrays; chains as packed 64-bit integers, little-endian. Batches are sealed before
they leave the process (store/seal.py): what arrives was made by a router that has the secret, and
`unpack` checks only what a router of another version could get wrong.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

#: Of the bytes; another one is not read.
VERSION: Final = 1

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Stamp = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 62)]


class NewsError(ValueError):
    """Bytes are no batch."""


class Expected(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A request went to `replica` (its place in the batch) and is not computed yet."""

    request: _Count  # of this router
    replica: _Count
    uncached_tokens: _Count
    chain: bytes


class Settled(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A request that was expected is no more."""

    request: _Count


class Touched(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A prompt was computed."""

    replica: _Count
    stamp: _Stamp
    chain: bytes


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """See index/prefix_index.py's Floor."""

    replica: _Count
    stamp: _Stamp
    keep: _Count


class Load(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Requests that one router has on a replica."""

    replica: _Count
    queued_tokens: _Count = 0  # uncached, of those without a first byte
    queued_prompt_tokens: _Count = 0  # of the same, cached ones included
    num_in_flight: _Count = 0
    num_decoding: _Count = 0
    released_tokens: _Count = 0  # of KV, by all that ended since the router started


class View(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """All that a router believes of a replica's cache."""

    replica: _Count
    stamp: _Stamp  # floor ...
    keep: _Count
    touches: list[tuple[_Stamp, _Count, bytes]]  # stamp, place of the first, blocks


class Anew(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Nothing is expected any more."""


News = Expected | Settled | Touched | Dropped | Load | View | Anew


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What one router tells at once."""

    version: int
    router: int
    number: _Count  # of its batches, from 0
    oldest: _Count  # of its requests that are expected; those before are settled
    replicas: list[tuple[str, float]]  # URL; seconds since 1970 when it started, 0: unknown
    news: list[News]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Batch)


def pack(batch: Batch) -> bytes:
    """The bytes of a batch. O(bytes)."""
    return _encoder.encode(batch)


def unpack(data: bytes) -> Batch:
    """A batch from its bytes. Raises NewsError. O(bytes)."""
    try:
        batch = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise NewsError(f"no batch of news: {error}") from None
    if batch.version != VERSION:
        raise NewsError(f"news of version {batch.version}, this router reads {VERSION}")
    num_replicas = len(batch.replicas)
    for one in batch.news:
        if not isinstance(one, Settled | Anew) and one.replica >= num_replicas:
            raise NewsError(f"replica {one.replica} of {num_replicas}")
    return batch


def pack_chain(chain: Sequence[int]) -> bytes:
    """64-bit block hashes as bytes."""
    packed = array("Q", chain)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_chain(data: bytes) -> list[int]:
    """The reverse. Raises NewsError."""
    packed = array("Q")
    try:
        packed.frombytes(data)
    except ValueError:
        raise NewsError(f"{len(data)} bytes are no chain") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
