"""Where a replica publishes its KV events, read from what it says of itself. Pure.

    vLLM         GET /kv_event_sources   {"RANK": {enable_kv_cache_events, publisher, endpoint,
                                         replay_endpoint, topic, ...}}, as 0.32 answers it
    vLLM, ours   the same                [{data_parallel_rank, endpoint, replay_endpoint, topic}],
                                         or that under "sources", as its main branch has it
    SGLang       GET /server_info        {"kv_events": {publisher, endpoint_host,
                                         endpoint_port_base, topic, block_size, dp_size,
                                         replay_endpoint_port_base?}}, rank r at port base + r
    TensorRT-LLM GET /metrics            the size of a block; events are polled

A publisher that listens on all addresses is found at the replica's own host. What a replica names
else must be an address that a replica may have (replica_url.py): it is not a way to have the
router connect to whatever it can reach.

Not here: asking (discovery.py), connecting (subscriber.py).
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import structs

from roost_router.replica_url import ReplicaUrlError, check_replica_url

#: Data-parallel ranks of one replica that are followed.
MAX_RANKS: Final = 1024
_WILDCARDS: Final = frozenset({"*", "0.0.0.0", "::"})
_TOKENS_PER_BLOCK = re.compile(
    r"^trtllm_kv_cache_tokens_per_block(?:\{[^}]*\})? (\d{1,6})(?:\.0)?\s*$", re.MULTILINE
)


class Dialect(enum.Enum):
    """Who speaks."""

    VLLM = "vllm"  # and our engine
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt_llm"


class KvSource(msgspec.Struct, frozen=True):
    """One stream of events: of a replica, or of one of its data-parallel ranks."""

    dialect: Dialect
    endpoint: str  # tcp://host:port; with a wildcard for host we listen, and engines connect
    replay_endpoint: str | None = None
    topic: str = ""
    rank: int = 0
    block_size: int | None = None  # tokens; None: events tell


class SourceError(ValueError):
    """What a replica says of its events cannot be used."""


_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Rank = Annotated[int, msgspec.Meta(ge=0)]


class _VllmSource(msgspec.Struct):
    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str = ""
    data_parallel_rank: _Rank = 0
    block_size: int | None = None


class _VllmSources(msgspec.Struct):
    sources: list[_VllmSource]


class _VllmConfig(_VllmSource):
    publisher: str | None = "zmq"
    enable_kv_cache_events: bool = True


class _SglangEvents(msgspec.Struct):
    endpoint_host: str
    endpoint_port_base: _Port
    publisher: str = "zmq"
    topic: str = ""
    block_size: int | None = None
    dp_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)] = 1
    replay_endpoint_port_base: _Port | None = None


class _ServerInfo(msgspec.Struct):
    kv_events: _SglangEvents | None = None


_vllm_decoder = msgspec.json.Decoder(_VllmSources | list[_VllmSource])
_ranks_decoder = msgspec.json.Decoder(dict[_Rank, _VllmConfig])
_sglang_decoder = msgspec.json.Decoder(_ServerInfo)


def read_kv_event_sources(body: bytes, replica_url: str) -> list[KvSource]:
    """Sources out of a page /kv_event_sources; empty if nothing is published. SourceError."""
    try:
        sources = _by_rank(body)
        if sources is None:
            said = _vllm_decoder.decode(body)
            sources = said.sources if isinstance(said, _VllmSources) else said
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"/kv_event_sources: {error}") from None
    if len(sources) > MAX_RANKS:
        raise SourceError(f"/kv_event_sources: {len(sources)} sources, {MAX_RANKS} are followed")
    return [
        KvSource(
            Dialect.VLLM,
            _reachable(source.endpoint, replica_url),
            source.replay_endpoint and _reachable(source.replay_endpoint, replica_url),
            source.topic,
            source.data_parallel_rank,
            source.block_size,
        )
        for source in sources
        if source.endpoint
    ]


def _by_rank(body: bytes) -> list[_VllmSource] | None:
    """Sources out of an object of publishers by rank; None if it is something else."""
    try:
        configs = _ranks_decoder.decode(body)
    except msgspec.ValidationError:
        return None
    return [
        structs.replace(config, data_parallel_rank=rank)
        for rank, config in configs.items()
        if config.enable_kv_cache_events and config.publisher == "zmq"
    ]


def read_server_info(body: bytes, replica_url: str) -> list[KvSource]:
    """Sources out of SGLang's /server_info; empty if nothing is published. SourceError."""
    try:
        events = _sglang_decoder.decode(body).kv_events
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"/server_info: {error}") from None
    if events is None or events.publisher != "zmq":
        return []
    replay_base = events.replay_endpoint_port_base
    return [
        KvSource(
            Dialect.SGLANG,
            _at(events.endpoint_host, events.endpoint_port_base + rank, replica_url),
            None if replay_base is None else _at("*", replay_base + rank, replica_url),
            events.topic,
            rank,
            events.block_size,
        )
        for rank in range(events.dp_size)
    ]


def read_tokens_per_block(page: str) -> int | None:
    """Tokens of a full block, out of TensorRT-LLM's /metrics."""
    match = _TOKENS_PER_BLOCK.search(page)
    return int(match[1]) or None if match else None


def is_listening(endpoint: str) -> bool:
    """Whether the side that has this endpoint waits for the other to connect."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")


def _reachable(endpoint: str, replica_url: str) -> str:
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not port.isdecimal():
        raise SourceError(f"{endpoint!r} is not an endpoint like tcp://*:5557")
    return _at(host.removeprefix("[").removesuffix("]"), int(port), replica_url)


def _at(host: str, port: int, replica_url: str) -> str:
    """The endpoint of a publisher that listens on `host`, as we reach it."""
    if host in _WILDCARDS:
        host = urlsplit(replica_url).hostname or ""
    name = f"[{host}]" if ":" in host else host
    try:
        check_replica_url(f"http://{name}:{port}")
    except ReplicaUrlError as error:
        raise SourceError(f"KV events of {replica_url} are not followed: {error}") from None
    return f"tcp://{name}:{port}"
