"""Batches of tagged events in msgpack, which vLLM and SGLang share.

    [timestamp, [event, ...], data-parallel rank]      rank may be nil or missing

An event is a map with its type under "type", or an array that begins with it; a batch may also be
a map. Writers put map headers of any width. A whole batch is decoded by one call into the types
that worked for the batch before; only where that fails are other types and single events tried,
so that an event of unknown type costs time, not the batch.

Speed, translated: 2.3 million blocks of 16 tokens a second in runs of 32, 0.6 million where each
event has one (one core); O(bytes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut, Rank

_E = TypeVar("_E")


class _Batch(msgspec.Struct, Generic[_E], array_like=True, gc=False):
    ts: float
    events: list[_E]
    data_parallel_rank: Rank | None = None


class _MapBatch(msgspec.Struct, Generic[_E], gc=False):
    ts: float
    events: list[_E]
    data_parallel_rank: Rank | None = None


class _Tag(msgspec.Struct, array_like=True):
    type: str


class _MapTag(msgspec.Struct):
    type: str


_tag_decoders = (msgspec.msgpack.Decoder(_MapTag), msgspec.msgpack.Decoder(_Tag))


class TaggedBatches(Generic[_E]):
    """Decodes batches into the event types of one dialect."""

    def __init__(self, generations: Sequence[Any]) -> None:
        """`generations`: unions of tagged structs, each of one way to write events."""
        self.left_out: Counter[LeftOut] = Counter()
        self._known_tags = {
            tag
            for union in generations
            for struct in union.__args__
            if isinstance(tag := struct.__struct_config__.tag, str)
        }
        self._decoders: list[msgspec.msgpack.Decoder[Any]] = [
            msgspec.msgpack.Decoder(shape[union])
            for union in generations
            for shape in (_Batch, _MapBatch)
        ]
        self._event_decoders: list[msgspec.msgpack.Decoder[Any]] = [
            msgspec.msgpack.Decoder(union) for union in generations
        ]
        self._raw_decoders: list[msgspec.msgpack.Decoder[Any]] = [
            msgspec.msgpack.Decoder(_Batch[msgspec.Raw]),
            msgspec.msgpack.Decoder(_MapBatch[msgspec.Raw]),
        ]

    def decode(self, payload: bytes) -> tuple[float, list[_E], int | None]:
        """Timestamp, events of known types, rank. KvDecodeError."""
        for index, decoder in enumerate(self._decoders):
            try:
                batch = decoder.decode(payload)
            except msgspec.ValidationError:
                continue
            except (msgspec.DecodeError, RecursionError) as error:
                raise KvDecodeError(f"not msgpack: {error}") from None
            if index:
                self._decoders.insert(0, self._decoders.pop(index))
            return batch.ts, batch.events, batch.data_parallel_rank
        return self._decode_singly(payload)

    def _decode_singly(self, payload: bytes) -> tuple[float, list[_E], int | None]:
        """The same for a batch that has events of unknown types."""
        batch = _first_fit(self._raw_decoders, payload)
        events: list[_E] = []
        num_unknown = 0
        for raw in batch.events:
            tag = _first_fit(_tag_decoders, raw).type
            if tag in self._known_tags:
                events.append(_first_fit(self._event_decoders, raw))
            else:
                num_unknown += 1
        self.left_out[LeftOut.UNKNOWN_TYPE] += num_unknown
        return batch.ts, events, batch.data_parallel_rank


def _first_fit(decoders: Sequence[msgspec.msgpack.Decoder[Any]], data: bytes | msgspec.Raw) -> Any:
    """What the first decoder makes of it that can. KvDecodeError of the last one if none can."""
    error: Exception | None = None
    for decoder in decoders:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, RecursionError) as failure:
            error = failure
    raise KvDecodeError(str(error))
