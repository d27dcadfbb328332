"""`roost bench proxy`: its load against the mock, its judgement of goals, one short run of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import until

from roost.cli import main
from roost_loadtest import local_processes
from roost_loadtest.bench_proxy import PARTS, ProxyBenchConfig, bench_proxy
from roost_loadtest.bench_proxy_load import (
    LoadError,
    drive_requests,
    drive_streams,
    requests_of,
    stream_request,
)
from roost_loadtest.bench_proxy_routers import start
from roost_loadtest.bench_proxy_table import GOALS, OURS, goal_lines, judge, open_line, table
from roost_loadtest.fault_routers import RouterKind
from roost_loadtest.local_processes import free_port
from roost_loadtest.mock_replica import STAMP
from roost_loadtest.peers import PeerError

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def mock() -> Iterator[int]:
    """The port of a mock replica."""
    port = free_port()
    command = [sys.executable, "-m", "roost_loadtest.mock_replica", str(port)]
    with subprocess.Popen(command) as process:
        until(lambda: listens(port))
        yield port
        process.kill()


def listens(port: int) -> bool:
    return asyncio.run(connects(port))


async def connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.fixture
async def serving() -> AsyncIterator[Callable[[Server], Awaitable[int]]]:
    """Starts a server that a test writes; its port."""
    servers = []

    async def listen(handler: Server) -> int:
        async def until_left(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await handler(reader, writer)
                await reader.read()
            writer.close()

        servers.append(await asyncio.start_server(until_left, "127.0.0.1", 0))
        return servers[-1].sockets[0].getsockname()[1]

    yield listen
    for server in servers:
        server.close()
        await server.wait_closed()
    await asyncio.sleep(0.01)  # the last connections close in the next turns


async def answered(mock: int, request: bytes) -> bytes:
    """What the mock answers, up to the end of its connection's silence."""
    reader, writer = await asyncio.open_connection("127.0.0.1", mock)
    writer.write(request)
    answer = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    return answer


def test_prompts_are_different_share_their_first_half_and_have_the_size() -> None:
    bodies = [json.loads(request.split(b"\r\n\r\n", 1)[1]) for request in requests_of(8192)]
    prompts = [body["messages"][0]["content"] for body in bodies]

    assert len(set(prompts)) == len(prompts) == 64
    assert {len(prompt) for prompt in prompts} == {8192}
    assert len({prompt[:4096] for prompt in prompts}) == 1
    assert len({prompt[4096:4160] for prompt in prompts}) == 64


@pytest.mark.parametrize("gap_us", [0, 500])
async def test_the_mock_streams_as_the_prompt_orders(mock: int, gap_us: int) -> None:
    answer = await answered(mock, stream_request(7, gap_us, 1))

    assert answer.count(STAMP) == 7
    assert answer.count(b'"finish_reason":"stop"') == 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_the_mock_survives_a_greeting_in_http2(mock: int) -> None:
    """sglang-router sends one to each replica when it starts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", mock)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    assert await reader.read() == b""  # closed, not reset
    writer.close()
    assert (await answered(mock, stream_request(1, 0, 1))).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", [200, 64 << 10])
async def test_the_load_counts_what_the_mock_answers(mock: int, size: int) -> None:
    cpu = iter([1.0, 3.5])

    got = await drive_requests(
        mock,
        requests_of(size),
        connections=3,
        warm_s=0.05,
        seconds=0.2,
        read_cpu_s=lambda: next(cpu),
    )

    assert got.requests == len(got.latencies_ns) > 0
    assert got.latencies_ns == sorted(got.latencies_ns)
    assert got.cpu_s == 2.5


async def test_every_chunk_is_counted_however_it_is_cut(
    mock: int, serving: Callable[[Server], Awaitable[int]]
) -> None:
    """A proxy may pass on any pieces: here of 7 bytes, each by itself."""
    answer = await answered(mock, stream_request(9, 0, 1))

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        for at in range(0, len(answer), 7):
            writer.write(answer[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0)

    port = await serving(cut)
    got = await drive_streams(
        port, [stream_request(9, 0, n) for n in range(2)], stagger_s=0, read_cpu_s=lambda: 0.0
    )

    assert got.chunks == 18
    assert all(delay > 0 for delay in got.delays_ns)
    assert len(got.first_ns) == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", "503"),
        (b"", "lost"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "not a 200 with a len"),
    ],
)
async def test_a_wrong_answer_fails_the_load(
    serving: Callable[[Server], Awaitable[int]], answer: bytes, problem: str
) -> None:
    async def answer_so(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(answer)
        if not answer:
            writer.close()

    port = await serving(answer_so)
    with pytest.raises(LoadError, match=problem):
        await drive_requests(
            port,
            requests_of(200),
            connections=2,
            warm_s=5.0,
            seconds=5.0,
            read_cpu_s=lambda: 0.0,
        )


@pytest.mark.parametrize("answer", [b"HTTP/1.1 502 Bad\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nhalf"])
async def test_a_stream_that_fails_or_breaks_off_fails_the_load(
    serving: Callable[[Server], Awaitable[int]], answer: bytes
) -> None:
    async def answer_so(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(answer)
        writer.close()

    port = await serving(answer_so)
    with pytest.raises(LoadError):
        await drive_streams(port, [stream_request(5, 0, 1)], stagger_s=0, read_cpu_s=lambda: 0.0)


def test_cpu_and_memory_are_those_of_the_whole_family() -> None:
    """A child that does nothing, whose own child burns CPU and holds 64 MB."""
    burn = "x = bytearray(b'x') * (1 << 26)\nprint(flush=True)\nwhile True: pass"
    wrap = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen([sys.executable, "-c", wrap], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        members = local_processes.family(process.pid)
        before = local_processes.cpu_s(process.pid)
        until(lambda: local_processes.cpu_s(process.pid) > before + 0.2)
        memory = local_processes.resident_bytes(process.pid)
        for member in reversed(members):
            os.kill(member, 9)

    assert members[0] == process.pid
    assert len(members) == 2
    assert memory > 64 << 20


def test_ratios_are_of_the_same_round_and_latencies_are_added_ones() -> None:
    """The machine is three times slower in round 2: the ratio of both rounds is 0.5."""
    judged = judge(
        {
            "direct": [{"alone p50_us": 20.0}, {"alone p50_us": 60.0}],
            OURS: [
                {"small cpu_us": 30.0, "alone p50_us": 120.0},
                {"small cpu_us": 90.0, "alone p50_us": 360.0},
            ],
            "sglang-router": [
                {"small cpu_us": 60.0, "alone p50_us": 220.0},
                {"small cpu_us": 180.0, "alone p50_us": 660.0},
            ],
        }
    )
    found = {(one.goal.figure, one.goal.peer): (one.value, one.verdict) for one in judged}

    assert found["small cpu_us", None] == (60.0, "NOT met")
    assert found["small cpu_us", "sglang-router"] == (0.5, "NOT met")
    assert found["small cpu_us", "nginx"] == (None, "not measured")
    assert found["alone p50_us", "sglang-router"] == (0.5, "met")
    assert {figure for figure, _ in found} == {"small cpu_us", "alone p50_us"}
    assert sum("NOT met" in line for line in goal_lines(judged)) == 2


@pytest.mark.parametrize(("value", "verdict"), [(35.0, "met"), (35.1, "NOT met")])
def test_a_goal_is_met_at_its_limit(value: float, verdict: str) -> None:
    assert judge({OURS: [{"small cpu_us": value}]})[0].verdict == verdict


def test_the_table_marks_rates_that_the_load_limited() -> None:
    lines = table(
        {
            "direct": [{"small requests_s": 60_000.0, "small busy": 0.0, "small cpu_us": 0.0}],
            OURS: [{"small requests_s": 20_000.0, "small busy": 0.99, "small cpu_us": 49.5}],
            "nginx": [{"small requests_s": 50_000.0, "small busy": 0.9, "small cpu_us": 18.0}],
        },
        {"nginx": "1.22.1"},
    )

    assert [cell.strip() for cell in lines[0].split("|")[1:]] == ["direct", OURS, "nginx 1.22.1"]
    cells = {line.split("|")[0].strip(): line.split("|")[1:] for line in lines[1:]}
    assert [cell.strip() for cell in cells["small: CPU µs/request"]] == ["-", "49.5", "18.0"]
    assert [cell.strip() for cell in cells["small: requests/s"]] == ["60,000", "20,000", ">50,000"]
    assert len(cells) == 2  # no row for what nobody has


def test_fewer_streams_than_asked_for_are_told() -> None:
    figures = dict.fromkeys(
        ("resident_mb", "kb_a_stream", "chunks_s", "cpu_us", "delay p50_us", "delay p99_us"), 1.0
    )
    named = {f"open {name}": value for name, value in figures.items()} | {"open streams": 9980.0}

    assert "10,000 asked for" in open_line(named, 10_000)
    assert "asked" not in open_line(named, 9980)


def test_peers_given_and_left_out_at_once_are_refused() -> None:
    options = ["bench", "proxy", "--alone", "--sglang-router", sys.executable]
    result = CliRunner().invoke(main, options)

    assert result.exit_code == 1
    assert "choose" in result.output


def test_a_router_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    program = tmp_path / "vllm-router"
    program.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
    program.chmod(0o755)
    kind = RouterKind("vllm-router", str(program), "0")

    with pytest.raises(PeerError, match="no such option"):
        start(kind, [free_port()], requests_of(200)[0], None, tmp_path)


@pytest.mark.e2e
def test_a_short_run_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of every part is there, and the file holds what the table shows."""
    path = tmp_path / "cost.json"
    config = ProxyBenchConfig(
        rounds=1, seconds=0.2, connections=4, alone=True, streams=50, json_path=path
    )

    results = bench_proxy(config)

    assert config.parts == PARTS
    ours = results.measured[OURS][0]
    assert all(ours[name] > 0 for name in ours)
    assert {goal.figure for goal in GOALS} <= set(ours)
    assert results.open_streams["open streams"] == 50
    kept = json.loads(path.read_text())
    assert kept["measured"][OURS] == results.measured[OURS]
    assert len(kept["goals"]) == len(GOALS)
    printed = capsys.readouterr().out
    assert "small: CPU µs/request" in printed
    assert "50 open streams" in printed
