"""vLLM's KV events, all generations, and our engine's, which are vLLM's and a little more.

Source: vllm/distributed/kv_events.py. Since June 2026 events are maps; before, arrays that grew at
their end with the years:

    ["BlockStored", hashes, parent, token_ids, block_size, lora_id, medium, lora_name, extra_keys,
     group_idx, kv_cache_spec_kind, ...]
    ["BlockRemoved", hashes, medium, group_idx, ...]        ["AllBlocksCleared"]

Hashes are bytes, or the last eight of them as an unsigned number. `extra_keys` has for each block
what its hash includes beside tokens: the adapter's name, images as (id, offset) or, in 2025, as
strings, the salt (first block of a prompt only), digests of embeddings. A string in a prompt's
first block is therefore taken for a salt: if it was an image, nobody asks for that salt.
Removals name the group of layers, not its kind, so the decoder remembers which do not count.

Our engine ends each batch with a removal of no blocks that has keys of its own, see
vllm_encoder.py. A load that cannot be read is none: it must not cost the batch.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from roost_wire.kv_dialects.dialect import (
    BlockSize,
    LeftOut,
    TokenId,
    WireHash,
    block_name,
    block_names,
    tier_of,
)
from roost_wire.kv_dialects.tagged_batch import TaggedBatches
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
    Tier,
)
from roost_wire.told_load import ToldLoad, read_packed

#: Of layers that do not keep all blocks of a prefix.
_PARTIAL_KINDS: Final = frozenset(
    {
        "sliding_window",
        "sliding_window_mla",
        "mamba",
        "chunked_local_attention",
        "encoder_only_attention",
        "cross_attention",
    }
)


_NO_LOAD: Final = msgspec.Raw()


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: tuple[WireHash, ...]
    parent_block_hash: WireHash | None
    token_ids: tuple[TokenId, ...]
    block_size: BlockSize
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: tuple[WireHash, ...]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    roost: tuple[int, int, int] | None = None
    roost_load: msgspec.Raw = _NO_LOAD


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _ArrayStored(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: tuple[WireHash, ...]
    parent_block_hash: WireHash | None
    token_ids: tuple[TokenId, ...]
    block_size: BlockSize
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _ArrayRemoved(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: tuple[WireHash, ...]
    medium: str | None = None
    group_idx: int | None = None


class _ArrayCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


_WireEvent = _Stored | _Removed | _Cleared | _ArrayStored | _ArrayRemoved | _ArrayCleared


class VllmDecoder:
    """Decodes the stream of one replica and rank."""

    def __init__(self) -> None:
        self._batches = TaggedBatches[_WireEvent](
            (_Stored | _Removed | _Cleared, _ArrayStored | _ArrayRemoved | _ArrayCleared)
        )
        self.left_out = self._batches.left_out
        self._partial_groups: set[int] = set()

    def decode(self, payload: bytes, sequence: int) -> KvEventBatch:
        """The batch of this number. KvDecodeError."""
        sent_at, wire_events, rank = self._batches.decode(payload)
        events: list[KvEvent] = []
        state: tuple[int | None, int | None, int | None] = (None, None, None)
        load: ToldLoad | None = None
        for event in wire_events:
            if isinstance(event, _Removed) and event.roost is not None:
                state = event.roost
                if event.roost_load:
                    load = read_packed(event.roost_load)
                continue
            told = self._translate(event)
            if isinstance(told, LeftOut):
                self.left_out[told] += 1
            else:
                events.append(told)
        epoch, device_digest, host_digest = state
        return KvEventBatch(
            sequence=sequence,
            events=events,
            epoch=epoch,
            device_digest=device_digest,
            host_digest=host_digest,
            load=load,
            sent_at=sent_at,
            rank=rank,
        )

    def _translate(self, event: _WireEvent) -> KvEvent | LeftOut:
        match event:
            case _Stored() | _ArrayStored():
                return self._stored(event)
            case _Removed() | _ArrayRemoved():
                return self._removed(event)
            case _Cleared() | _ArrayCleared():
                return AllBlocksCleared()

    def _stored(self, event: _Stored | _ArrayStored) -> BlockStored | LeftOut:
        tier = _tier(event)
        if tier is None:
            return LeftOut.OTHER_MEDIUM
        if event.kv_cache_spec_kind in _PARTIAL_KINDS and event.group_idx is not None:
            self._partial_groups.add(event.group_idx)
        if event.group_idx in self._partial_groups:
            return LeftOut.OTHER_GROUP
        hashes, token_ids, size = event.block_hashes, event.token_ids, event.block_size
        if not hashes or not size or len(token_ids) != len(hashes) * size:
            return LeftOut.NO_TOKENS
        parent, salt = event.parent_block_hash, None
        if event.extra_keys is not None:
            num_text, salt = _read_keys(event.extra_keys, event.lora_name, parent is None)
            if num_text == 0:
                return LeftOut.NOT_TEXT
            if num_text is not None:
                hashes, token_ids = hashes[:num_text], token_ids[: num_text * size]
        return BlockStored(
            block_names(hashes),
            None if parent is None else block_name(parent),
            token_ids,
            size,
            tier,
            event.lora_name,
            salt,
        )

    def _removed(self, event: _Removed | _ArrayRemoved) -> BlockRemoved | LeftOut:
        tier = _tier(event)
        if tier is None:
            return LeftOut.OTHER_MEDIUM
        if event.group_idx in self._partial_groups:
            return LeftOut.OTHER_GROUP
        return BlockRemoved(block_names(event.block_hashes), tier)


def _tier(event: _Stored | _ArrayStored | _Removed | _ArrayRemoved) -> Tier | None:
    if isinstance(event, (_Stored, _Removed)) and event.locality == "REMOTE":
        return None
    return tier_of(event.medium)


def _read_keys(
    extra_keys: list[list[Any] | None], lora_name: str | None, is_root: bool
) -> tuple[int | None, str | None]:
    """How many of the first blocks are text only (None: all), and the salt of their chain."""
    salt = None
    for index, keys in enumerate(extra_keys):
        others = [key for key in keys or () if key != lora_name]
        if not others:
            continue
        if index or not is_root or not all(isinstance(key, str) for key in others):
            return index, salt
        salt = "\0".join(others)
    return None, salt
