"""Benchmark: what a routing decision costs, beside the least it could cost.

The limit is hashing the prompt once in one piece with the same hash: every byte must be read.
The index holds many other conversations on all replicas, so lookups miss the CPU's caches.
"""

from __future__ import annotations

from functools import partial
from random import Random

from xxhash import xxh3_64_intdigest

from roost_loadtest.median_us import median_us
from roost_router.app import build_placer
from roost_router.config import RouterConfig
from roost_router.index.text_chain import TEXT_BLOCK_BYTES, text_chain
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_wire.load_report import LoadReport

_SIZES = (2 << 10, 8 << 10, 64 << 10, 512 << 10)


def bench_decide(*, num_replicas: int, num_blocks: int, rounds: int) -> None:
    """Print µs of hash + place + finish for several prompt sizes, and the ratio to one hash."""
    placer, rng = _filled_placer(num_replicas, num_blocks), Random(2)
    print(f"{placer.index!r:.60}, {num_replicas} replicas")
    print(f"{'prompt':>9} {'hash once':>10} {'chain':>9} {'lookup':>9} {'decide':>9} {'ratio':>7}")
    for size in _SIZES:
        prompt = rng.randbytes(size)
        _decide(placer, prompt)  # resident from now on
        chain, holders = text_chain(prompt), (1 << num_replicas) - 1
        once = median_us(partial(xxh3_64_intdigest, prompt), rounds)
        hashing = median_us(partial(text_chain, prompt), rounds)
        lookup = median_us(partial(placer.index.lookup, chain, holders), rounds)
        decide = median_us(partial(_decide, placer, prompt), rounds)
        print(
            f"{size >> 10:>6} KB {once:>7.1f} µs {hashing:>6.1f} µs {lookup:>6.1f} µs "
            f"{decide:>6.1f} µs {decide / once:>7.1f}"
        )


def _decide(placer: Placer, prompt: bytes) -> None:
    fields = RoutingFields("m", stream=True, prompt=prompt)  # which hashes it
    placement = placer.place(fields, 0.0)
    placer.first_byte(placement, 0.0, streamed=False)
    placer.finish(placement, 0.0)


def _filled_placer(num_replicas: int, num_blocks: int) -> Placer:
    urls = tuple(f"http://127.0.0.1:{port}" for port in range(10_000, 10_000 + num_replicas))
    placer, rng = build_placer(RouterConfig(replicas=urls), Random(1)), Random(1)
    for replica in placer.fleet.replicas:
        replica.speed.observe_ttft(1000, 0.5)
        report = LoadReport(kv_capacity_tokens=num_blocks * TEXT_BLOCK_BYTES)
        placer.fleet.answered(replica, ["m"], report)
    while len(placer.index) < num_blocks:
        prompt = rng.randbytes(64 << 10)
        _decide(placer, prompt)
    return placer
