"""Benchmark: what a router costs, ours beside its peers, interleaved in one run. Linux.

The router on one core, load and mock replicas on the other. CPU is the routers' own, from the
clock of their processes, not wall time: it does not depend on how fast the mocks are. In each
round every router is started anew and put through each scenario before the next scenario comes;
the order turns from round to round, so a drift of the machine meets all.

    start       from the start of the process to the first 200 through it; memory when idle
    requests    prompts of 0.2, 8 and 64 KB at 64 connections
    latency     one connection
    streams     paced and in bursts
    open        10,000 streams open at once; ours only

Peers: nginx and haproxy where they are installed; sglang-router and vllm-router where their
programs are given, out of environments of their own:

    python3.11 -m venv sglang && sglang/bin/pip install sglang-router==0.3.2
    python3.11 -m venv vllm && vllm/bin/pip install vllm-router==0.1.17

Not here: scenarios (bench_proxy_scenarios.py), routers (bench_proxy_routers.py), the table
(bench_proxy_table.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import uvloop

from roost_loadtest import bench_proxy_routers as routers
from roost_loadtest import bench_proxy_scenarios as scenarios
from roost_loadtest import bench_proxy_table as tables
from roost_loadtest import fault_routers, local_processes
from roost_loadtest.bench_proxy_load import requests_of
from roost_loadtest.bench_proxy_routers import Target
from roost_loadtest.bench_proxy_scenarios import Figures
from roost_loadtest.peers import Launch, ProcessGroup

Part = Literal["start", "requests", "latency", "streams", "open"]
PARTS: tuple[Part, ...] = ("start", "requests", "latency", "streams", "open")

_START_S = 20.0
_FILES = 1024  # descriptors that the benchmark itself may need
_FILES_A_STREAM = 2  # of a router: its client's and its replica's
_FILES_OF_ROUTER = 256  # ours keeps 192 back for what is not a client or a replica

_Scenario = Callable[[Target], Coroutine[Any, Any, Figures]]
_T = TypeVar("_T")


class ProxyBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench proxy`."""

    rounds: int = 3
    seconds: float = 2.0  # of a measurement
    connections: int = 64
    parts: tuple[Part, ...] = PARTS
    alone: bool = False  # without peers, also those that are installed
    sglang_router: Path | None = None  # the program, in the bin of its environment
    vllm_router: Path | None = None
    streams: int = 10_000  # of `open`
    json_path: Path | None = None

    def __post_init__(self) -> None:
        """ValueError for peers that are given and left out at once."""
        if self.alone and (self.sglang_router or self.vllm_router):
            raise ValueError("peers are given, and the benchmark is to run alone: choose")


class Results(msgspec.Struct):
    """All figures of a run, as the JSON file holds them."""

    config: ProxyBenchConfig
    about: dict[str, Any]
    measured: dict[str, list[Figures]]  # router -> a mapping a round
    open_streams: Figures
    goals: list[dict[str, Any]]


def bench_proxy(config: ProxyBenchConfig) -> Results:
    """Run it, print the table and the goals, write the JSON file.

    Raises PeerError for a router that does not start, LoadError for one that does not answer.
    About a minute a round with all peers, and half a minute for the open streams.
    """
    kinds = [fault_routers.ours()]
    if not config.alone:
        programs = {"sglang-router": config.sglang_router, "vllm-router": config.vllm_router}
        kinds += fault_routers.find_peers(programs)
    versions = {kind.name: kind.version for kind in kinds} | {
        tables.OURS: importlib.metadata.version("roost")
    }
    results = Results(config, _about_machine() | {"versions": versions}, {}, {}, [])
    load_core, router_core = local_processes.two_cores()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roost-bench-")))
        stack.enter_context(local_processes.on_core(load_core))
        most_streams = _most_streams(config.streams) if "open" in config.parts else 0
        mocks = [_start_mock(stack, folder) for _ in range(2)]
        bench = _Bench(config, kinds, mocks, router_core, folder)
        results.measured = bench.measured
        try:
            for number in range(config.rounds):
                bench.run_round(number)
            if most_streams:
                results.open_streams = bench.run_open(most_streams)
        finally:  # what was measured before a failure is kept
            judged = tables.judge(bench.measured)
            results.goals = [{"goal": j.goal, "value": j.value, "is": j.verdict} for j in judged]
            if config.json_path is not None:
                encoded = msgspec.json.encode(results, enc_hook=str)
                config.json_path.write_bytes(msgspec.json.format(encoded, indent=1))
    print(f"{config.connections} connections, 2 mock replicas, medians of {config.rounds} rounds")
    print("\n".join([*tables.table(bench.measured, versions), "", *tables.goal_lines(judged)]))
    if results.open_streams:
        print("\n" + tables.open_line(results.open_streams, config.streams))
    return results


class _Bench:
    """One run over a pair of mocks."""

    def __init__(
        self,
        config: ProxyBenchConfig,
        kinds: Sequence[fault_routers.RouterKind],
        mocks: Sequence[int],
        router_core: int | None,
        folder: Path,
    ) -> None:
        self.measured: dict[str, list[Figures]] = {
            name: [] for name in (tables.DIRECT, *(kind.name for kind in kinds))
        }
        self._config = config
        self._kinds = kinds
        self._mocks = mocks
        self._router_core = router_core
        self._folder = folder

    def run_round(self, number: int) -> None:
        """Start all routers, put each through each scenario."""
        with contextlib.ExitStack() as stack:
            targets = [Target(tables.DIRECT, self._mocks[0], None)]
            for rounds in self.measured.values():
                rounds.append({})
            for kind in _turned(self._kinds, number):
                target, figures = self._start(kind, stack)
                targets.append(target)
                if "start" in self._config.parts:
                    self.measured[kind.name][-1].update(figures)
            for scenario in self._scenarios():
                for target in _turned(targets, number):
                    self.measured[target.name][-1].update(_run(scenario, target))
                    _progress(f"round {number + 1}: {target.name} {self._last(target)}")

    def run_open(self, num_streams: int) -> Figures:
        """Very many streams through a fresh router of ours."""
        with contextlib.ExitStack() as stack:
            target, _ = self._start(self._kinds[0], stack)
            _progress(f"opening {num_streams} streams")
            seconds = max(4.0, 5 * self._config.seconds)
            scenario = partial(scenarios.open_streams, num_streams=num_streams, seconds=seconds)
            return _run(scenario, target)

    def _start(
        self, kind: fault_routers.RouterKind, stack: contextlib.ExitStack
    ) -> tuple[Target, Figures]:
        probe = requests_of(scenarios.SIZES["small"])[0]
        started = routers.start(kind, self._mocks, probe, self._router_core, self._folder)
        stack.callback(started.router.end)
        return started.target, {"ready_s": started.ready_s, "idle_mb": started.idle_bytes / 1e6}

    def _scenarios(self) -> Iterator[_Scenario]:
        config = self._config
        if "requests" in config.parts:
            for size in scenarios.SIZES:
                yield partial(
                    scenarios.requests,
                    size=size,
                    seconds=config.seconds,
                    connections=config.connections,
                )
        if "latency" in config.parts:
            yield partial(scenarios.latency, seconds=config.seconds)
        if "streams" in config.parts:
            yield partial(scenarios.paced, seconds=config.seconds)
            yield scenarios.burst

    def _last(self, target: Target) -> str:
        name, value = list(self.measured[target.name][-1].items())[-1]
        return f"{name} {value:,.1f}"


def _run(scenario: _Scenario, target: Target) -> Figures:
    """Without the collector of garbage, whose pauses would count as delays."""
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(scenario(target))
    finally:
        gc.enable()


def _start_mock(stack: contextlib.ExitStack, folder: Path) -> int:
    """The port of a mock that listens, on the core of this process."""
    port = local_processes.free_port()
    command = [sys.executable, "-m", "roost_loadtest.mock_replica", str(port)]
    group = ProcessGroup("mock", Launch(command), folder / f"mock-{port}.log")
    stack.callback(group.stop)
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return port
        if group.popen.poll() is not None or time.monotonic() > deadline:
            raise group.failed("does not listen")
        time.sleep(0.02)


def _most_streams(asked: int) -> int:
    """How many streams a router may hold open here; raises the limit as far as it goes."""
    limit = local_processes.allow_open_files(asked * _FILES_A_STREAM + _FILES)
    return min(asked, (limit - _FILES_OF_ROUTER) // _FILES_A_STREAM)


def _turned(items: Sequence[_T], number: int) -> list[_T]:
    """Another begins in each round."""
    start = number % len(items)
    return [*items[start:], *items[:start]]


def _about_machine() -> dict[str, Any]:
    cpu = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "uvloop": importlib.metadata.version("uvloop"),
    }


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
