"""The routers of `roost bench proxy`: how each is started, how soon it answers, what it holds.

Ours runs with its KV policy, metrics and limits on. Peers run as their users start them, with
what is fair to them: nginx and haproxy keep connections and write no access log, haproxy does not
delay chunks, logs of the others are off. vllm-router balances round robin, because its
cache_aware policy sends every prompt to every replica first.

Not here: which peers there are (fault_routers.py), what they are put through.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from roost_loadtest import local_processes
from roost_loadtest.fault_routers import RouterKind, RunningRouter
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import Launch, PeerError, ProcessGroup

_START_S = 30.0
_SETTLE_S = 1.0  # from the first answer until memory is read

_NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  client_body_buffer_size 1m;
  upstream replicas {{ {servers} keepalive 128; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; keepalive_requests 1000000;
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

_HAPROXY = """
global
  maxconn 4096
  nbthread 1
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  option http-no-delay
  http-reuse always
frontend clients
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance roundrobin
{servers}
"""


class Target(msgspec.Struct, frozen=True):
    """Where load goes: a router, or straight to a mock (`pid` None), which costs no router."""

    name: str
    port: int
    pid: int | None

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far."""
        return 0.0 if self.pid is None else local_processes.cpu_s(self.pid)


class Start(msgspec.Struct, frozen=True):
    """A started router and what its start took."""

    router: RunningRouter
    ready_s: float  # from the start of the process to the first 200 through it
    idle_bytes: int  # resident afterwards, all its processes

    @property
    def target(self) -> Target:
        """Where its load goes."""
        return Target(self.router.kind.name, self.router.port, self.router.group.popen.pid)


def start(
    kind: RouterKind, replicas: Sequence[int], probe: bytes, core: int | None, folder: Path
) -> Start:
    """Start a router on `core` over replicas on these ports; `probe` is a request it must answer.

    PeerError, with the end of its log, if it does not within 30 s.
    """
    port, admin_port = free_port(), free_port()
    urls = [f"http://127.0.0.1:{replica}" for replica in replicas]
    command = _command(kind, port, admin_port, urls, folder)
    return start_command(kind, command, (port, admin_port), probe, core=core, folder=folder)


def start_command(
    kind: RouterKind,
    command: list[str],
    ports: tuple[int, int],
    probe: bytes,
    *,
    folder: Path,
    core: int | None = None,
) -> Start:
    """As `start`, by this command, which makes it listen on these ports (data, admin)."""
    port, admin_port = ports
    began = time.perf_counter()
    with local_processes.on_core(core):
        group = ProcessGroup(kind.name, Launch(command), folder / f"{kind.name}-{port}.log")
    router = RunningRouter(kind, port, admin_port, group)
    try:
        _until_answering(port, probe, group)
        ready_s = time.perf_counter() - began
        time.sleep(_SETTLE_S)
        return Start(router, ready_s, local_processes.resident_bytes(group.popen.pid))
    except BaseException:
        router.end()
        raise


def _until_answering(port: int, probe: bytes, group: ProcessGroup) -> None:
    deadline = time.perf_counter() + _START_S
    while not _answers(port, probe):
        if group.popen.poll() is not None:
            raise group.failed("has ended")
        if time.perf_counter() > deadline:
            raise group.failed(f"does not answer after {_START_S:.0f} s")
        time.sleep(0.002)


def _answers(port: int, probe: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
            sock.sendall(probe)
            return sock.recv(4096).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _command(
    kind: RouterKind, port: int, admin_port: int, urls: Sequence[str], folder: Path
) -> list[str]:
    addresses = [url.removeprefix("http://") for url in urls]
    here = ["--host", "127.0.0.1", "--port", str(port)]
    launched = [*here, "--prometheus-port", str(admin_port), "--log-level", "error"]
    match kind.name:
        case "roost":
            replicas = [part for url in urls for part in ("--replica", url)]
            ports = [*here, "--admin-port", str(admin_port)]
            return [sys.executable, "-m", "roost", "route", *ports, *replicas]
        case "nginx":
            return nginx_command(kind.program, port, addresses, folder)
        case "haproxy":
            config = folder / f"haproxy-{port}.cfg"
            lines = [f"  server r{number} {at}" for number, at in enumerate(addresses)]
            config.write_text(_HAPROXY.format(port=port, servers="\n".join(lines)))
            return [kind.program, "-db", "-f", str(config)]
        case "sglang-router":
            policy = ["--policy", "cache_aware"]
            return [kind.program, "launch", *launched, *policy, "--worker-urls", *urls]
        case "vllm-router":
            return [kind.program, *launched, "--policy", "round_robin", "--worker-urls", *urls]
        case _:
            raise PeerError(f"{kind.name} is not a router that this benchmark knows")


def nginx_command(
    program: str, port: int, addresses: Sequence[str], folder: Path, method: str = ""
) -> list[str]:
    """nginx over these addresses; `method`: the directive of its balancing, if any."""
    home = folder / f"nginx-{port}"
    home.mkdir()
    servers = " ".join([method, *(f"server {address};" for address in addresses)])
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(dir=home, servers=servers, port=port))
    return [program, "-c", str(config), "-e", str(home / "error.log")]
