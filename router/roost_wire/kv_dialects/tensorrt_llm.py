"""TensorRT-LLM's KV events: JSON, handed out once to whoever asks /kv_cache_events.

Source: tensorrt_llm/_utils.py (KVCacheEventSerializer) and runtime/kv_cache_manager_v2. Each event
has a number of its own, so each becomes a batch; attention ranks count apart.

    created    the caches begin empty, one event for each window size
    stored     {parent_hash, blocks: [{block_hash, tokens: [{token_id, token_extra_id}], ...}]}
    removed    {block_hashes}, whatever memory they lay in
    updated    {block_hash, cache_level: {old_value, new_value}}

Hashes are numbers or, by SHA-256, hexadecimal strings. Levels 0 and 1 (device, host) are both told
as the device: a removal does not say which it was. Below them (disk) a block does not count, and a
block that comes back from there is not told: its tokens are not.

Layers with a smaller window than the largest are another group. A block that is not full, which
TensorRT-LLM stores too, has no name. `token_extra_id` and `mm_keys` are content beside tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut, Rank, TokenId, block_name
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
    Tier,
)

_LAST_LEVEL_THAT_COUNTS: Final = 1


class _Token(msgspec.Struct, gc=False):
    token_id: TokenId | str  # a string is the digest of something that is no token
    token_extra_id: int = 0


class _Block(msgspec.Struct, gc=False):
    block_hash: int | str
    tokens: list[_Token]
    cache_level: int = 0
    mm_keys: list[msgspec.Raw] = []
    cache_salt: str | None = None
    lora_id: int | None = None


class _Created(msgspec.Struct, tag="created", gc=False):
    pass


class _Stored(msgspec.Struct, tag="stored", gc=False):
    blocks: list[_Block]
    parent_hash: int | str | None = None


class _Removed(msgspec.Struct, tag="removed", gc=False):
    block_hashes: list[int | str]


class _Change(msgspec.Struct, gc=False):
    old_value: int
    new_value: int


class _Updated(msgspec.Struct, tag="updated", gc=False):
    block_hash: int | str
    cache_level: _Change | None = None


_Data = _Created | _Stored | _Removed | _Updated


class _Event(msgspec.Struct, gc=False):
    event_id: int
    data: msgspec.Raw
    window_size: int = 0
    attention_dp_rank: Rank | None = None


class _Tag(msgspec.Struct):
    type: str


_events_decoder = msgspec.json.Decoder(list[_Event])
_tag_decoder = msgspec.json.Decoder(_Tag)
_data_decoder: msgspec.json.Decoder[_Data] = msgspec.json.Decoder(_Data)
_KNOWN = frozenset({"created", "stored", "removed", "updated"})


class TensorRtLlmDecoder:
    """Decodes what one replica hands out."""

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens of a full block; events do not tell."""
        self._block_size = block_size
        self._largest_window = 0
        self.left_out: Counter[LeftOut] = Counter()

    def decode(self, payload: bytes, sent_at: float = 0.0) -> list[KvEventBatch]:
        """A batch for each event, in order; some are empty. KvDecodeError.

        `sent_at`: when it was asked for; tells a restarted server's events from repeated ones.
        """
        try:
            wire_events = _events_decoder.decode(payload)
            return [
                KvEventBatch(
                    sequence=event.event_id,
                    events=self._translate(event),
                    sent_at=sent_at,
                    rank=event.attention_dp_rank,
                )
                for event in wire_events
            ]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KvDecodeError(f"not TensorRT-LLM's events: {error}") from None

    def _translate(self, event: _Event) -> list[KvEvent]:
        if _tag_decoder.decode(event.data).type not in _KNOWN:
            self.left_out[LeftOut.UNKNOWN_TYPE] += 1
            return []
        data: _Data = _data_decoder.decode(event.data)
        self._largest_window = max(self._largest_window, event.window_size)
        if event.window_size < self._largest_window:
            self.left_out[LeftOut.OTHER_GROUP] += 1
            return []
        match data:
            case _Created():
                return [AllBlocksCleared()]
            case _Stored():
                return self._stored(data)
            case _Removed():
                names = tuple(_name(block_hash) for block_hash in data.block_hashes)
                return [BlockRemoved(names, Tier.DEVICE)]
            case _Updated():
                level = data.cache_level
                if level is None or level.new_value <= _LAST_LEVEL_THAT_COUNTS:
                    return []
                return [BlockRemoved((_name(data.block_hash),), Tier.DEVICE)]

    def _stored(self, data: _Stored) -> list[KvEvent]:
        """The first blocks of the event, up to one that cannot be told."""
        names: list[int] = []
        token_ids: list[int] = []
        for block in data.blocks:
            reason = self._why_not(block)
            if reason is not None:
                self.left_out[reason] += 1
                break
            names.append(_name(block.block_hash))
            token_ids += [token.token_id for token in block.tokens]  # type: ignore[misc]
        if not names:
            return []
        first, parent = data.blocks[0], data.parent_hash
        return [
            BlockStored(
                tuple(names),
                None if parent is None else _name(parent),
                tuple(token_ids),
                self._block_size,
                Tier.DEVICE,
                None if first.lora_id is None else f"lora_id:{first.lora_id}",
                first.cache_salt,
            )
        ]

    def _why_not(self, block: _Block) -> LeftOut | None:
        if block.cache_level > _LAST_LEVEL_THAT_COUNTS:
            return LeftOut.OTHER_MEDIUM
        if len(block.tokens) != self._block_size:
            return LeftOut.NO_TOKENS
        if block.mm_keys or any(
            token.token_extra_id or isinstance(token.token_id, str) for token in block.tokens
        ):
            return LeftOut.NOT_TEXT
        return None


def _name(block_hash: int | str) -> int:
    """KvDecodeError for a string that is not hexadecimal."""
    if isinstance(block_hash, int):
        return block_name(block_hash)
    try:
        return block_name(int(block_hash[-16:], 16))
    except ValueError:
        raise KvDecodeError(f"{block_hash!r} is not a block hash") from None
