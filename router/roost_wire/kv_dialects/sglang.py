"""SGLang's KV events: maps, before 2026 arrays.

Source: sglang/srt/disaggregation/kv_events.py. Like vLLM's (vllm.py), but:

    * hashes are signed numbers of 64 bits;
    * with EAGLE a page is made of pairs [token, next token]. Its first tokens are told; two pages
      that differ in the token after the last are one block to us;
    * a page may hold one token;
    * adapter and salt are fields; the third element of a batch is nil where there is one rank;
    * media: GPU, CPU_PINNED, DISK, EXTERNAL. A page on its way to the host is stored there before
      it is removed here.

An array ends with medium, then fields that differ by version and are not read.
"""

from __future__ import annotations

import msgspec

from roost_wire.kv_dialects.dialect import (
    BlockSize,
    LeftOut,
    TokenId,
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
)


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[TokenId, ...]
    block_size: BlockSize
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class _PairsStored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[tuple[TokenId, TokenId], ...]
    block_size: BlockSize
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: tuple[int, ...]
    medium: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _ArrayStored(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[TokenId, ...]
    block_size: BlockSize
    lora_id: int | None = None
    medium: str | None = None


class _ArrayPairsStored(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[tuple[TokenId, TokenId], ...]
    block_size: BlockSize
    lora_id: int | None = None
    medium: str | None = None


class _ArrayRemoved(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: tuple[int, ...]
    medium: str | None = None


class _ArrayCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


_WireStored = _Stored | _PairsStored | _ArrayStored | _ArrayPairsStored
_WireEvent = _WireStored | _Removed | _Cleared | _ArrayRemoved | _ArrayCleared


class SglangDecoder:
    """Decodes the stream of one replica and rank."""

    def __init__(self) -> None:
        self._batches = TaggedBatches[_WireEvent](
            (
                _Stored | _Removed | _Cleared,
                _ArrayStored | _ArrayRemoved | _ArrayCleared,
                _PairsStored | _Removed | _Cleared,
                _ArrayPairsStored | _ArrayRemoved | _ArrayCleared,
            )
        )
        self.left_out = self._batches.left_out

    def decode(self, payload: bytes, sequence: int) -> KvEventBatch:
        """The batch of this number. KvDecodeError."""
        sent_at, wire_events, rank = self._batches.decode(payload)
        events: list[KvEvent] = []
        for event in wire_events:
            told = _translate(event)
            if isinstance(told, LeftOut):
                self.left_out[told] += 1
            else:
                events.append(told)
        return KvEventBatch(sequence=sequence, events=events, sent_at=sent_at, rank=rank)


def _translate(event: _WireEvent) -> KvEvent | LeftOut:
    if isinstance(event, (_Cleared, _ArrayCleared)):
        return AllBlocksCleared()
    tier = tier_of(event.medium)
    if tier is None:
        return LeftOut.OTHER_MEDIUM
    if isinstance(event, (_Removed, _ArrayRemoved)):
        return BlockRemoved(block_names(event.block_hashes), tier)
    hashes, size = event.block_hashes, event.block_size
    if not hashes or not size or len(event.token_ids) != len(hashes) * size:
        return LeftOut.NO_TOKENS
    if isinstance(event, (_PairsStored, _ArrayPairsStored)):
        token_ids = tuple(first for first, _ in event.token_ids)
    else:
        token_ids = event.token_ids
    parent, lora_name, cache_salt = event.parent_block_hash, None, None
    if isinstance(event, (_Stored, _PairsStored)):
        lora_name, cache_salt = event.lora_name, event.cache_salt
    return BlockStored(
        block_names(hashes),
        None if parent is None else block_name(parent),
        token_ids,
        size,
        tier,
        lora_name,
        cache_salt,
    )
