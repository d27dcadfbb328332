"""What `roost bench proxy` puts a router through: one function a scenario, figures by name out.

    requests   closed loops with prompts of one size     CPU a request, requests a second
    latency    one connection, small prompts             time of a request
    paced      64 streams, a chunk every 10 ms each      CPU a chunk, delay of a chunk
    burst      64 streams as fast as a mock can          CPU a chunk, chunks a second
    open       very many slow streams at once            memory, delay of a chunk

CPU is the router's own, all its processes; a chunk's includes its share of the request.

Not here: rounds (bench_proxy.py), what figures are called in the table (bench_proxy_table.py).
"""

from __future__ import annotations

import asyncio

from roost_loadtest import local_processes
from roost_loadtest.bench_proxy_load import (
    LoadError,
    StreamClient,
    connect,
    drive_requests,
    drive_streams,
    requests_of,
    stream_request,
)
from roost_loadtest.bench_proxy_routers import Target
from roost_loadtest.percentile import percentile

Figures = dict[str, float]

SIZES = {"small": 200, "8 KB": 8 << 10, "64 KB": 64 << 10}  # bytes of a prompt
STREAMS = 64

_PACE_US = 10_000
_BURST_CHUNKS = 200
_WARM_S = 0.3
_OPEN_GAP_S = 2.0  # between chunks of one of very many streams
_OPEN_CHUNKS = 10_000  # more than anybody waits for: none ends by itself
_OPEN_AT_ONCE = 50  # streams opened in a row before a look at the clock
_OPEN_PAUSE_S = 0.05


async def requests(target: Target, size: str, seconds: float, connections: int) -> Figures:
    """CPU µs a request, requests a second, and which share of a core the router was busy."""
    got = await drive_requests(
        target.port,
        requests_of(SIZES[size]),
        connections=connections,
        warm_s=_WARM_S,
        seconds=seconds,
        read_cpu_s=target.cpu_s,
    )
    return {
        f"{size} cpu_us": got.cpu_s / got.requests * 1e6,
        f"{size} requests_s": got.requests / got.seconds,
        f"{size} busy": got.cpu_s / got.seconds,
    }


async def latency(target: Target, seconds: float) -> Figures:
    """µs of a small request when it is the only one."""
    got = await drive_requests(
        target.port,
        requests_of(SIZES["small"]),
        connections=1,
        warm_s=_WARM_S,
        seconds=seconds,
        read_cpu_s=target.cpu_s,
    )
    return {
        "alone p50_us": _quantile_us(got.latencies_ns, 0.5),
        "alone p99_us": _quantile_us(got.latencies_ns, 0.99),
    }


async def paced(target: Target, seconds: float) -> Figures:
    """Streams of which no two chunks fall together."""
    num_chunks = max(2, int(seconds * 1e6 / _PACE_US))
    orders = [stream_request(num_chunks, _PACE_US, number) for number in range(STREAMS)]
    stagger_s = _PACE_US / 1e6 / STREAMS
    got = await drive_streams(target.port, orders, stagger_s=stagger_s, read_cpu_s=target.cpu_s)
    return {
        "paced cpu_us": got.cpu_s / got.chunks * 1e6,
        "paced delay p50_us": _quantile_us(got.delays_ns, 0.5),
        "paced delay p99_us": _quantile_us(got.delays_ns, 0.99),
        "paced first p50_us": _quantile_us(got.first_ns, 0.5),
        "paced first p99_us": _quantile_us(got.first_ns, 0.99),
    }


async def burst(target: Target) -> Figures:
    """Streams as fast as mocks, router and client go."""
    orders = [stream_request(_BURST_CHUNKS, 0, number) for number in range(STREAMS)]
    got = await drive_streams(target.port, orders, stagger_s=0.0, read_cpu_s=target.cpu_s)
    return {
        "burst cpu_us": got.cpu_s / got.chunks * 1e6,
        "burst chunks_s": got.chunks / got.seconds,
    }


async def open_streams(target: Target, num_streams: int, seconds: float) -> Figures:
    """Memory and delays while so many streams are open, each with a chunk every 2 s.

    They are opened about 1,000 a second; once all have had their first chunk, delays are taken
    for `seconds`. LoadError if one of them is lost.
    """
    assert target.pid is not None
    before = local_processes.resident_bytes(target.pid)
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clients = [StreamClient(failed) for _ in range(num_streams)]
    gap_us = int(_OPEN_GAP_S * 1e6)
    try:
        for number, client in enumerate(clients):
            await connect(target.port, client)
            client.begin(stream_request(_OPEN_CHUNKS, gap_us, number))
            if number % _OPEN_AT_ONCE == _OPEN_AT_ONCE - 1:
                await asyncio.sleep(_OPEN_PAUSE_S)
        deadline = asyncio.get_running_loop().time() + 30.0
        while not all(client.delays_ns for client in clients) and not failed.done():
            if asyncio.get_running_loop().time() > deadline:
                missing = sum(not client.delays_ns for client in clients)
                raise LoadError(f"{missing} of {num_streams} streams do not begin")
            await asyncio.sleep(0.1)
        for client in clients:
            client.delays_ns.clear()
        cpu_s = target.cpu_s()
        await asyncio.wait([failed], timeout=seconds)
        if failed.done():
            failed.result()
        cpu_s = target.cpu_s() - cpu_s
        resident = local_processes.resident_bytes(target.pid)
    finally:
        for client in clients:
            client.leave()
        if not failed.cancel():
            failed.exception()  # raised already
    delays = sorted(delay for client in clients for delay in client.delays_ns)
    return {
        "open streams": float(num_streams),
        "open chunks_s": len(delays) / seconds,
        "open cpu_us": cpu_s / len(delays) * 1e6,
        "open delay p50_us": _quantile_us(delays, 0.5),
        "open delay p99_us": _quantile_us(delays, 0.99),
        "open resident_mb": resident / 1e6,
        "open kb_a_stream": (resident - before) / num_streams / 1e3,
    }


def _quantile_us(ordered_ns: list[int], share: float) -> float:
    return percentile([taken / 1e3 for taken in ordered_ns], share)
