"""The replay before engines that compute: what is asked, and one short run of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roost_loadtest.replay.client import Chain
from roost_loadtest.replay.real_engines import RealConfig, Workload, replay_real


def workload(**options: object) -> Workload:
    return Workload(RealConfig(requests=40, documents=5, document_tokens=50, **options), "m")


def prompts(chains: list[Chain]) -> list[str]:
    requests = [ask.make() for chain in chains for ask in chain.asks]
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in requests]
    return [body["messages"][0]["content"] for body in bodies]


def test_all_routers_get_the_same_at_the_same_moments_and_no_cache_of_another():
    one, two = (workload().chains(salt, 0.5) for salt in ("a", "b"))

    assert [chain.starts_s for chain in one] == [chain.starts_s for chain in two]
    firsts, seconds = prompts(one), prompts(two)
    assert [p.replace("of a", "of b") for p in firsts] == seconds
    assert not {p[:60] for p in firsts} & {p[:60] for p in seconds}


def test_documents_are_few_and_questions_never_the_same():
    asked = prompts(workload().chains("a", 0.5))

    assert len(set(asked)) == 40
    assert len({prompt.partition("\n\n")[0] for prompt in asked}) == 5


def test_the_load_counts_each_document_cold_once():
    """5 · 2 s + 35 · 0.2 s of work, on two replicas."""
    assert workload(load=1.0).interval_s(2.0, 0.2) == pytest.approx(17.0 / 40 / 2)
    assert workload(load=0.5).interval_s(2.0, 0.2) == pytest.approx(17.0 / 40)


@pytest.mark.e2e
def test_a_short_run_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real tokens, a real cache: each document but its first time is found there."""
    path = tmp_path / "real.json"
    config = RealConfig(
        requests=8,
        documents=2,
        document_tokens=150,
        output_tokens=2,
        load=0.3,
        routers=("roost",),
        json_path=path,
    )

    results = replay_real(config)

    (found,) = results.measured["roost"]
    assert (found.requests, found.failed, found.truncated) == (8, 0, 0)
    assert found.cached > 0.3
    assert found.balance >= 1.0
    assert results.cold_s > 0.0
    assert json.loads(path.read_text())["measured"]["roost"][0]["requests"] == 8
    assert "2 replicas of roost, 8 requests" in capsys.readouterr().out
