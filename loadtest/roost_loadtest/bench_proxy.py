"""Benchmark: CPU that a proxy spends on a request, ours beside nginx where it is installed.

Proxy on one core, load and mock replicas on the other (Linux; without pinning elsewhere). What
is counted is the proxy's own CPU time, from the operating system's clock of its processes, not
wall time: it does not depend on how fast the mocks are. Ours runs with its KV policy, metrics
and limits on; nginx balances round robin over kept connections. Rounds are interleaved, so a
drift of the machine meets both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median

import msgspec
import uvloop

from roost_loadtest.mock_replica import MODEL

_SIZES = {"small": 200, "8 KB": 8 << 10, "64 KB": 64 << 10}
_NUM_BODIES = 64  # distinct prompts that share their first half

_NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  client_body_buffer_size 1m;
  upstream replicas {{ {servers} keepalive 64; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 1000000;
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""


def bench_proxy(*, rounds: int, seconds: float, connections: int) -> None:
    """Print µs of CPU a request for each proxy and body size, medians over `rounds`."""
    load_core, proxy_core = _cores()
    with contextlib.ExitStack() as stack:
        replicas = [free_port(), free_port()]
        for port in replicas:
            mock = [sys.executable, "-m", "roost_loadtest.mock_replica", str(port)]
            stack.enter_context(_running(mock, load_core, port))
        proxies = {"roost": _start_roost(stack, replicas, proxy_core)}
        if shutil.which("nginx"):
            proxies["nginx"] = _start_nginx(stack, replicas, proxy_core)
        if load_core is not None:
            os.sched_setaffinity(0, {load_core})
        measured: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for (size, num_bytes), (name, (port, pid)) in product(_SIZES.items(), proxies.items()):
                result = uvloop.run(_measure(port, pid, num_bytes, seconds, connections))
                measured.setdefault((name, size), []).append(result)
        _print_table(proxies, measured, connections)


def _print_table(
    proxies: dict[str, tuple[int, int]],
    measured: dict[tuple[str, str], list[tuple[float, float]]],
    connections: int,
) -> None:
    print(f"{connections} connections, 2 mock replicas, medians")
    print(f"{'body':>6} " + "".join(f"{n:>9} µs {'req/s':>8}" for n in proxies) + "   ratio")
    for size in _SIZES:
        cells, costs = "", []
        for name in proxies:
            cost, rate = (median(column) for column in zip(*measured[name, size], strict=True))
            costs.append(cost)
            cells += f"{cost:>9.1f} µs {rate:>8.0f}"
        ratio = f"{costs[0] / costs[1]:>8.2f}" if len(costs) > 1 else f"{'-':>8}"
        print(f"{size:>6} {cells}{ratio}")


async def _measure(
    port: int, pid: int, size: int, seconds: float, connections: int
) -> tuple[float, float]:
    """(µs of the proxy's CPU a request, requests a second) over `seconds`."""
    bodies = [_request(size, number) for number in range(_NUM_BODIES)]
    await _drive(port, bodies, 0.3, connections)  # connections are made, prompts are known
    before, started = cpu_s(pid), time.perf_counter()
    count = await _drive(port, bodies, seconds, connections)
    elapsed = time.perf_counter() - started
    return (cpu_s(pid) - before) / count * 1e6, count / elapsed


async def _drive(port: int, bodies: list[bytes], seconds: float, connections: int) -> int:
    deadline, counts = time.perf_counter() + seconds, [0] * connections

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        position = number
        while time.perf_counter() < deadline:
            writer.write(bodies[position % len(bodies)])
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the proxy answered {head!r}")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            counts[number] += 1
            position += connections + 1
        writer.close()

    await asyncio.gather(*(client(number) for number in range(connections)))
    return sum(counts)


def _request(size: int, number: int) -> bytes:
    text = ("shared " * size)[: size // 2] + (f"{number} own " * size)[: size // 2]
    messages = [{"role": "user", "content": text}]
    body = msgspec.json.encode({"model": MODEL, "messages": messages})
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    )
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def _start_roost(
    stack: contextlib.ExitStack, replicas: list[int], core: int | None
) -> tuple[int, int]:
    port, admin_port = free_port(), free_port()
    command = [sys.executable, "-m", "roost", "route", "--port", str(port)]
    command += ["--admin-port", str(admin_port)]
    for replica in replicas:
        command += ["--replica", f"http://127.0.0.1:{replica}"]
    process = stack.enter_context(_running(command, core, port))
    time.sleep(1.0)  # until it has polled its replicas
    return port, process.pid


def _start_nginx(
    stack: contextlib.ExitStack, replicas: list[int], core: int | None
) -> tuple[int, int]:
    port = free_port()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    servers = " ".join(f"server 127.0.0.1:{replica};" for replica in replicas)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(dir=folder, servers=servers, port=port))
    command = ["nginx", "-c", str(config), "-e", str(folder / "error.log")]
    process = stack.enter_context(_running(command, core, port))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return port, int(workers[0])


@contextlib.contextmanager
def _running(command: list[str], core: int | None, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one core, once it listens; ended with the context."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
            _until_listening(port, process)
            yield process
        finally:
            process.terminate()


def _until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")


def _cores() -> tuple[int | None, int | None]:
    """One core for load and mocks, one for the proxy; None where that cannot be had."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return None, None
    first, second = sorted(os.sched_getaffinity(0))[:2]
    return first, second


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
