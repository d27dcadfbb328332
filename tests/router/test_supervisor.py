"""Several processes behind one port, over real processes: nobody notices when they change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from fake_replica import FakeReplica
from processes import Process

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
StartWorkers = Callable[..., Awaitable["Workers"]]

pytestmark = pytest.mark.e2e


class Workers:
    """A supervisor, ready."""

    def __init__(self, process: Process, url: str, admins: list[str]) -> None:
        self.process = process
        self.pid = process.popen.pid
        self.url = url
        self.admins = admins

    @property
    def pids(self) -> list[int]:
        """Processes of its workers, the oldest first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    async def replace(self) -> None:
        """A rolling restart, until no old worker is left."""
        old = set(self.pids)
        self.process.popen.send_signal(signal.SIGHUP)
        await until(lambda: len(self.pids) == len(old) and not old & set(self.pids))


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for number in range(1, count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
            return first


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def start() -> AsyncIterator[StartWorkers]:
    """Start a supervisor over replicas; ready when all its workers are."""
    running: list[Workers] = []

    async def start_workers(*fakes: FakeReplica, processes: int = 2, options: str = "") -> Workers:
        admin_port = free_ports(processes)
        arguments = ["route", "--port", "0", "--admin-port", str(admin_port)]
        arguments += ["--processes", str(processes), *options.split()]
        for fake in fakes:
            arguments += ["--replica", fake.url]
        process = Process(*arguments)
        found = await asyncio.to_thread(process.until_line, r"workers are ready on (http://\S+),")
        admins = [f"http://127.0.0.1:{admin_port + number}" for number in range(processes)]
        workers = Workers(process, found[1], admins)
        running.append(workers)
        return workers

    yield start_workers
    for workers in running:
        was_running = workers.process.popen.poll() is None
        assert await asyncio.to_thread(workers.process.stop) == 0 or not was_running


async def ask(session: aiohttp.ClientSession, url: str, **fields: object) -> str:
    """One completion: "ok", or what went wrong."""
    try:
        async with session.post(f"{url}/v1/chat/completions", json={**BODY, **fields}) as answer:
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return repr(error)
    if answer.status != 200:
        return f"{answer.status} {text}"
    is_whole = "[DONE]" in text if fields.get("stream") else "one two three" in text
    return "ok" if is_whole else f"not whole: {text}"


async def ask_until(is_over: asyncio.Event, url: str, seen: Counter[str], *, keep: bool) -> None:
    """One client that asks without a pause, half of the time for streams."""
    connector = aiohttp.TCPConnector(limit=1, force_close=not keep)
    async with aiohttp.ClientSession(connector=connector) as session:
        while not is_over.is_set():
            seen[await ask(session, url, stream=bool(seen["ok"] % 2))] += 1


async def counted(admin: str) -> float:
    """Requests that a worker has served."""
    async with aiohttp.ClientSession() as session, session.get(f"{admin}/metrics") as answer:
        page = await answer.text()
    found = re.findall(r"^roost_router_requests_total\{.*\} (\S+)$", page, re.MULTILINE)
    return sum(map(float, found))


async def test_workers_share_the_load_and_each_has_an_admin_port(start, replicas):
    workers = await start(*replicas)
    connector = aiohttp.TCPConnector(force_close=True)

    async with aiohttp.ClientSession(connector=connector) as session:
        answers = await asyncio.gather(*(ask(session, workers.url) for _ in range(60)))
    shares = [await counted(admin) for admin in workers.admins]

    assert answers == ["ok"] * 60
    assert sum(shares) == 60
    assert min(shares) > 0


async def test_a_killed_worker_is_replaced_and_nobody_is_refused(start, replicas):
    workers = await start(*replicas)
    victim, other = workers.pids
    os.kill(victim, signal.SIGKILL)
    await until(lambda: not is_alive(victim))  # what it had accepted is lost, and no more than that

    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        answers = await asyncio.gather(*(ask(session, workers.url) for _ in range(40)))

    assert answers == ["ok"] * 40
    await until(lambda: len(workers.pids) == 2)
    assert other in workers.pids


async def test_a_rolling_restart_under_load_loses_nothing(start, replicas):
    workers = await start(*replicas)
    first, seen, is_over = set(workers.pids), Counter[str](), asyncio.Event()
    clients = [
        asyncio.create_task(ask_until(is_over, workers.url, seen, keep=number < 4))
        for number in range(8)
    ]

    for _ in range(2):
        await workers.replace()
    is_over.set()
    await asyncio.gather(*clients)

    assert not first & set(workers.pids)
    assert set(seen) == {"ok"}


async def test_streams_in_flight_finish_on_the_old_worker(start, replicas):
    workers = await start(*replicas, processes=1)
    for replica in replicas:
        replica.fault = "hang"
    async with aiohttp.ClientSession() as session:
        answer = await session.post(
            f"{workers.url}/v1/chat/completions", json={**BODY, "stream": True}
        )
        text = await answer.content.readuntil(b" two")
        old = workers.pids
        workers.process.popen.send_signal(signal.SIGHUP)
        await until(lambda: len(workers.pids) == 2)

        async with session.get(f"{workers.url}/v1/models") as models:  # the new one serves
            assert models.status == 200
        assert old[0] in workers.pids
        for replica in replicas:
            replica.gate.set()
        text += await answer.content.read()

    assert b"[DONE]" in text
    await until(lambda: old[0] not in workers.pids)


async def test_a_worker_that_cannot_start_leaves_the_old_ones_in_place(start, replicas, tmp_path):
    keys = tmp_path / "key"
    keys.write_text("a-key")
    workers = await start(*replicas, options=f"--replica-key-file {keys}")
    old = workers.pids
    keys.write_text("two lines\nof text")

    workers.process.popen.send_signal(signal.SIGHUP)
    await asyncio.to_thread(workers.process.until_line, "the workers stay what they were")

    async with aiohttp.ClientSession() as session:
        assert await ask(session, workers.url) == "ok"
    await until(lambda: workers.pids == old)
    keys.write_text("another-key")
    await workers.replace()
    async with aiohttp.ClientSession() as session:
        assert await ask(session, workers.url) == "ok"
    seen = replicas[0].headers + replicas[1].headers
    assert {head["authorization"] for head in seen} == {"Bearer a-key", "Bearer another-key"}


async def test_workers_that_cannot_start_at_first_end_the_supervisor(replicas, tmp_path):
    keys = tmp_path / "key"
    keys.write_text("two lines\nof text")
    process = Process(
        *("route", "--port", "0", "--admin-port", "0", "--processes", "2"),
        *("--replica", replicas[0].url, "--replica-key-file", str(keys)),
    )

    output, _ = await asyncio.to_thread(process.popen.communicate, timeout=60)

    assert process.popen.returncode == 1
    assert "one line of visible ASCII" in output
    assert "ended before it was ready" in output


async def test_stopping_says_not_ready_until_the_end_and_then_refuses(start, replicas):
    workers = await start(*replicas)
    replicas[0].fault = replicas[1].fault = "hang"
    async with aiohttp.ClientSession() as session:
        answer = await session.post(
            f"{workers.url}/v1/chat/completions", json={**BODY, "stream": True}
        )
        workers.process.popen.terminate()

        async def is_refused() -> bool:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as other, other.get(f"{workers.url}/v1/models"):
                    return False
            return True

        async with asyncio.timeout(30):
            while not await is_refused():
                await asyncio.sleep(0.01)
        statuses = set()
        for admin in workers.admins:
            with contextlib.suppress(aiohttp.ClientConnectorError):  # the idle one has left
                async with session.get(f"{admin}/ready") as ready:
                    statuses.add(ready.status)
        for replica in replicas:
            replica.gate.set()
        text = await answer.text()

    assert statuses == {503}
    assert "[DONE]" in text
    assert await asyncio.to_thread(workers.process.popen.wait, 60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_no_process_is_left_behind(start, replicas, number):
    workers = await start(*replicas)
    pids = workers.pids

    workers.process.popen.send_signal(number)
    code = await asyncio.to_thread(workers.process.popen.wait, 60)

    await until(lambda: not any(map(is_alive, pids)))
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)


async def test_a_socket_that_systemd_opened_is_taken_over(replicas):
    """sd_listen_fds(3): descriptor 3, and our process id in LISTEN_PID."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, admin_port = listening.getsockname()[1], free_ports(1)
        become = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listening.fileno()}'
        route = [sys.executable, "-m", "roost", "route", "--admin-port", str(admin_port)]
        route += ["--replica", replicas[0].url, "--processes", "1"]
        router = subprocess.Popen(  # noqa: ASYNC220
            ["bash", "-c", become, "bash", *route],
            pass_fds=(listening.fileno(),),
            stderr=subprocess.DEVNULL,
        )
        async with aiohttp.ClientSession() as session:
            answer = await ask(session, f"http://127.0.0.1:{port}")  # waits in the queue
    router.terminate()

    assert answer == "ok"
    assert await asyncio.to_thread(router.wait, 60) == 0
