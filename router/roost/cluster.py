"""Routers, replicas and maybe a Redis as local processes: start, watch, stop. Behind `roost up`.

    start    replicas first, each on a free port that it tells in its ready line, then the routers
    watch    who dies is reported, the rest goes on; without a router, or a replica, all stops
    stop     routers first (they drain), then replicas, SIGTERM, then SIGKILL after a grace period

Nothing outlives us: children lead their own sessions, so that Ctrl-C reaches only this process
and stopping has an order; and each holds a *lifeline*, the read end of a pipe whose other end
closes when this process dies, however it dies. Redis knows no lifeline: a shell beside it reads
the pipe, and kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import msgspec

from roost.local_redis import NoRedisError, redis_command
from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool

_READY = re.compile(r"^ready: (?P<model>.*) on (?P<url>http://\S+)")
_LINE_END = re.compile(r"[\r\n]+")
_LAST_LINES = 12
_MAX_LINE = 4096
_STOP_S = 15.0
_READY_S = 5.0  # for the router to say whether it is ready
_SECRET_BYTES = 32
_GUARD = 'read -r _; kill -9 "$0" 2>/dev/null'


_ROUTER = "router"
_REPLICA = "r"
_REDIS = "redis"


class ClusterError(Exception):
    """The cluster cannot start or go on; one line that says what to do."""


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost up`."""

    model: str
    num_replicas: int
    host: str
    port: int
    admin_port: int
    num_routers: int = 1  # the first on `port` and `admin_port`, others on the next ones
    redis: bool = False  # started, too, and routers share what they know through it
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
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # Redis' and the secret's
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
            if self._folder is not None:
                self._folder.cleanup()

    @property
    def base_urls(self) -> list[str]:
        """What clients use, of each router."""
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        return [f"http://{host}:{config.port + n}/v1" for n in range(config.num_routers)]

    @property
    def admin_urls(self) -> list[str]:
        """What operators use, of each router."""
        config = self._config
        return [f"http://127.0.0.1:{config.admin_port + n}" for n in range(config.num_routers)]

    async def start(self) -> None:
        """Start all and wait until requests are served. Raises ClusterError."""
        config = self._config
        sharing = await self._start_redis() if config.redis else []
        self._progress(f"starting {config.num_replicas} replicas of {config.model}")
        replicas = [await self._start_replica(n) for n in range(config.num_replicas)]
        async with asyncio.timeout(config.start_timeout_s):
            for replica in replicas:
                await self._unless_one_dies(replica.ready.wait())
                self._progress(f"replica {replica.name} is ready at {replica.url}")
            self.model = replicas[0].model
            for number in range(config.num_routers):
                await self._start_router(number, [r.url for r in replicas], sharing)
            for base_url, admin_url in zip(self.base_urls, self.admin_urls, strict=True):
                await self._unless_one_dies(self._until_routing(admin_url))
                self._progress(f"router is ready at {base_url}")

    async def watch(self) -> None:
        """Report who dies; returns, with ClusterError, only if no router or no replica is left."""
        waiting = {asyncio.create_task(child.ended()): child for child in self._children}
        try:
            while waiting:
                ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    child = waiting.pop(task)
                    left = {_kind(other) for other in waiting.values()}
                    if not left >= {_REPLICA, _ROUTER}:
                        raise ClusterError(child.obituary())
                    self._progress(f"{child.obituary()}\nthe others go on")
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
        return await self._spawn_roost(f"{_REPLICA}{number}", options)

    async def _start_redis(self) -> list[str]:
        """Start a Redis; the options of routers that share through it."""
        self._folder = tempfile.TemporaryDirectory(prefix="roost-")
        folder = Path(self._folder.name)
        secret = folder / "secret"
        secret.write_text(secrets.token_urlsafe(_SECRET_BYTES))
        try:
            command = redis_command(folder)
        except NoRedisError as error:
            raise ClusterError(str(error)) from None
        redis = await self._spawn(_REDIS, command)
        await asyncio.create_subprocess_exec(
            "sh", "-c", _GUARD, str(redis.process.pid), stdin=self._lifeline, start_new_session=True
        )
        socket = folder / "redis.sock"
        async with asyncio.timeout(_READY_S):
            await self._unless_one_dies(_until_exists(socket))
        self._progress(f"Redis is ready at unix://{socket}")
        return ["--redis", f"unix://{socket}", "--redis-secret-file", str(secret)]

    async def _start_router(
        self, number: int, urls: Sequence[str], sharing: Sequence[str]
    ) -> Child:
        config = self._config
        options = ["route", "--host", config.host, "--port", str(config.port + number)]
        options += ["--admin-port", str(config.admin_port + number)]
        options += ["--insecure"] if config.insecure else []
        for url in urls:
            options += ["--replica", url]
        name = _ROUTER if config.num_routers == 1 else f"{_ROUTER}{number}"
        return await self._spawn_roost(name, [*options, *sharing])

    async def _spawn_roost(self, name: str, options: Sequence[str]) -> Child:
        lifeline = ("--lifeline-fd", str(self._lifeline))
        return await self._spawn(name, [sys.executable, "-m", "roost", *options, *lifeline])

    async def _spawn(self, name: str, command: Sequence[str]) -> Child:
        process = await asyncio.create_subprocess_exec(
            *command,
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

    async def _until_routing(self, admin_url: str) -> None:
        """Wait until the router there counts every replica as up."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(UpstreamPool(admin_url, loop, _READY_S)) as admin:
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
        for kind in (_ROUTER, _REPLICA, _REDIS):
            group = [child for child in self._children if _kind(child) == kind]
            for child in group:
                _signal(child, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    for child in group:
                        await child.ended()
            for child in group:
                _signal(child, signal.SIGKILL)
                await child.ended()


def _kind(child: Child) -> str:
    return child.name.rstrip("0123456789")


async def _until_exists(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240 - a few times, at the start
        await asyncio.sleep(0.01)


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
