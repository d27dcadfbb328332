"""Faults of Redis and of routers as lines for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from roost_loadtest.fault_redis import ALONE, UNSHARED, Row
from roost_loadtest.fault_redis_load import Figures
from roost_loadtest.fault_redis_routers import ColdReport, KillsReport
from roost_loadtest.fault_redis_stages import Stage

GOAL_ADDED_MS = 5.0
GOAL_BACK_S = 30.0
GOAL_COLD_S = 1.0
_CONTROLS = {ALONE, UNSHARED, Stage.title}
_HEAD = (
    f"{'fault':<24} {'asked':>6} {'failed':>6}  {'TTFT p50/p99 ms: before':>23} {'during':>11} "
    f"{'after':>11} {'added':>6}  {'hit before':>10} {'during':>6}  "
    "after, by window (back, sharing)"
)


def row_lines(rows: Iterable[Row], window_s: float) -> list[str]:
    """One line for each, and those of failures."""
    lines = [f"hit rates after the fault: windows of {window_s:g} s, until it is back", _HEAD]
    for row in rows:
        asked = row.before.requests + row.during.requests + row.after.requests
        windows = " ".join(f"{hit:.1%}" for hit in row.windows)
        back = "never" if row.back_s is None else f"<= {row.back_s:.0f} s"
        sharing = "never" if row.sharing_s is None else f"{row.sharing_s:.1f} s"
        lines.append(
            f"{row.title:<24} {asked:>6} {row.failed:>6}  {_times(row.before):>23} "
            f"{_times(row.during):>11} {_times(row.after):>11} {row.added_p99_ms:>+6.1f}  "
            f"{row.before.hit:>10.1%} {row.during.hit:>6.1%}  {windows} ({back}, {sharing})"
        )
        lines += [f"  {example}" for example in row.examples]
    return lines


def missed_goals(rows: Iterable[Row]) -> list[str]:
    """What a fault's row does not reach. Controls have no goals."""
    missed = []
    for row in rows:
        if row.title in _CONTROLS:
            continue
        if row.failed:
            missed.append(f"{row.title}: {row.failed} failed requests")
        if row.added_p99_ms > GOAL_ADDED_MS:
            missed.append(f"{row.title}: p99 grew by {row.added_p99_ms:.1f} ms")
        if row.back_s is None or row.back_s > GOAL_BACK_S:
            missed.append(f"{row.title}: hit rate not back after {GOAL_BACK_S:.0f} s")
        if row.sharing_s is None:
            missed.append(f"{row.title}: the routers do not share again")
    return missed


def kill_lines(report: KillsReport) -> list[str]:
    """What SIGKILLs of routers did."""
    both = report.all
    told = (
        f"{report.kills} SIGKILLs of one of two routers: {both.requests} requests",
        f"{report.in_flight} in flight in the dead one and asked again",
        f"{report.refused} refused by the dead one",
        f"{len(report.lost_elsewhere)} lost through the other",
        f"{both.failed} never answered; TTFT {_times(both)} ms, hit {both.hit:.1%}",
    )
    return [", ".join(told), *(f"  {how}" for how in report.lost_elsewhere[:3])]


def cold_lines(report: ColdReport) -> list[str]:
    """What became of routers that were started cold."""
    took = sorted(report.start_s)
    even = "never" if report.even_s is None else f"<= {report.even_s:.0f} s"
    told = (
        f"{len(took)} cold starts {'with' if report.is_sharing else 'without'} Redis",
        f"ready after {took[0]:.2f} to {took[-1]:.2f} s",
        f"hit rate second by second {_shares(report.cold_hits)}",
        f"of its peers {_shares(report.peer_hits)}: even {even}",
    )
    return [", ".join(told)]


def _times(one: Figures) -> str:
    return f"{one.p50_ms:.1f}/{one.p99_ms:.1f}"


def _shares(hits: list[float]) -> str:
    return " ".join(f"{hit:.1%}" for hit in hits)
