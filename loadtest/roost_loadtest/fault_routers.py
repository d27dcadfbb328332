"""The routers of the fault matrix as processes: ours, and peers at their best.

Peers are given every option they have for retrying elsewhere, and are otherwise left as they
come; all balance round robin, so that half of the requests meet the faulty replica. Ours runs
with its KV policy. Each start is a fresh process: what a breaker learned in one row must not
help in the next.

Not here: what they are put through (fault_matrix.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import Launch, ProcessGroup

_NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  upstream replicas {{ {servers} keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_next_upstream_tries 3;
      proxy_next_upstream
        error timeout invalid_header http_500 http_502 http_503 http_504 http_429 non_idempotent;
    }}
  }}
}}
"""

_HAPROXY = """
global
  maxconn 1024
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  option http-no-delay
  option abortonclose
  option redispatch 1
  retries 3
  retry-on all-retryable-errors
frontend clients
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance roundrobin
  option httpchk GET /health
{servers}
"""


_Command = Callable[[str, int, int, Sequence[str], Path], list[str]]


class RouterKind(msgspec.Struct, frozen=True):
    """A router that can be started. `program`: where it is; for ours the Python that runs it."""

    name: str
    program: str
    version: str


class RunningRouter(msgspec.Struct):
    """A started router."""

    kind: RouterKind
    port: int
    admin_port: int
    group: ProcessGroup

    def end(self) -> None:
        """SIGKILL for all its processes: nobody waits for the drain of a test."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group.popen.pid, signal.SIGKILL)
        self.group.popen.wait()


def ours() -> RouterKind:
    """The router of this installation."""
    return RouterKind("roost", sys.executable, "")


def find_peers(programs: dict[str, Path | None]) -> list[RouterKind]:
    """nginx and haproxy where they are installed, and the programs that were given."""
    found = {name: shutil.which(name) for name in ("nginx", "haproxy")}
    found |= {name: str(path) for name, path in programs.items() if path is not None}
    return [RouterKind(name, path, _version(name, path)) for name, path in found.items() if path]


def start_router(kind: RouterKind, urls: Sequence[str], folder: Path) -> RunningRouter:
    """Start `kind` over replicas; it may not listen yet. Its log goes to `folder`."""
    port, admin_port = free_port(), free_port()
    command = _COMMANDS[kind.name](kind.program, port, admin_port, urls, folder)
    log = folder / f"{kind.name}-{port}.log"
    return RunningRouter(kind, port, admin_port, ProcessGroup(kind.name, Launch(command), log))


def _roost(
    program: str, port: int, admin_port: int, urls: Sequence[str], folder: Path
) -> list[str]:
    del folder
    command = [program, "-m", "roost", "route", "--port", str(port)]
    command += ["--admin-port", str(admin_port)]
    return command + [part for url in urls for part in ("--replica", url)]


def _nginx(
    program: str, port: int, admin_port: int, urls: Sequence[str], folder: Path
) -> list[str]:
    del admin_port
    home = folder / f"nginx-{port}"
    home.mkdir()
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(dir=home, servers=servers, port=port))
    return [program, "-c", str(config), "-e", str(home / "error.log")]


def _haproxy(
    program: str, port: int, admin_port: int, urls: Sequence[str], folder: Path
) -> list[str]:
    del admin_port
    lines = [f"  server r{n} {url.removeprefix('http://')} check" for n, url in enumerate(urls)]
    config = folder / f"haproxy-{port}.cfg"
    config.write_text(_HAPROXY.format(port=port, servers="\n".join(lines)))
    return [program, "-db", "-f", str(config)]


def _launched(*first: str) -> _Command:
    """sglang's router and those that come from it."""

    def command(
        program: str, port: int, admin_port: int, urls: Sequence[str], folder: Path
    ) -> list[str]:
        del folder
        options = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
        options += ["--prometheus-port", str(admin_port), "--worker-urls", *urls]
        return [program, *first, *options]

    return command


_COMMANDS: dict[str, _Command] = {
    "roost": _roost,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "sglang-router": _launched("launch"),
    "smg": _launched("launch"),
    "vllm-router": _launched(),
}


def _version(name: str, program: str) -> str:
    """The version as the package tells it, or the program itself."""
    for folder in Path(program).absolute().parent.parent.glob("lib/python*/site-packages"):
        for found in folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            return found.name.split("-")[1].removesuffix(".dist")
    option = "-v"
    done = subprocess.run([program, option], capture_output=True, text=True, check=False)
    found_version = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found_version[0] if found_version else "?"
