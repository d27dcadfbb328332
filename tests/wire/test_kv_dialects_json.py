"""KV events in JSON: TensorRT-LLM's and Dynamo's.

Shapes: tensorrt_llm/_utils.py (KVCacheEventSerializer), with hashes that its tests of
kv_cache_manager_v2 pin (tokens 1 to 4, then 5 to 8); dynamo lib/kv-router/src/protocols.rs
(RouterEvent).
"""

from __future__ import annotations

import pytest

from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut
from roost_wire.kv_dialects.dynamo import DynamoDecoder
from roost_wire.kv_dialects.tensorrt_llm import TensorRtLlmDecoder
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from roost_wire.token_chain import block_hashes, join_local, local_hash

FIRST, SECOND = 944812140882783, 1938568495691091294
CREATED = (
    b'{"event_id": 0, "data": {"type": "created", "num_blocks_per_cache_level": [8, 2]},'
    b' "window_size": 16}'
)
STORED = (
    b'{"event_id": 1, "data": {"type": "stored", "parent_hash": null, "blocks": ['
    b'{"type": "stored_block", "block_hash": 944812140882783, "tokens": ['
    b'{"type": "unique_token", "token_id": 1, "token_extra_id": 0},'
    b'{"type": "unique_token", "token_id": 2, "token_extra_id": 0},'
    b'{"type": "unique_token", "token_id": 3, "token_extra_id": 0},'
    b'{"type": "unique_token", "token_id": 4, "token_extra_id": 0}],'
    b'"cache_level": 0, "priority": 35},'
    b'{"type": "stored_block", "block_hash": 1938568495691091294, "cache_salt": null, "tokens": ['
    b'{"token_id": 5}, {"token_id": 6}, {"token_id": 7}, {"token_id": 8}], "cache_level": 0}'
    b']}, "window_size": 16, "hash_algo": "v1_block_key", "layer_group_id": 0}'
)
REMOVED = (
    b'{"event_id": 2, "data": {"type": "removed", "block_hashes": [1938568495691091294]},'
    b' "window_size": 16, "attention_dp_rank": 1}'
)


def updated(old: int, new: int) -> bytes:
    return (
        b'{"event_id": 3, "data": {"type": "updated", "block_hash": 944812140882783, "cache_level":'
        b' {"type": "event_diff", "new_value": %d, "old_value": %d}, "priority": null},'
        b' "window_size": 16}'
    ) % (new, old)


def stored_block(
    fields: bytes, tokens: bytes = b'{"token_id": 9},' * 3 + b'{"token_id": 9}'
) -> bytes:
    return (
        b'{"event_id": 4, "data": {"type": "stored", "parent_hash": 7, "blocks": ['
        b'{"block_hash": 8, "tokens": [%b]%b}]}, "window_size": 16}'
    ) % (tokens, fields)


def trt(*events: bytes, decoder: TensorRtLlmDecoder | None = None):
    batches = (decoder or TensorRtLlmDecoder(4)).decode(b"[" + b",".join(events) + b"]")
    return [event for batch in batches for event in batch.events]


def test_tensorrt_llms_events_are_read():
    batches = TensorRtLlmDecoder(4).decode(b"[%b,%b,%b]" % (CREATED, STORED, REMOVED))

    assert [(batch.sequence, batch.rank) for batch in batches] == [(0, None), (1, None), (2, 1)]
    assert [batch.events for batch in batches] == [
        [AllBlocksCleared()],
        [BlockStored((FIRST, SECOND), None, tuple(range(1, 9)), 4, Tier.DEVICE)],
        [BlockRemoved((SECOND,), Tier.DEVICE)],
    ]


def test_nothing_new_is_no_batch():
    assert TensorRtLlmDecoder(4).decode(b"[]") == []


def test_hashes_by_sha256_are_named_by_their_last_eight_bytes():
    by_sha = b'"%b"' % (b"ab" * 24 + b"00000000000000ff")

    assert trt(STORED.replace(b"944812140882783", by_sha))[0].block_hashes == (255, SECOND)


def test_a_block_that_leaves_for_the_disk_does_not_count_any_more():
    assert trt(updated(0, 2)) == trt(updated(1, 2)) == [BlockRemoved((FIRST,), Tier.DEVICE)]
    assert trt(updated(0, 1)) == trt(updated(1, 0)) == trt(updated(2, 0)) == []


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (stored_block(b', "cache_level": 2'), LeftOut.OTHER_MEDIUM),
        (stored_block(b"", b'{"token_id": 9}'), LeftOut.NO_TOKENS),
        (stored_block(b', "mm_keys": [["ab", 0]]'), LeftOut.NOT_TEXT),
        (
            stored_block(b"", b'{"token_id": 9, "token_extra_id": 3},' * 3 + b'{"token_id": 9}'),
            LeftOut.NOT_TEXT,
        ),
        (stored_block(b"", b'{"token_id": "ffee"},' * 3 + b'{"token_id": 9}'), LeftOut.NOT_TEXT),
        (b'{"event_id": 5, "data": {"type": "moved"}}', LeftOut.UNKNOWN_TYPE),
    ],
)
def test_what_does_not_count_is_left_out_and_counted(event, reason):
    decoder = TensorRtLlmDecoder(4)

    assert trt(event, decoder=decoder) == []
    assert decoder.left_out == {reason: 1}


def test_an_adapter_and_a_salt_tell_chains_apart():
    (event,) = trt(stored_block(b', "lora_id": 5, "cache_salt": "tenant-a"'))

    assert (event.parent_hash, event.lora_name, event.cache_salt) == (7, "lora_id:5", "tenant-a")


def test_only_layers_with_the_largest_window_count():
    decoder = TensorRtLlmDecoder(4)
    small = [
        event.replace(b'"window_size": 16', b'"window_size": 8') for event in (STORED, REMOVED)
    ]

    assert trt(CREATED, *small, decoder=decoder) == [AllBlocksCleared()]
    assert decoder.left_out == {LeftOut.OTHER_GROUP: 2}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[{}]",
        b'[{"event_id": 1, "data": 5}]',
        b'[{"event_id": 1, "data": {"type": "removed"}}]',
        b'[{"event_id": 1, "data": {"type": "removed", "block_hashes": ["no"]}}]',
        b"[%b" % STORED,
        b"\xff",
        b"[" * 100_000,
        b"[%b]" % STORED.replace(b'"token_id": 1', b'"token_id": -1'),
    ],
)
def test_malformed_json_is_one_error(payload):
    for decode in (TensorRtLlmDecoder(4).decode, DynamoDecoder(4).decode):
        with pytest.raises(KvDecodeError):
            decode(payload)


LOCAL = [local_hash([1, 2]), local_hash([3, 4])]


def router_event(data: str, **fields: str) -> bytes:
    more = "".join(f', "{name}": "{value}"' for name, value in fields.items())
    event = f'{{"event_id": 3, "dp_rank": 2, "data": {data}}}'
    return f'{{"worker_id": 7, "event": {event}{more}}}'.encode()


DYNAMO_STORED = (
    '{"stored": {"parent_hash": null, "start_position": 0, "blocks": ['
    f'{{"block_hash": 11, "tokens_hash": {LOCAL[0]}, "mm_extra_info": null}},'
    f'{{"block_hash": 12, "tokens_hash": {LOCAL[1]}}}]}}}}'
)


def test_dynamos_events_name_the_same_chain_without_its_tokens():
    batch = DynamoDecoder(2).decode(router_event(DYNAMO_STORED))
    (event,) = batch.events

    assert (batch.sequence, batch.rank) == (3, 2)
    assert event == BlockStored((11, 12), None, (), 2, Tier.DEVICE, local_hashes=tuple(LOCAL))
    first = join_local(None, event.local_hashes[0])
    assert [first, join_local(first, event.local_hashes[1])] == block_hashes([1, 2, 3, 4], 2)


@pytest.mark.parametrize(
    ("data", "fields", "events"),
    [
        ('"cleared"', {}, [AllBlocksCleared()]),
        ('{"removed": {"block_hashes": [12]}}', {}, [BlockRemoved((12,), Tier.DEVICE)]),
        (
            '{"removed": {"block_hashes": [12]}}',
            {"storage_tier": "HostPinned"},
            [BlockRemoved((12,), Tier.HOST)],
        ),
    ],
)
def test_dynamos_other_events_are_read(data, fields, events):
    assert DynamoDecoder(2).decode(router_event(data, **fields)).events == events


@pytest.mark.parametrize(
    ("data", "fields", "reason"),
    [
        (DYNAMO_STORED, {"storage_tier": "disk"}, LeftOut.OTHER_MEDIUM),
        ('"cleared"', {"residency_domain": "cache_owner"}, LeftOut.OTHER_MEDIUM),
        ('{"moved": {}}', {}, LeftOut.UNKNOWN_TYPE),
        ('"paused"', {}, LeftOut.UNKNOWN_TYPE),
        (DYNAMO_STORED.replace("null}", '{"mm_objects": []}}'), {}, LeftOut.NOT_TEXT),
        ('{"stored": {"blocks": []}}', {}, LeftOut.NO_TOKENS),
    ],
)
def test_what_dynamo_tells_and_does_not_count_is_counted(data, fields, reason):
    decoder = DynamoDecoder(2)

    assert decoder.decode(router_event(data, **fields)).events == []
    assert decoder.left_out == {reason: 1}
