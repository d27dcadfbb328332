"""`roost bench replay`: every router on every trace, over HTTP, in scaled time. Linux.

In each round every trace is played through every router, with fresh processes for mocks and
router, one after another; the order turns from round to round.

Not here: the engines that compute (real_engines.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from roost_loadtest import local_processes
from roost_loadtest.fleet_sim.load import time_scale, work_s
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.trace import Trace, read_trace
from roost_loadtest.peers import Launch, ProcessGroup
from roost_loadtest.replay import routers
from roost_loadtest.replay.driving import play, progress_line, say
from roost_loadtest.replay.dynamo_peer import Engines
from roost_loadtest.replay.figures import Figures, figures, table
from roost_loadtest.replay.mock_engines import MockConfig, Stats
from roost_loadtest.replay.prompts import MODEL, TraceText, as_request, chat_body
from roost_router.compiled import is_compiled

_START_S = 20.0
_ATTEMPTS = 3


class MocksError(Exception):
    """The mock engines do not start; the message has the end of their log."""


class ReplayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench replay`."""

    limit: int | None = 600  # requests of each trace
    load: float = 0.85
    speed_up: float = 4.0
    num_replicas: int = 8
    kv_tokens: int = 500_000
    block_tokens: int = 64  # of the mocks
    rounds: int = 1
    routers: tuple[str, ...] = routers.DEFAULT
    programs: dict[str, Path | None] = {}
    patience_s: float = 60.0  # of the wall, for an answer
    json_path: Path | None = None


class Results(msgspec.Struct):
    """All figures of a run, as the JSON file holds them."""

    config: ReplayConfig
    about: dict[str, Any]
    measured: dict[str, dict[str, list[Figures]]]  # trace -> router -> a row a round


def replay(traces: Sequence[Path], config: ReplayConfig) -> Results:
    """Play it all, print a table a trace, write the JSON file.

    Raises TraceError or TooLargeError for a trace, ValueError for a router's name, PeerError for
    one that does not start.
    """
    choices, missing = routers.choose(config.routers, config.programs)
    for line in missing:
        say(line)
    results = Results(config, _about(choices), {})
    read = [read_trace(path, config.limit) for path in traces]
    try:
        for number in range(config.rounds):
            for trace in read:
                rows = results.measured.setdefault(trace.name, {c.label: [] for c in choices})
                with tempfile.TemporaryDirectory(prefix="roost-replay-") as folder:
                    bench = _Bench(trace, config, Path(folder))
                    for choice in routers.turned(choices, number):
                        with routers.leaving_out(choice, choices, rows):
                            rows[choice.label].append(bench.play(choice, number))
    finally:  # what was measured before a failure is kept
        if config.json_path is not None:
            encoded = msgspec.json.encode(results, enc_hook=str)
            config.json_path.write_bytes(msgspec.json.format(encoded, indent=1))
    for trace in read:
        lines = table(results.measured[trace.name], routers.OURS)
        print("\n".join(["", _title(trace, config), *lines]))
    return results


class _Bench:
    """One trace, ready to be played through any router."""

    def __init__(self, trace: Trace, config: ReplayConfig, folder: Path) -> None:
        self._trace = trace
        self._config = config
        self._folder = folder
        times = StepTimes()
        work = work_s(trace, times, config.kv_tokens)
        scale = time_scale(trace, work, config.num_replicas, config.load)
        self._chains = TraceText(trace).chains(scale / config.speed_up)
        self._mock_config = MockConfig(
            speed_up=config.speed_up,
            times=times,
            kv_tokens=config.kv_tokens,
            block_tokens=config.block_tokens,
        )

    def play(self, choice: routers.Choice, number: int) -> Figures:
        """One router, once, with fresh mocks."""
        config = self._config
        with contextlib.ExitStack() as stack:
            mocks = start_mocks(
                stack,
                self._mock_config,
                config.num_replicas,
                self._folder,
                kv_events=choice.follows_caches,
            )
            running = routers.start(
                stack,
                choice,
                Engines(mocks.ports, mocks.event_ports, config.block_tokens, config.kv_tokens),
                as_request(chat_body(MODEL, "Are you there?", 1)),
                self._folder,
                poll_interval_s=max(0.05, 1.0 / config.speed_up),
            )
            label = f"round {number + 1}, {self._trace.name}, {choice.label}"
            engines = [mocks.pid, *running.helpers]
            outcomes, spent = play(self._chains, running.target, engines, config.patience_s, label)
            stats = [_stats(port) for port in mocks.ports]
        found = figures(
            outcomes,
            spent,
            speed_up=config.speed_up,
            computed_tokens=[one.computed_tokens for one in stats],
            engines_late_s=max(one.late_p99_s for one in stats) / config.speed_up,
        )
        say(progress_line(label, found))
        return found


class Mocks(msgspec.Struct, frozen=True):
    """Mock engines that listen, all in one process."""

    pid: int
    ports: list[int]
    event_ports: list[int]  # of their KV events; none if they publish none


def start_mocks(
    stack: contextlib.ExitStack,
    config: MockConfig,
    num_replicas: int,
    folder: Path,
    *,
    kv_events: bool = False,
) -> Mocks:
    """Start mocks on free ports; they end with `stack`. MocksError if they do not listen.

    A port that was free a moment ago may not be any more: then others are tried.
    """
    for attempt in range(_ATTEMPTS):
        ports = [local_processes.free_port() for _ in range(num_replicas)]
        event_ports = [local_processes.free_port() for _ in ports if kv_events]
        placed = msgspec.structs.replace(config, ports=ports, event_ports=event_ports)
        encoded = msgspec.json.encode(placed).decode()
        command = [sys.executable, "-m", "roost_loadtest.replay.mock_engines", encoded]
        log = folder / f"mocks-{ports[0]}-{attempt}.log"
        group = ProcessGroup("mocks", Launch(command), log)
        stack.callback(group.stop)
        if _listen(ports, group):
            return Mocks(group.popen.pid, ports, event_ports)
    raise MocksError(str(group.failed("do not listen")))


def _listen(ports: Sequence[int], group: ProcessGroup) -> bool:
    """Wait until all of them do; False if the process has ended."""
    deadline = time.monotonic() + _START_S
    while group.popen.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for port in ports:
                socket.create_connection(("127.0.0.1", port)).close()
            return True
        time.sleep(0.02)
    return False


def _stats(port: int) -> Stats:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        return msgspec.json.decode(answer.read(), type=Stats)


def _about(choices: Sequence[routers.Choice]) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "compiled": is_compiled(),  # ours, as its processes have the same path
        "versions": {choice.label: choice.kind.version for choice in choices},
    }


def _title(trace: Trace, config: ReplayConfig) -> str:
    return (
        f"{trace.name}: {len(trace.requests)} requests, load {config.load:g}, "
        f"{config.num_replicas} mock replicas, {config.speed_up:g} times faster than real time"
    )
