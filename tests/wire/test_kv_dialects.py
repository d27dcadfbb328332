"""Golden bytes of engines' KV events; vectors/kv_events.json says where each came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut
from roost_wire.kv_dialects.sglang import SglangDecoder
from roost_wire.kv_dialects.vllm import VllmDecoder
from roost_wire.kv_dialects.vllm_encoder import encode_batch
from roost_wire.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventBatch,
    Tier,
)
from roost_wire.told_load import ToldLoad

VECTORS = {
    name: bytes.fromhex(vector["hex"])
    for name, vector in json.loads(
        (Path(__file__).parent / "vectors" / "kv_events.json").read_text()
    ).items()
}
DEVICE, HOST = Tier.DEVICE, Tier.HOST
# Bytes as hashes are told by their last eight.
A, B = (int.from_bytes(hashlib.sha256(text).digest()[-8:]) for text in (b"a", b"b"))


def stored(hashes, tokens, size, parent=None, tier=DEVICE, lora=None, salt=None):
    return BlockStored(tuple(hashes), parent, tuple(tokens), size, tier, lora, salt)


def removed(*hashes, tier=DEVICE):
    return BlockRemoved(hashes, tier)


def decode(decoder, name):
    return decoder.decode(VECTORS[name], 9)


@pytest.mark.parametrize(
    ("name", "rank", "events"),
    [
        ("vllm_map", 0, [stored([7], [1, 2, 3, 4], 4), removed(7), AllBlocksCleared()]),
        ("vllm_array", None, [stored([7], [1, 2, 3, 4], 4), AllBlocksCleared()]),
        ("vllm_map_bytes_hashes", None, [stored([A, B], range(1, 9), 4), removed(B)]),
        ("vllm_map_lookahead", 0, [stored([41], [1, 2, 3, 4], 4)]),
        ("vllm_map_batch", 1, [stored([51], [1, 2], 2), removed(51), AllBlocksCleared()]),
        ("vllm_array_6", None, [stored([61], [1, 2], 2), removed(61), AllBlocksCleared()]),
        ("vllm_array_7", 0, [stored([61], [1, 2], 2), removed(61), AllBlocksCleared()]),
        (
            "vllm_array_8",
            0,
            [stored([61], [1, 2], 2, lora="ad"), removed(61), AllBlocksCleared()],
        ),
        (
            "vllm_array_9",
            0,
            [stored([61], [1, 2], 2, lora="ad", salt="salt"), removed(61), AllBlocksCleared()],
        ),
        ("vllm_array_10", 0, [stored([61], [1, 2], 2), removed(61), AllBlocksCleared()]),
        ("vllm_array_12", 0, [stored([61], [1, 2], 2), removed(61), AllBlocksCleared()]),
        ("vllm_array_15", 0, [stored([61], [1, 2], 2), removed(61), AllBlocksCleared()]),
    ],
)
def test_vllms_events_of_all_generations_are_read(name, rank, events):
    decoder = VllmDecoder()
    batch = decode(decoder, name)

    assert batch.events == events
    assert (batch.sequence, batch.rank, batch.epoch) == (9, rank, None)
    assert not decoder.left_out


def test_vllms_adapters_and_salts_tell_chains_apart_and_images_end_them():
    decoder = VllmDecoder()

    assert decode(decoder, "vllm_map_extra_keys").events == [
        stored([11, 12], range(1, 9), 4, lora="adapter", salt="salt-1"),
        stored([13], [9, 9, 9, 9], 4, parent=12, lora="adapter"),
    ]
    assert decoder.left_out == {LeftOut.NOT_TEXT: 1}


def test_layers_with_a_window_say_nothing_about_a_prefix():
    decoder = VllmDecoder()

    assert decode(decoder, "vllm_map_groups").events == [stored([21], [1, 2, 3, 4], 4)]
    assert decoder.left_out == {LeftOut.OTHER_GROUP: 2}


def test_blocks_off_the_machine_and_blocks_without_tokens_are_left_out():
    decoder = VllmDecoder()

    assert decode(decoder, "vllm_map_media").events == [
        stored([31], [1, 2, 3, 4], 4, tier=HOST),
        removed(31, tier=HOST),
    ]
    assert decoder.left_out == {LeftOut.NO_TOKENS: 1, LeftOut.OTHER_MEDIUM: 3}


@pytest.mark.parametrize(
    ("name", "rank", "events"),
    [
        (
            "sglang_map",
            None,
            [AllBlocksCleared(), stored([2**64 - 5, 6], [1, 2], 1), removed(2**64 - 5)],
        ),
        (
            "sglang_map_bigram",
            2,
            [stored([71, 72], [1, 2, 3, 4], 2, lora="ad", salt="tenant-a")],
        ),
        ("sglang_array_bigram", None, [stored([71], [1, 2], 2)]),
        *(
            (
                name,
                None,
                [stored([2**64 - 5], [1, 2], 2), removed(2**64 - 5), AllBlocksCleared()],
            )
            for name in ("sglang_array", "sglang_array_first")
        ),
    ],
)
def test_sglangs_events_are_read(name, rank, events):
    decoder = SglangDecoder()
    batch = decode(decoder, name)

    assert batch.events == events
    assert batch.rank == rank
    assert not decoder.left_out


def test_sglangs_lower_tiers_are_left_out():
    decoder = SglangDecoder()

    assert decode(decoder, "sglang_map_media").events == [
        stored([81], [1, 2], 2, tier=HOST),
        removed(81),
    ]
    assert decoder.left_out == {LeftOut.OTHER_MEDIUM: 3}


def test_a_decoder_reads_one_generation_after_the_other():
    """A rolling update behind one address, and EAGLE pages among plain ones."""
    decoder = SglangDecoder()
    for name in ("sglang_map", "sglang_array", "sglang_map_bigram", "sglang_map"):
        assert decode(decoder, name).events == decode(SglangDecoder(), name).events


@pytest.mark.parametrize("decoder", [VllmDecoder, SglangDecoder])
@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ({"type": "BlockRemoved", "block_hashes": [1]}, {"type": "Moved", "to": {"x": [1]}}),
        (["BlockRemoved", [1]], ["Moved", 3]),
        (["BlockRemoved", [1]], {"type": "Moved"}),
    ],
)
def test_events_of_unknown_type_are_counted_and_the_others_told(decoder, known, unknown):
    payload = msgspec.msgpack.encode([1.0, [unknown, known, unknown]])
    follower = decoder()

    assert follower.decode(payload, 0).events == [removed(1)]
    assert follower.left_out == {LeftOut.UNKNOWN_TYPE: 2}


STORED = {
    "type": "BlockStored",
    "block_hashes": [1],
    "parent_block_hash": None,
    "token_ids": [1, 2],
    "block_size": 2,
}


@pytest.mark.parametrize("decoder", [VllmDecoder, SglangDecoder])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        VECTORS["vllm_map"][:-5],
        VECTORS["vllm_map"] + b"\x00",
        b"\x91" * 100_000,
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, 5]),
        msgspec.msgpack.encode([1.0, [5]]),
        msgspec.msgpack.encode([1.0, [[]]]),
        msgspec.msgpack.encode([1.0, [{"block_hashes": [1]}]]),
        msgspec.msgpack.encode([1.0, [["BlockRemoved", "nope"]]]),
        *(
            msgspec.msgpack.encode([1.0, [STORED, STORED | wrong]])
            for wrong in (
                {"token_ids": [1, -1]},
                {"token_ids": [1, 2**32]},
                {"token_ids": [1, 2.5]},
                {"token_ids": [1, [2, 3]]},
                {"token_ids": [1, [2, -3]]},
                {"block_size": -1},
                {"block_size": 2**20 + 1},
                {"block_hashes": 1},
                {"block_hashes": [None]},
                {"parent_block_hash": "x"},
            )
        ),
    ],
)
def test_a_malformed_batch_is_one_error_and_the_next_is_read(decoder, payload):
    follower = decoder()

    with pytest.raises(KvDecodeError):
        follower.decode(payload, 0)

    fine = msgspec.msgpack.encode([1.0, [STORED | {"token_ids": [0, 2**32 - 1]}]])
    assert follower.decode(fine, 1).events == [stored([1], [0, 2**32 - 1], 2)]


@pytest.mark.parametrize("decoder", [VllmDecoder, SglangDecoder])
def test_a_removal_of_nothing_is_one(decoder):
    payload = msgspec.msgpack.encode([1.0, [["BlockRemoved", []]]])

    assert decoder().decode(payload, 0).events == [removed()]


def test_numbers_and_bytes_may_be_mixed():
    wire = STORED | {"block_hashes": [3, b"\0" * 31 + b"\7"], "token_ids": [1, 2, 3, 4]}
    events = VllmDecoder().decode(msgspec.msgpack.encode([1.0, [wire]]), 0).events

    assert events == [stored([3, 7], [1, 2, 3, 4], 2)]


def test_our_engine_writes_what_vllm_writes():
    """Key by key in vLLM's order; only the width of map headers differs."""
    events = [stored([7], [1, 2, 3, 4], 4), removed(7), AllBlocksCleared()]
    batch = KvEventBatch(sequence=0, events=events, sent_at=1.5, rank=0)

    ours, theirs = (
        msgspec.msgpack.decode(payload) for payload in (encode_batch(batch), VECTORS["vllm_map"])
    )
    assert ours == theirs
    assert [list(event) for event in ours[1]] == [list(event) for event in theirs[1]]


class _TheirEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """As vllm/distributed/kv_events.py declares them, to read ours as vLLM's own consumers do."""


class _TheirStored(_TheirEvent, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _TheirRemoved(_TheirEvent, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class _TheirCleared(_TheirEvent, tag="AllBlocksCleared"):
    pass


class _TheirBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[_TheirStored | _TheirRemoved | _TheirCleared]
    data_parallel_rank: int | None = None


@pytest.mark.parametrize("load", [None, ToldLoad(3, 1, 1296, 2048, 512)])
@pytest.mark.parametrize("events", [[], [stored([2**64 - 1], [1], 1, tier=HOST)]])
def test_epoch_digests_and_load_ride_on_a_removal_of_nothing(events, load):
    batch = KvEventBatch(
        sequence=3,
        events=events,
        epoch=5,
        device_digest=2**64 - 1,
        host_digest=0,
        load=load,
        sent_at=2.0,
    )
    payload = encode_batch(batch)

    assert VllmDecoder().decode(payload, 3) == batch
    # As others read it: three elements at most, and one more event that removes no blocks.
    sent_at, wire_events = msgspec.msgpack.decode(payload)
    assert sent_at == 2.0
    assert wire_events[-1]["type"] == "BlockRemoved"
    assert wire_events[-1]["block_hashes"] == []
    theirs = msgspec.msgpack.Decoder(_TheirBatch).decode(payload)
    assert len(theirs.events) == len(events) + 1
    assert theirs.events[-1] == _TheirRemoved([], "GPU", 0)


@pytest.mark.parametrize("load", [None, 5, "x", [1, 2], [1, 2, 3, 4, -1], {"a": 1}])
def test_a_load_that_cannot_be_read_costs_nothing_else(load):
    state = {"type": "BlockRemoved", "block_hashes": [], "medium": "GPU", "roost": [1, 2, 3]}
    wire = [1.0, [STORED | {"token_ids": [1, 2]}, state | {"roost_load": load}]]
    batch = VllmDecoder().decode(msgspec.msgpack.encode(wire), 0)

    assert (batch.epoch, batch.device_digest, batch.host_digest) == (1, 2, 3)
    assert len(batch.events) == 1
    assert batch.load is None
