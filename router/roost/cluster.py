"""A router and its replicas as local processes: start, watch, stop. Behind `roost up`.

    start    replicas first, each on a free port that it tells in its ready line, then the router
    watch    a replica that dies is reported, the rest goes on; without the router all stops
    stop     router first (it drains), then replicas, SIGTERM, then SIGKILL after a grace period

Nothing outlives us: children lead their own sessions, so that Ctrl-C reaches only this process
and stopping has an order; and each holds a *lifeline*, the read end of a pipe whose other end
closes when this process dies, however it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence

import msgspec

from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool

_READY = re.compile(r"^ready: (?P<model>.*) on (?P<url>http://\S+)")
_LINE_END = re.compile(r"[\r\n]+")
_LAST_LINES = 12
_MAX_LINE = 4096
_STOP_S = 15.0
_READY_S = 5.0  # for the router to say whether it is ready


class ClusterError(Exception):
    """The cluster cannot start or go on; one line that says what to do."""


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost up`."""

    model: str
    num_replicas: int
    host: str
    port: int
    admin_port: int
    threads: int | None = None  # a replica; None: the cores shared out evenly
    kv_tokens: int | None = None  # a replica; None: the engine's default
    insecure: bool = False  # `host` may be one that other machines reach
    verbose: bool = False  # show what the children log
    start_timeout_s: float = 600.0  # reading a large model from a slow disk takes minutes


class Child:
    """One child process and the last lines it wrote."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, *, echo: bool) -> None:
        self.name = name
        self.process = process
        self.url = ""
        self.model = ""
        self.ready = asyncio.Event()
        self._echo = echo
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Follow the output to its end, whatever it is: a full pipe would stop the child."""
        assert self.process.stdout is not None
        open_line = ""
        while data := await self.process.stdout.read(65536):
            *lines, open_line = _LINE_END.split(open_line + data.decode("utf-8", "replace"))
            open_line = open_line[-_MAX_LINE:]
            for line in lines:
                self._note(line)
        self._note(open_line)

    def _note(self, line: str) -> None:
        if not line.strip():
            return
        self._lines.append(line[-_MAX_LINE:])
        if self._echo:
            sys.stderr.write(f"{self.name}: {line}\n")
        if found := _READY.match(line):
            self.model, self.url = found["model"], found["url"]
            self.ready.set()

    async def ended(self) -> int:
        """Wait until the process has ended and its output is read; the exit code."""
        code = await self.process.wait()
        await asyncio.shield(self.reading)  # whoever stops waiting must not stop the reading
        return code

    def obituary(self) -> str:
        """How it ended, with its last words."""
        words = "".join(f"\n  {self.name}: {line}" for line in self._lines)
        return f"{self.name} ended with code {self.process.returncode}{words}"


class Cluster:
    """Context manager around all children."""

    def __init__(self, config: ClusterConfig, progress: Callable[[str], None]) -> None:
        self._config = config
        self._progress = progress
        self._children: list[Child] = []
        self._lifeline, self._our_end = os.pipe()
        self.model = ""

    async def __aenter__(self) -> Cluster:
        """Nothing is started yet; see `start`."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop every child, in order, and wait for the last."""
        try:
            await self._stop()
        finally:
            os.close(self._our_end)
            os.close(self._lifeline)

    @property
    def base_url(self) -> str:
        """What clients use."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"http://{host}:{self._config.port}/v1"

    @property
    def admin_url(self) -> str:
        """What operators use."""
        return f"http://127.0.0.1:{self._config.admin_port}"

    async def start(self) -> None:
        """Start replicas and router and wait until requests are served. Raises ClusterError."""
        config = self._config
        self._progress(f"starting {config.num_replicas} replicas of {config.model}")
        replicas = [await self._start_replica(n) for n in range(config.num_replicas)]
        async with asyncio.timeout(config.start_timeout_s):
            for replica in replicas:
                await self._unless_one_dies(replica.ready.wait())
                self._progress(f"replica {replica.name} is ready at {replica.url}")
            self.model = replicas[0].model
            await self._start_router([replica.url for replica in replicas])
            await self._unless_one_dies(self._until_routing())
        self._progress(f"router is ready at {self.base_url}")

    async def watch(self) -> None:
        """Report replicas that die; returns, with ClusterError, only if the router does."""
        waiting = {asyncio.create_task(child.ended()): child for child in self._children}
        try:
            while waiting:
                ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    child = waiting.pop(task)
                    if child.name == "router" or len(waiting) <= 1:
                        raise ClusterError(child.obituary())
                    self._progress(f"{child.obituary()}\nthe other replicas go on")
        finally:
            for task in waiting:
                task.cancel()

    async def _start_replica(self, number: int) -> Child:
        config = self._config
        cores = os.cpu_count() or 1
        threads = config.threads or max(1, cores // config.num_replicas)
        options = ["serve", config.model, "--port", "0", "--threads", str(threads)]
        if config.kv_tokens is not None:
            options += ["--kv-tokens", str(config.kv_tokens)]
        return await self._spawn(f"r{number}", options)

    async def _start_router(self, urls: Sequence[str]) -> Child:
        config = self._config
        options = ["route", "--host", config.host, "--port", str(config.port)]
        options += ["--admin-port", str(config.admin_port)]
        options += ["--insecure"] if config.insecure else []
        for url in urls:
            options += ["--replica", url]
        return await self._spawn("router", options)

    async def _spawn(self, name: str, options: Sequence[str]) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "roost",
            *options,
            "--lifeline-fd",
            str(self._lifeline),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(self._lifeline,),
            start_new_session=True,
        )
        child = Child(name, process, echo=self._config.verbose)
        self._children.append(child)
        return child

    async def _unless_one_dies(self, event: Coroutine[None, None, object]) -> None:
        """Wait for `event`; ClusterError as soon as any child has ended before it."""
        awaited = asyncio.ensure_future(event)
        deaths = {asyncio.create_task(child.ended()): child for child in self._children}
        try:
            done, _ = await asyncio.wait({awaited, *deaths}, return_when=asyncio.FIRST_COMPLETED)
            for task, child in deaths.items():
                if task in done:
                    raise ClusterError(child.obituary())
            awaited.result()
        finally:
            for waiting in (awaited, *deaths):
                waiting.cancel()

    async def _until_routing(self) -> None:
        """Wait until the router counts every replica as up."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(UpstreamPool(self.admin_url, loop, _READY_S)) as admin:
            while True:
                with contextlib.suppress(PageError, OSError):
                    page = await get_page(admin, b"/ready", None, _READY_S)
                    if page.status == 200:
                        up = msgspec.json.decode(page.body)["replicas_up"]
                        if len(up) == self._config.num_replicas:
                            return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End every child at once; whoever is stopping them then sees them end."""
        for child in self._children:
            _signal(child, signal.SIGKILL)

    async def _stop(self) -> None:
        routers = [child for child in self._children if child.name == "router"]
        replicas = [child for child in self._children if child.name != "router"]
        for group in (routers, replicas):
            for child in group:
                _signal(child, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    for child in group:
                        await child.ended()
            for child in group:
                _signal(child, signal.SIGKILL)
                await child.ended()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


class Progress:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print one line of progress."""
        sys.stdout.write(f"[{time.monotonic() - self._started_at:5.1f} s] {text}\n")
        sys.stdout.flush()
