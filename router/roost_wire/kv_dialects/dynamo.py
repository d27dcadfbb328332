"""Dynamo's router events: JSON, one event each.

Source: lib/kv-router/src/protocols.rs (RouterEvent).

    {"worker_id": 7, "storage_tier": "device",
     "event": {"event_id": 3, "dp_rank": 0, "data": {"stored": {"parent_hash": null,
       "blocks": [{"block_hash": 1, "tokens_hash": 2, "mm_extra_info": null}]}}}}

`data` is {"stored": ...}, {"removed": {"block_hashes": [...]}} or "cleared". Tiers are device,
host_pinned, disk, external, in snake or camel case. Instead of tokens there is `tokens_hash`, XXH3
of seed 1337 over them: the local hash of our token chain (roost_wire.token_chain), unless the block
belongs to an adapter or a namespace, which are mixed into the seed: such a block has a name that no
prompt of ours has. What a cache owner beside the worker holds is another medium.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final

import msgspec

from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut, Rank, block_name
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
    Tier,
)

_TIERS: Final = {"device": Tier.DEVICE, "hostpinned": Tier.HOST}

_Hash = Annotated[int, msgspec.Meta(ge=0)]


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens_hash: _Hash
    mm_extra_info: dict[str, Any] | None = None


class _StoredData(msgspec.Struct, gc=False):
    blocks: list[_Block]
    parent_hash: int | None = None


class _RemovedData(msgspec.Struct, gc=False):
    block_hashes: list[int]


class _Data(msgspec.Struct, gc=False):
    stored: _StoredData | None = None
    removed: _RemovedData | None = None


class _Event(msgspec.Struct, gc=False):
    event_id: int
    data: _Data | str
    dp_rank: Rank = 0


class _RouterEvent(msgspec.Struct, gc=False):
    event: _Event
    storage_tier: str = "device"
    residency_domain: str = "worker"


_decoder = msgspec.json.Decoder(_RouterEvent)


class DynamoDecoder:
    """Decodes the events of one worker."""

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens; events do not tell."""
        self._block_size = block_size
        self.left_out: Counter[LeftOut] = Counter()

    def decode(self, payload: bytes) -> KvEventBatch:
        """The event as a batch. KvDecodeError."""
        try:
            told = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KvDecodeError(f"not a router event: {error}") from None
        event = self._translate(told)
        if isinstance(event, LeftOut):
            self.left_out[event] += 1
        return KvEventBatch(
            sequence=told.event.event_id,
            events=[] if isinstance(event, LeftOut) else [event],
            rank=told.event.dp_rank,
        )

    def _translate(self, told: _RouterEvent) -> KvEvent | LeftOut:
        if told.residency_domain != "worker":
            return LeftOut.OTHER_MEDIUM
        data, tier = told.event.data, _TIERS.get(told.storage_tier.lower().replace("_", ""))
        if data == "cleared":
            return AllBlocksCleared()
        if isinstance(data, str) or (data.stored is None and data.removed is None):
            return LeftOut.UNKNOWN_TYPE
        if tier is None:
            return LeftOut.OTHER_MEDIUM
        if data.removed is not None:
            return BlockRemoved(tuple(map(block_name, data.removed.block_hashes)), tier)
        assert data.stored is not None
        return self._stored(data.stored, tier)

    def _stored(self, data: _StoredData, tier: Tier) -> BlockStored | LeftOut:
        blocks = data.blocks
        num_text = next(
            (i for i, block in enumerate(blocks) if block.mm_extra_info is not None), len(blocks)
        )
        if not num_text:
            return LeftOut.NOT_TEXT if blocks else LeftOut.NO_TOKENS
        parent = data.parent_hash
        return BlockStored(
            tuple(block_name(block.block_hash) for block in blocks[:num_text]),
            None if parent is None else block_name(parent),
            (),
            self._block_size,
            tier,
            local_hashes=tuple(block_name(block.tokens_hash) for block in blocks[:num_text]),
        )
