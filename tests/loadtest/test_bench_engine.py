"""`roost bench engine`: what it refuses, its processes, its clients; one tiny run of ours."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import start_engine, until

from roost.cli import main
from roost_loadtest.bench_engine import EngineBenchConfig
from roost_loadtest.canary import Canary
from roost_loadtest.client import StreamError
from roost_loadtest.local_processes import free_port
from roost_loadtest.peers import (
    DriverEngine,
    Launch,
    LlamaCpp,
    PeerError,
    ProcessGroup,
    Sample,
    ServedEngine,
)
from roost_loadtest.percentile import percentile
from roost_loadtest.served_load import ServedWorkload, run_served

HERE = Path(__file__)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"vllm_python": HERE}, "both"),
        ({"vllm_model": HERE}, "both"),
        ({"vllm_preload": (HERE,)}, "preload"),
        ({"gguf": HERE}, "llama.cpp"),
        ({"gguf_bf16": HERE}, "llama.cpp"),
        ({"llama_cpp": HERE}, "GGUF"),
    ],
)
def test_half_a_peer_is_refused(options: dict[str, Path], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EngineBenchConfig(**options)  # type: ignore[arg-type]


def test_the_command_says_what_is_missing() -> None:
    result = CliRunner().invoke(main, ["bench", "engine", "--gguf", str(HERE)])

    assert result.exit_code == 1
    assert "llama.cpp" in result.output


@pytest.mark.parametrize("has_compiler", [True, False])
def test_the_canary_reads_with_and_without_a_compiler(
    has_compiler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler:
        monkeypatch.setenv("PATH", "")

    reading = Canary(tmp_path, 2).read()

    assert reading.gb_s > 0.1
    assert reading.gflop_s > 0.1
    assert (reading.kind == "numpy") is not has_compiler


def test_percentiles_take_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 65)]

    assert (percentile(values, 0.5), percentile(values, 0.95)) == (32.0, 61.0)
    assert percentile([7.0], 0.95) == 7.0


def test_a_paused_group_stands_still_and_a_stopped_one_is_gone(tmp_path: Path) -> None:
    """The child's own child counts as well: vLLM computes in a grandchild."""
    beat = tmp_path / "beat"
    child = f"while true; do echo >>{beat}; sleep 0.01; done"
    group = ProcessGroup("beater", Launch(["sh", "-c", f"({child}) & wait"]), tmp_path / "log")

    until(beat.exists)
    group.pause()
    time.sleep(0.1)
    paused_at = beat.stat().st_size
    time.sleep(0.1)
    assert beat.stat().st_size == paused_at
    with group.running():
        until(lambda: beat.stat().st_size > paused_at)
    group.stop()

    stopped_at = beat.stat().st_size
    time.sleep(0.1)
    assert group.popen.returncode is not None
    assert beat.stat().st_size == stopped_at


def test_a_driver_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    engine = DriverEngine("ours", Launch(command), tmp_path / "log")

    with pytest.raises(PeerError, match="no such model"):
        engine.start()
    engine.stop()


def test_a_server_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    launch = Launch(["sh", "-c", "echo port taken >&2; exit 1"])
    server = ServedEngine("theirs", lambda port: launch, free_port(), tmp_path / "log")

    with pytest.raises(PeerError, match="port taken"):
        server.start()
    server.stop()


def test_llama_cpp_is_read_as_its_tools_write(tmp_path: Path) -> None:
    _write_tool(tmp_path / "llama-bench", '{"avg_ns": 250000000}')
    _write_tool(tmp_path / "llama-batched-bench", '{"t_pp": 9.0, "t_tg": 2.0, "speed_tg": 1.0}')
    engine = LlamaCpp("llama.cpp", tmp_path, HERE, 2)

    engine.start()

    assert engine.prefill(512, seed=1) == Sample(512, 0.25)
    assert engine.decode(4, seed=1) == Sample(4 * 64, 2.0)


def test_a_llama_cpp_tool_that_fails_is_quoted(tmp_path: Path) -> None:
    tool = tmp_path / "llama-bench"
    tool.write_text("#!/bin/sh\necho bad model >&2\nexit 1\n")
    tool.chmod(0o755)

    with pytest.raises(PeerError, match="bad model"):
        LlamaCpp("llama.cpp", tmp_path, HERE, 2).prefill(512, seed=1)


def test_missing_llama_cpp_tools_are_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="llama-bench does not exist"):
        LlamaCpp("llama.cpp", tmp_path, HERE, 2).start()


@pytest.mark.e2e
def test_the_served_workload_runs_on_a_real_replica() -> None:
    workload = ServedWorkload(requests=6, shared_tokens=64, own_tokens=8, new_tokens=5, clients=3)
    engine = start_engine()
    try:
        result = asyncio.run(run_served(engine.url, "SmolLM2-135M-Instruct", workload, 1))
        with pytest.raises(StreamError, match="status 404"):
            asyncio.run(run_served(engine.url, "another", workload, 1))
    finally:
        engine.stop()

    assert 0 < result.ttft_p50_s <= result.ttft_p95_s <= result.seconds


@pytest.mark.e2e
def test_a_tiny_run_of_ours_prints_a_table_and_keeps_its_records(tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    arguments = "bench engine --part offline --rounds 1 --batch 1 --prompt 16 --weights stored"

    result = CliRunner().invoke(main, [*arguments.split(), "--json", str(records)])

    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith(("decode", "prefill"))]
    assert len(lines) == 4  # two workloads, two depths
    assert '"workload": "decode 1"' in records.read_text()


def _write_tool(path: Path, output: str) -> None:
    path.write_text(f"#!/bin/sh\necho loading\necho '{output}'\n")
    path.chmod(0o755)
