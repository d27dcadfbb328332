"""`roost bench replay` as a whole: ours before mocks, played as the simulator plays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roost_loadtest.fleet_sim.trace import read_trace
from roost_loadtest.replay.run import ReplayConfig, replay


def write_trace(path: Path, num_requests: int) -> Path:
    """Four prompts of eight blocks, asked again and again, 50 ms apart."""
    lines = [
        {
            "t": 50 * number,
            "in": 1024,
            "out": 4,
            "hash_ids": [100 * (number % 4) + block for block in range(8)],
            "block": 128,
        }
        for number in range(num_requests)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.e2e
def test_a_short_replay_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt has one home with the policy, and every replica as its home without."""
    path = tmp_path / "replay.json"
    config = ReplayConfig(
        num_replicas=4,
        rounds=2,
        speed_up=2.0,
        load=0.5,
        routers=("roost", "roost:round-robin", "smg"),
        json_path=path,
    )

    results = replay([write_trace(tmp_path / "four.jsonl", 60)], config)

    rows = results.measured["four"]
    assert list(rows) == ["roost", "roost:round-robin"]
    assert [len(rounds) for rounds in rows.values()] == [2, 2]
    for found in (*rows["roost"], *rows["roost:round-robin"]):
        assert (found.requests, found.failed, found.truncated) == (60, 0, 0)
        assert found.router_cpu_ms > 0
        assert found.balance >= 1.0
        assert 0.0 < found.ttft_p50_s <= found.ttft_p90_s <= found.ttft_p99_s
    # All but the first of each prompt, and all but its last token.
    assert rows["roost"][0].cached == pytest.approx(56 / 60 * 1023 / 1024, abs=0.1)
    assert json.loads(path.read_text())["measured"]["four"]["roost"][1]["requests"] == 60
    printed = capsys.readouterr()
    assert "four: 60 requests, load 0.5, 4 mock replicas" in printed.out
    assert "smg is left out" in printed.err


def test_the_trace_of_this_test_has_four_prompts(tmp_path: Path):
    trace = read_trace(write_trace(tmp_path / "four.jsonl", 60))

    assert len({request.block_ids for request in trace.requests}) == 4
