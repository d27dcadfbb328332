"""Real replicas and a router as processes that can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import aiohttp

from roost_loadtest import local_processes
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import Launch, PeerError, ProcessGroup

_READY_S = 120.0


class Server:
    """One `roost` process that answers GETs; always on the same port."""

    def __init__(self, name: str, options: Sequence[str], ready: str, log: Path) -> None:
        """`options` come after `roost`; `ready`: URL that is 200 once it serves."""
        self._name = name
        self._launch = Launch([sys.executable, "-m", "roost", *options])
        self._ready = ready
        self._log = log
        self._group: ProcessGroup | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._group is not None
        return self._group.popen.pid

    async def start(self) -> float:
        """Start it; seconds until it was ready. PeerError if it ends or takes too long."""
        started = time.monotonic()
        group = self._group = ProcessGroup(self._name, self._launch, self._log)
        while await status(self._ready) != 200:
            if group.popen.poll() is not None:
                raise group.failed("has ended")
            if time.monotonic() - started > _READY_S:
                raise group.failed(f"is not ready after {_READY_S:.0f} s")
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    def send_all(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would."""
        self.send_all(signal.SIGKILL)
        await self.ended()

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self._group is not None
        return await asyncio.to_thread(self._group.popen.wait)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after 20 s; harmless when it never started."""
        if self._group is not None:
            await asyncio.to_thread(self._group.stop)

    def num_fds(self) -> int:
        """Open descriptors now, over the process and its children."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def rss_mb(self) -> float:
        """Resident memory in MiB, over the process and its children."""
        return local_processes.resident_bytes(self.pid) / (1 << 20)

    def pids(self) -> list[int]:
        """The process and its descendants."""
        return local_processes.family(self.pid)


class Engine(Server):
    """A replica with a real model."""

    def __init__(self, number: int, model: str, folder: Path, *, threads: int = 1) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["serve", model, "--port", str(self.port), "--threads", str(threads)]
        log = folder / f"engine-{number}.log"
        super().__init__(f"engine {number}", options, f"{self.url}/health", log)

    async def model(self) -> str:
        """The id of its model."""
        return str(json.loads(await body(f"{self.url}/v1/models"))["data"][0]["id"])


class Router(Server):
    """Our router over some replicas."""

    def __init__(self, urls: Sequence[str], folder: Path, options: Sequence[str] = ()) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.admin = f"http://127.0.0.1:{self.admin_port}"
        self._num_replicas = len(urls)
        command = ["route", "--port", str(self.port), "--admin-port", str(self.admin_port)]
        command += [part for url in urls for part in ("--replica", url)]
        log = folder / "router.log"
        super().__init__("router", [*command, *options], f"{self.admin}/ready", log)

    async def until_up(self, num_replicas: int | None = None) -> None:
        """Wait until it counts so many replicas as up, by default all. PeerError after 30 s."""
        wanted = self._num_replicas if num_replicas is None else num_replicas
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                if len(json.loads(await body(f"{self.admin}/ready"))["replicas_up"]) >= wanted:
                    return
            await asyncio.sleep(0.02)
        raise PeerError(f"the router does not count {wanted} replicas as up")


@contextlib.asynccontextmanager
async def running(servers: Sequence[Server]) -> AsyncIterator[None]:
    """All of them started at the same time and, in reverse order, ended."""
    try:
        await asyncio.gather(*(server.start() for server in servers))
        yield
    finally:
        for server in reversed(servers):
            await server.stop()


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for `condition`, looking every 2 ms; whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.002)
    return True


async def status(url: str) -> int:
    """Status of a GET, 0 if there is no answer."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status
    except (aiohttp.ClientError, OSError):
        return 0


async def body(url: str) -> str:
    """Body of a GET, whatever its status."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


def sample_sum(page: str, name: str) -> float:
    """Sum of a metric's samples on a Prometheus page."""
    samples = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, samples))
