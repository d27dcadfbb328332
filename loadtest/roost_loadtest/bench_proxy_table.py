"""The table of `roost bench proxy`: medians over rounds, ratios to ours, goals met or not. Pure.

`added` latencies are a router's less those straight to the mock, of the same round.
`>` before a rate: the router had time to spare, load or mocks were the limit.

Not here: measuring (bench_proxy_scenarios.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

OURS, DIRECT = "roost", "direct"

_BUSY = 0.95  # of a core: above it the router itself was the limit

Rounds = Sequence[Mapping[str, float]]  # figures of a router by name, a mapping a round


class _Row(msgspec.Struct, frozen=True):
    label: str
    figure: str
    digits: int = 1
    added: bool = False  # to the figure straight to the mock
    busy: str = ""  # the figure that tells whether the router was the limit
    scale: float = 1.0


_ROWS = [
    *(
        row
        for size in ("small", "8 KB", "64 KB")
        for row in (
            _Row(f"{size}: CPU µs/request", f"{size} cpu_us"),
            _Row(f"{size}: requests/s", f"{size} requests_s", 0, busy=f"{size} busy"),
        )
    ),
    _Row("alone: p50 added µs", "alone p50_us", 0, added=True),
    _Row("alone: p99 added µs", "alone p99_us", 0, added=True),
    _Row("paced: CPU µs/chunk", "paced cpu_us"),
    _Row("paced: delay p50 µs", "paced delay p50_us", 0),
    _Row("paced: delay p99 µs", "paced delay p99_us", 0),
    _Row("paced: first chunk p50 ms", "paced first p50_us", 2, scale=1e-3),
    _Row("paced: first chunk p99 ms", "paced first p99_us", 2, scale=1e-3),
    _Row("burst: CPU µs/chunk", "burst cpu_us"),
    _Row("burst: chunks/s", "burst chunks_s", 0),
    _Row("idle memory MB", "idle_mb"),
    _Row("ready s", "ready_s", 2),
]


class Goal(msgspec.Struct, frozen=True):
    """`figure` of ours is at most `limit`, or at most `limit` times that of `peer`."""

    label: str
    figure: str
    limit: float
    peer: str | None = None
    added: bool = False


class Judged(msgspec.Struct, frozen=True):
    """A goal with what was measured; None if the peer is missing."""

    goal: Goal
    value: float | None

    @property
    def verdict(self) -> str:
        """Met, not met, not measured."""
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.goal.limit else "NOT met"


GOALS = [
    Goal("small request, CPU µs", "small cpu_us", 35.0),
    Goal("small request, CPU", "small cpu_us", 0.40, "sglang-router"),
    Goal("small request, CPU", "small cpu_us", 2.2, "nginx"),
    Goal("8 KB prompt, CPU", "8 KB cpu_us", 0.45, "sglang-router"),
    Goal("64 KB prompt, CPU", "64 KB cpu_us", 0.60, "sglang-router"),
    Goal("paced stream, CPU µs a chunk", "paced cpu_us", 24.0),
    Goal("paced stream, CPU", "paced cpu_us", 1.0, "sglang-router"),
    Goal("alone, p50 added", "alone p50_us", 0.6, "sglang-router", added=True),
    Goal("idle memory, MB", "idle_mb", 45.0),
    Goal("ready, s", "ready_s", 0.5),
]


def judge(measured: Mapping[str, Rounds]) -> list[Judged]:
    """The goals whose figures were measured, from the figures of each router."""
    of_ours = {figure for figures in measured.get(OURS, ()) for figure in figures}
    return [Judged(goal, _value(goal, measured)) for goal in GOALS if goal.figure in of_ours]


def table(measured: Mapping[str, Rounds], versions: Mapping[str, str]) -> list[str]:
    """Lines: a row a figure, a column a router, and what each peer has for one of ours.

    Routers without a figure show "-".
    """
    names = list(measured)
    heads = [f"{name} {versions.get(name, '')}".rstrip() for name in names]
    widths = [max(len(head), 9) for head in heads]
    lines = [" | ".join(["".ljust(26), *(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))])]
    for row in _ROWS:
        cells = [_cell(row, name, measured) for name in names]
        if any(cell != "-" for cell in cells):
            padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(" | ".join([row.label.ljust(26), *padded]))
    return lines


def goal_lines(judged: Sequence[Judged]) -> list[str]:
    """A line a goal."""
    lines = []
    for one in judged:
        goal = one.goal
        unit = f" x {goal.peer}" if goal.peer else ""
        value = "-" if one.value is None else f"{one.value:.2f}"
        limit = f"<= {goal.limit:g}{unit}"
        lines.append(f"{goal.label:<30} {limit:<24} {value:>8}  {one.verdict}")
    return lines


def open_line(figures: Mapping[str, float], asked: int) -> str:
    """What very many streams did to our router."""
    num_open = int(figures["open streams"])
    note = "" if num_open == asked else f" ({asked:,} asked for; the limit of open files is lower)"
    p50_ms, p99_ms = (figures[f"open delay {p}_us"] / 1e3 for p in ("p50", "p99"))
    return (
        f"{num_open:,} open streams on one process{note}: "
        f"{figures['open resident_mb']:.0f} MB resident, "
        f"{figures['open kb_a_stream']:.1f} KB a stream; {figures['open chunks_s']:,.0f} chunks/s, "
        f"{figures['open cpu_us']:.1f} µs CPU a chunk, "
        f"delay p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms"
    )


def _value(goal: Goal, measured: Mapping[str, Rounds]) -> float | None:
    """Of ours, or its ratio to the peer's: of each round, then the median."""
    ours = _of_rounds(goal.figure, OURS, measured, added=goal.added)
    if goal.peer is None:
        return median(ours)
    theirs = _of_rounds(goal.figure, goal.peer, measured, added=goal.added)
    if not theirs:
        return None
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def _cell(row: _Row, name: str, measured: Mapping[str, Rounds]) -> str:
    if name == DIRECT and (row.added or "cpu_us" in row.figure):
        return "-"
    values = _of_rounds(row.figure, name, measured, added=row.added)
    if not values:
        return "-"
    busy = _of_rounds(row.busy, name, measured)
    mark = ">" if name != DIRECT and busy and median(busy) < _BUSY else ""
    return f"{mark}{median(values) * row.scale:,.{row.digits}f}"


def _of_rounds(
    figure: str, name: str, measured: Mapping[str, Rounds], *, added: bool = False
) -> list[float]:
    """The figure of each round in which it was measured."""
    base: Rounds = measured.get(DIRECT, ()) if added else ()
    values = []
    for number, figures in enumerate(measured.get(name, ())):
        if figure in figures:
            below = base[number].get(figure, 0.0) if number < len(base) else 0.0
            values.append(figures[figure] - below)
    return values
