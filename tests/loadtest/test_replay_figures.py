"""What a replay comes to: figures by hand, doubts at their bounds, medians without them."""

from __future__ import annotations

import msgspec
import pytest

from roost_loadtest.replay.answer import Usage
from roost_loadtest.replay.client import Outcome
from roost_loadtest.replay.figures import (
    MAX_BUSY,
    MAX_LATE_S,
    Figures,
    NoAnswerError,
    Spent,
    figures,
    table,
)

SPENT = Spent(wall_s=10.0, router_cpu_s=1.0, engines_cpu_s=2.0, client_cpu_s=1.0, num_cores=2)


def answered(due_s: float, ttft_s: float, cached: int = 0, late_s: float = 0.0) -> Outcome:
    return Outcome(
        due_s=due_s,
        sent_s=due_s + late_s,
        first_s=due_s + ttft_s,
        ended_s=due_s + ttft_s + 1.0,
        status=200,
        usage=Usage(prompt=100, cached=cached, output=5),
    )


FAILED = Outcome(due_s=0.0, sent_s=0.0, ended_s=9.0, status=503, error="status 503")
CUT = Outcome(due_s=0.0, sent_s=0.0, ended_s=9.0, status=200, error="was lost")


def test_figures_are_of_whole_answers_and_of_the_simulations_seconds():
    outcomes = [answered(n, 0.1 * (n + 1), cached=10 * n) for n in range(10)]

    got = figures([*outcomes, FAILED, CUT, CUT], SPENT, speed_up=4.0, computed_tokens=[300, 100])

    assert (got.requests, got.failed, got.truncated) == (13, 1, 2)
    assert got.ttft_mean_s == pytest.approx(4 * 0.55)
    assert got.ttft_p50_s == pytest.approx(4 * 0.5)
    assert got.ttft_p90_s == pytest.approx(4 * 0.9)
    assert got.ttft_p99_s == pytest.approx(4 * 1.0)
    assert got.e2e_mean_s == pytest.approx(4 * 1.55)
    assert got.cached == pytest.approx(0.45)
    assert got.balance == pytest.approx(1.5)
    assert got.router_cpu_ms == pytest.approx(1000 / 13)
    assert got.busy == pytest.approx(0.2)
    assert got.doubts == []


def test_a_run_without_an_answer_has_no_figures():
    with pytest.raises(NoAnswerError, match="none of 2 requests was answered: status 503"):
        figures([FAILED, CUT], SPENT)


@pytest.mark.parametrize(
    ("late_s", "ttft_s", "doubted"),
    [
        (MAX_LATE_S, 0.1, False),
        (MAX_LATE_S * 1.01, 0.1, True),
        (0.05, 1.0, False),  # 5 % of the mean
        (0.051, 1.0, True),
    ],
)
def test_a_client_that_is_late_makes_a_run_doubtful(late_s, ttft_s, doubted):
    got = figures([answered(0.0, ttft_s, late_s=late_s)], SPENT)

    assert bool(got.doubts) is doubted
    assert all("client" in doubt for doubt in got.doubts)


@pytest.mark.parametrize(("late_s", "doubted"), [(MAX_LATE_S, False), (0.0101, True)])
def test_so_do_engines_that_wake_late(late_s, doubted):
    got = figures([answered(0.0, 0.1)], SPENT, engines_late_s=late_s)

    assert bool(got.doubts) is doubted


def test_so_does_a_busy_machine_unless_engines_compute():
    at_bound = msgspec.structs.replace(SPENT, engines_cpu_s=MAX_BUSY * 20 - 2.0)
    beyond = msgspec.structs.replace(SPENT, engines_cpu_s=MAX_BUSY * 20 - 1.9)

    assert figures([answered(0.0, 0.1)], at_bound).doubts == []
    assert "busy" in figures([answered(0.0, 0.1)], beyond).doubts[0]
    assert figures([answered(0.0, 0.1)], beyond, engines_compute=True).doubts == []


def row(ttft_s: float, doubts: tuple[str, ...] = (), failed: int = 0) -> Figures:
    found = figures([answered(0.0, ttft_s)], SPENT)
    return msgspec.structs.replace(found, doubts=list(doubts), failed=failed)


def cells(lines: list[str], name: str) -> list[str]:
    return next(line for line in lines if line.startswith(name)).removeprefix(name).split()


def test_medians_and_ratios_are_of_rounds_without_doubts():
    lines = table(
        {
            "roost": [row(0.1), row(0.3), row(9.0, ("the client was late",))],
            "peer": [row(0.2), row(0.3), row(1.0)],
        },
        "roost",
    )

    place = lines[0].split()[1:].index("ttft")
    assert [cells(lines, name)[place] for name in ("roost", "peer")] == ["0.200", "0.300"]
    assert cells(lines, "peer")[-3:] == ["1.50", "1.50", "3/3"]
    assert lines[-1] == "(!) roost, round 3: the client was late"


def test_a_router_of_which_all_is_in_doubt_is_marked_and_gets_no_ratio():
    lines = table({"roost": [row(0.1)], "peer": [row(0.2, ("busy",), failed=1)]}, "roost")

    assert cells(lines, "peer (!)")[-3:] == ["-", "-", "0/1"]
