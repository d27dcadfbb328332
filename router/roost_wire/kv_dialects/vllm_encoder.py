"""Our engine's KV events in vLLM's map dialect, so that any router can follow our engine.

What vLLM does not tell rides on an event that says nothing to others: each batch ends with a
removal of no blocks that has two keys of its own,

    "roost": [epoch, digest of the device, digest of the host]      "roost_load": see told_load.py

Rejected: a fourth element of the batch (readers in Rust refuse an array that is too long), an event
type of our own (readers that do not know it drop the batch it is in), a fourth frame (readers
unpack three), another topic (the empty topic, which everybody subscribes to, matches it).

The structs have vLLM's fields in vLLM's order.
"""

from __future__ import annotations

import msgspec

from roost_wire.kv_events import BlockRemoved, BlockStored, KvEvent, KvEventBatch, Tier
from roost_wire.told_load import ToldLoad

_MEDIA = {Tier.DEVICE: "GPU", Tier.HOST: "CPU"}
#: All layers of our engine keep all blocks.
_GROUP = 0
_KIND = "full_attention"


class _Stored(msgspec.Struct, tag="BlockStored", omit_defaults=True, gc=False):
    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", omit_defaults=True, gc=False):
    block_hashes: tuple[int, ...]
    medium: str | None
    group_idx: int | None = None
    roost: tuple[int, int, int] | None = None
    roost_load: ToldLoad | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


_encoder = msgspec.msgpack.Encoder()


def encode_batch(batch: KvEventBatch) -> bytes:
    """A batch as vLLM writes it, for `VllmDecoder`; its number goes into a frame of its own."""
    events: list[_Stored | _Removed | _Cleared] = [_wire(event) for event in batch.events]
    if batch.epoch is not None:
        assert batch.device_digest is not None
        assert batch.host_digest is not None
        state = (batch.epoch, batch.device_digest, batch.host_digest)
        events.append(_Removed((), _MEDIA[Tier.DEVICE], _GROUP, state, batch.load))
    wire: tuple[object, ...] = (batch.sent_at, events)
    return _encoder.encode(wire if batch.rank is None else (*wire, batch.rank))


def _wire(event: KvEvent) -> _Stored | _Removed | _Cleared:
    match event:
        case BlockStored():
            return _Stored(
                event.block_hashes,
                event.parent_hash,
                event.token_ids,
                event.block_size,
                None,
                _MEDIA[event.tier],
                event.lora_name,
                _GROUP,
                _KIND,
            )
        case BlockRemoved():
            return _Removed(event.block_hashes, _MEDIA[event.tier], _GROUP)
        case _:
            return _Cleared()
