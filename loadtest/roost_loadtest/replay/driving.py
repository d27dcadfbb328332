"""Drive a router with prepared requests, and read what it cost. Linux."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import uvloop

from roost_loadtest import local_processes
from roost_loadtest.replay.client import Chain, Outcome, drive
from roost_loadtest.replay.figures import Figures, Spent

if TYPE_CHECKING:
    from roost_loadtest.bench_proxy_routers import Target

_SHOW_EVERY = 50  # requests


def play(
    chains: Sequence[Chain], target: Target, engines: Sequence[int], patience_s: float, label: str
) -> tuple[list[Outcome], Spent]:
    """Play all chains against `target`; what came of them, and what it took.

    `engines`: process ids. `label` stands before the progress, where somebody looks on. The
    collector of garbage is off meanwhile: its pauses would count as delays.
    """
    total = sum(len(chain.asks) for chain in chains)

    def cpu() -> tuple[float, float, float]:
        of_engines = sum(local_processes.cpu_s(pid) for pid in engines)
        return target.cpu_s(), of_engines, time.process_time()

    gc.collect()
    gc.disable()
    try:
        with _progress(label, total) as on_progress:
            before, began = cpu(), time.perf_counter()
            outcomes = uvloop.run(
                drive(target.port, chains, patience_s=patience_s, on_progress=on_progress)
            )
            wall_s, after = time.perf_counter() - began, cpu()
    finally:
        gc.enable()
    router_s, engines_s, client_s = (now - was for now, was in zip(after, before, strict=True))
    return outcomes, Spent(
        wall_s=wall_s,
        router_cpu_s=router_s,
        engines_cpu_s=engines_s,
        client_cpu_s=client_s,
        num_cores=len(os.sched_getaffinity(0)),
    )


def progress_line(label: str, found: Figures) -> str:
    """What is told of a run when it has ended."""
    doubts = "".join(f" ({doubt})" for doubt in found.doubts)
    return f"{label}: ttft {found.ttft_mean_s:.3f} s, cached {found.cached:.1%}{doubts}"


def say(line: str) -> None:
    """Progress: not a part of the result."""
    sys.stderr.write(line + "\n")


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return

    def show(num_ended: int) -> None:
        if num_ended % _SHOW_EVERY == 0:
            sys.stderr.write(f"\r{label}: {num_ended}/{total}")

    yield show
    sys.stderr.write("\r\x1b[K")
