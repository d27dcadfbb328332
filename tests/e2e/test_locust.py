"""The locust file, headless, through a real router to mock engines."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import Process, ready_replicas, until

from roost_loadtest.local_processes import free_port
from roost_loadtest.replay.mock_engines import MockConfig
from roost_loadtest.replay.run import start_mocks

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs the extra [loadtest]"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router before two mock engines that are faster than any user."""
    with ExitStack() as stack:
        mocks = start_mocks(stack, MockConfig(speed_up=100.0), 2, tmp_path_factory.mktemp("m"))
        replicas = [
            part for port in mocks.ports for part in ("--replica", f"http://127.0.0.1:{port}")
        ]
        router = Process("route", "--port", "0", "--admin-port", "0", *replicas)
        found = router.until_line(r"routing on (http://\S+), admin on (http://\S+)")
        until(lambda: ready_replicas(found[2]) == 2)
        yield found[1]
        router.stop()


def locust(url: str, folder: Path, *options: str) -> tuple[int, dict[tuple[str, str], dict]]:
    """Run it; its exit code and the rows of its table."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url]
    command += ["--csv", str(folder / "run"), "--only-summary", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    with (folder / "run_stats.csv").open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, rows


def test_users_of_all_kinds_are_served_and_counted(url: str, tmp_path: Path):
    code, rows = locust(url, tmp_path, "-t", "3s", "-u", "6", "-r", "100", "--max-tokens", "4")

    assert code == 0
    for kind in ("chat", "agent", "rag"):
        asked = int(rows["POST", kind]["Request Count"])
        assert asked > 0
        assert [int(rows[row, kind]["Request Count"]) for row in ("ttft", "itl", "slo")] == [
            asked,
            asked,
            asked,
        ]
    assert float(rows["cached", "agent"]["Average Response Time"]) > 50  # percent
    assert ("cut", "chat") not in rows


def test_a_trace_is_played_by_its_clock(url: str, tmp_path: Path):
    """Twenty requests in 1.9 s, played in half of it; all miss a TTFT of nothing."""
    lines = [
        json.dumps({"t": 100 * n, "in": 256, "out": 4, "hash_ids": [1, 2], "block": 128})
        for n in range(20)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))

    options = ["-t", "3s", "-u", "8", "-r", "100", "--speed-up", "2", "--ttft-slo", "0"]
    code, rows = locust(url, tmp_path, "--trace", str(trace), *options)

    assert code == 0
    assert {name for _, name in rows} == {"trace", "/v1/models", "Aggregated"}
    assert rows["POST", "trace"]["Request Count"] == "20"
    assert rows["slo", "trace"]["Failure Count"] == "20"
    assert rows["late", "trace"]["Request Count"] == "20"


def test_nobody_there_is_a_failure(tmp_path: Path):
    code, _ = locust(
        f"http://127.0.0.1:{free_port()}", tmp_path, "-t", "1s", "--model", "m", "RagUser"
    )

    assert code == 1
