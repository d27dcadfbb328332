"""What turns amount to, which goals are missed, and that each fault is one."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

import msgspec
import pytest
from click.testing import CliRunner

from roost.cli import main
from roost_loadtest.fault_redis import ALONE, Row
from roost_loadtest.fault_redis_load import Figures, Turn, figures
from roost_loadtest.fault_redis_routers import ColdReport
from roost_loadtest.fault_redis_stages import STAGES, FailedOver, Flushed, Loading, Poisoned, Stage
from roost_loadtest.fault_redis_table import missed_goals, row_lines

FINE = Figures(100, 0, 2.0, 10.0, 0.9)


def turn(first_ms: float, known: int = 0, cached: int = 0, *, is_answered: bool = True) -> Turn:
    return Turn(0.0, first_ms / 1e3, 0, known, cached, (), is_answered)


def row(title: str = "kill", during: Figures = FINE, after: Figures = FINE, **changes) -> Row:
    fields = {"windows": [0.9], "back_s": 30.0, "sharing_s": 1.0} | changes
    return Row(
        title=title, before=FINE, during=during, after=after, store_errors=1, examples=[], **fields
    )


def test_hits_are_of_what_was_there_and_times_of_what_was_answered():
    turns = [turn(1.0), turn(3.0, 100, 50), turn(2.0, 300, 300), turn(0, 100, is_answered=False)]

    assert figures(turns) == Figures(4, 1, 2.0, 3.0, 350 / 400)


def test_nothing_asked_has_no_hit_rate():
    nothing = figures([])

    assert (nothing.requests, nothing.failed) == (0, 0)
    assert math.isnan(nothing.hit)
    assert math.isnan(figures([turn(1.0)]).hit)


def test_goals_are_met_at_their_edges():
    edge = FINE._replace(p99_ms=15.0)

    assert missed_goals([row(), row(during=edge), row(after=edge)]) == []


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (row(during=FINE._replace(failed=1)), "kill: 1 failed requests"),
        (row(during=FINE._replace(p99_ms=15.1)), "kill: p99 grew by 5.1 ms"),
        (row(after=FINE._replace(p99_ms=20.0)), "kill: p99 grew by 10.0 ms"),
        (row(back_s=30.5), "kill: hit rate not back after 30 s"),
        (row(back_s=None), "kill: hit rate not back after 30 s"),
        (row(sharing_s=None), "kill: the routers do not share again"),
    ],
)
def test_a_goal_that_is_missed_is_told(missing, said):
    assert missed_goals([missing]) == [said]
    assert missed_goals([msgspec.structs.replace(missing, title=ALONE)]) == []


def test_a_row_that_never_came_back_is_printed():
    line = row_lines([row(back_s=None, sharing_s=None)], 5.0)[-1]

    assert line.startswith("kill ")
    assert line.endswith("(never, never)")


def test_a_cold_router_is_even_from_the_first_second_that_is():
    report = ColdReport(
        is_sharing=True, start_s=[1.0], cold_hits=[0.5, 0.879, 0.88], peer_hits=[0.9, 0.9, 0.9]
    )

    assert report.even_s == 3.0
    assert msgspec.structs.replace(report, cold_hits=[0.5] * 3).even_s is None


@pytest.mark.parametrize("kind", STAGES)
def test_each_stage_can_be_played(kind: type[Stage]):
    with ExitStack() as stack:
        stage = kind(stack, "6.2", b"roost:{t}:", 0.5)
        stage.strike()
        stage.again()
        stage.heal()
        assert stage.url.startswith("redis")


def test_what_stages_do_is_seen_in_redis():
    with ExitStack() as stack:
        poisoned = Poisoned(stack, "6.2", b"roost:{t}:", 1.0)
        for _ in range(20):
            poisoned.again()
        assert poisoned._server.client.exists(b"roost:{t}:news", b"roost:{t}:leases")
        flushed = Flushed(stack, "6.2", b"roost:{t}:", 1.0)
        flushed._server.client.set("a", 1)
        flushed.again()
        assert not flushed._server.client.exists("a")
        over = FailedOver(stack, "6.2", b"roost:{t}:", 1.0)
        before = over._sentinels.primary()
        over.strike()
        assert over._sentinels.primary() is not before
        while before.role() != "slave":  # sentinels tell it after a while
            time.sleep(0.01)
        loading = Loading(stack, "6.2", b"roost:{t}:", 1.0)
        loading.strike()
        loading.heal()
        assert loading._server.client.exists("other:0")


def test_a_row_that_there_is_not_is_told():
    done = CliRunner().invoke(main, ["bench", "redis-faults", "--fault", "meteor"])

    assert done.exit_code == 1
    assert "no row contains meteor" in done.output
    assert "'black hole'" in done.output
