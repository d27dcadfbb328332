"""What befalls a real Redis while routers share through it, one class for each fault.

A *stage* is a Redis with all that is needed to disturb it. `strike` begins a fault, `again` is
called over and over while it lasts, `heal` ends it. All three block: they are called in a thread.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from random import Random
from typing import ClassVar

import redis

from roost_loadtest.redis_servers import SERVICE, RedisCluster, RedisSentinels, RedisServer
from roost_loadtest.tcp_proxy import TcpProxy

_DELAY_S = 0.2
_READY_S = 20.0
_LOADED_KEYS = 200
_LOADED_BYTES = 100_000


class Stage:
    """A plain server to which nothing happens: the control."""

    title: ClassVar[str] = "none (control)"

    def __init__(self, stack: ExitStack, version: str, prefix: bytes, fault_s: float) -> None:
        """Starts what is needed; it ends with `stack`. `prefix`: of the routers' keys."""
        self._prefix = prefix
        self._fault_s = fault_s
        self.url = self._start(stack, version)

    def _start(self, stack: ExitStack, version: str) -> str:
        """Start servers; the address for routers."""
        self._server = stack.enter_context(RedisServer(version))
        return self._server.url

    def strike(self) -> None:
        """The fault begins."""

    def again(self) -> None:
        """It goes on."""

    def heal(self) -> None:
        """It is over."""


class Killed(Stage):
    """SIGKILL, and a start with nothing in memory."""

    title = "kill"

    def strike(self) -> None:  # noqa: D102
        self._server.kill()

    def heal(self) -> None:  # noqa: D102
        self._server.start()


class Stopped(Stage):
    """SIGSTOP, SIGCONT: connections are accepted, and nothing answers."""

    title = "SIGSTOP"

    def strike(self) -> None:  # noqa: D102
        self._server.pause()

    def heal(self) -> None:  # noqa: D102
        self._server.resume()


class _Proxied(Stage):
    """Behind a proxy."""

    def _start(self, stack: ExitStack, version: str) -> str:
        super()._start(stack, version)
        self._proxy = stack.enter_context(TcpProxy(self._server.port))
        return f"redis://127.0.0.1:{self._proxy.port}"


class Delayed(_Proxied):
    """Each piece of each direction comes late."""

    title = "delay 200 ms each way"

    def strike(self) -> None:  # noqa: D102
        self._proxy.delay_s = _DELAY_S

    def heal(self) -> None:  # noqa: D102
        self._proxy.delay_s = 0.0


class BlackHole(_Proxied):
    """Connections stay, and nothing passes."""

    title = "black hole"

    def strike(self) -> None:  # noqa: D102
        self._proxy.is_silent = True

    def heal(self) -> None:  # noqa: D102
        self._proxy.is_silent = False


class Full(Stage):
    """More in memory than is allowed, and nothing may be evicted."""

    title = "OOM"

    def strike(self) -> None:  # noqa: D102
        self._server.client.config_set("maxmemory", "100kb")

    def heal(self) -> None:  # noqa: D102
        self._server.client.config_set("maxmemory", "0")


class FailedOver(Stage):
    """Sentinels make another server the primary; the old one lives, and refuses writes."""

    title = "READONLY after failover"

    def _start(self, stack: ExitStack, version: str) -> str:
        self._sentinels = stack.enter_context(RedisSentinels(version))
        return self._sentinels.url

    def strike(self) -> None:  # noqa: D102
        before = self._sentinels.primary()
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                self._sentinels.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", SERVICE)
                break
            except redis.ResponseError:  # a sentinel takes seconds to trust a new replica
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._sentinels.until_failed_over(before)


class Loading(Stage):
    """Killed, and started with so much on disk that reading it takes as long as the fault."""

    title = "LOADING"

    def _start(self, stack: ExitStack, version: str) -> str:
        delay_us = int(self._fault_s * 1e6 / _LOADED_KEYS)
        options: dict[str, str | int] = {"key-load-delay": delay_us, "rdbcompression": "no"}
        self._server = stack.enter_context(RedisServer(version, options=options))
        pipe = self._server.client.pipeline()
        for number in range(_LOADED_KEYS):
            pipe.set(f"other:{number}", "x" * _LOADED_BYTES)
        pipe.execute()
        return self._server.url

    def strike(self) -> None:  # noqa: D102
        self._server.client.save()
        self._server.kill()
        self._server.start(until=lambda: True)

    def heal(self) -> None:  # noqa: D102
        while True:
            with suppress(redis.BusyLoadingError, redis.ConnectionError, redis.TimeoutError):
                if self._server.client.ping():
                    return
            time.sleep(0.02)


class Flushed(Stage):
    """All keys and scripts vanish, again and again."""

    title = "FLUSHALL"

    def again(self) -> None:  # noqa: D102
        self._server.client.flushall()
        self._server.client.script_flush()


class Moved(Stage):
    """The routers' slot wanders from node to node: ASK while it does, MOVED then."""

    title = "MOVED, ASK"

    def _start(self, stack: ExitStack, version: str) -> str:
        self._cluster = stack.enter_context(RedisCluster(version))
        return self._cluster.url

    def again(self) -> None:  # noqa: D102
        key, nodes = self._prefix + b"news", self._cluster.nodes
        to = nodes[(nodes.index(self._cluster.owner(key)) + 1) % len(nodes)]
        self._cluster.start_moving(key, to)
        time.sleep(0.1)
        self._cluster.move(key, to)


class Poisoned(Stage):
    """What the routers wrote is overwritten: other types, random bytes, entries of the future."""

    title = "poisoned values"

    def _start(self, stack: ExitStack, version: str) -> str:
        self._rng = Random(1)
        return super()._start(stack, version)

    def again(self) -> None:  # noqa: D102
        client, rng = self._server.client, self._rng
        names = {self._prefix + name for name in (b"news", b"leases", b"holders")}
        for key in sorted(names | set(client.keys(self._prefix + b"*"))):
            blob = rng.randbytes(rng.randrange(1, 400))
            with suppress(redis.ResponseError):  # of a type or an id that does not fit
                match rng.randrange(6):
                    case 0:
                        client.set(key, blob)
                    case 1:
                        client.delete(key)
                        client.rpush(key, blob)
                    case 2:
                        client.delete(key)
                        client.hset(key, mapping={blob: blob, b"live": blob})
                    case 3:
                        client.xadd(key, {b"b": blob})
                    case 4:
                        client.xadd(key, {blob: blob})
                    case _:
                        client.delete(key)
                        client.xadd(key, {b"b": blob}, id=b"%d-1" % rng.getrandbits(63))


STAGES: tuple[type[Stage], ...] = (
    Stage,
    Killed,
    Stopped,
    Delayed,
    BlackHole,
    Full,
    FailedOver,
    Loading,
    Flushed,
    Moved,
    Poisoned,
)
