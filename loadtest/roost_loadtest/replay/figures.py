"""What a replay comes to: figures of a run, medians of runs, tables. Pure.

Seconds are those of the simulation (the wall's times the speed-up), so that tables compare with
those of `roost sim`. A request's time counts from when it was due. Requests that failed or were cut
are counted and are in no other figure: a router that fails its slowest ones must not look quick,
so look at both.

A run is in doubt, and is left out of medians, where

    the client    sent later than MAX_LATE_S of the wall, and than MAX_LATE_SHARE of the mean time
                  to the first token, in 1 of 100 cases
    the engines   woke so late, if they are mocks
    the machine   was busy: router, mocks and client together over MAX_BUSY of its cores
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from roost_loadtest.percentile import percentile

if TYPE_CHECKING:
    from roost_loadtest.replay.client import Outcome

MAX_LATE_S = 0.01
MAX_LATE_SHARE = 0.05
MAX_BUSY = 0.7


class NoAnswerError(Exception):
    """A run without a single whole answer; the message quotes the first error."""


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took, in seconds of the wall and of CPU."""

    wall_s: float
    router_cpu_s: float
    engines_cpu_s: float
    client_cpu_s: float
    num_cores: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One router on one trace, once. Times in seconds of the simulation, shares from 0 to 1."""

    requests: int
    failed: int  # no answer, or an error
    truncated: int  # an answer that was cut
    cached: float  # of all prompt tokens
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    balance: float  # prompt tokens computed: the replica with the most, by the mean; 0: unknown
    router_cpu_ms: float  # a request
    busy: float  # of all cores: router, engines and client
    client_late_s: float  # p99, of the wall
    engines_late_s: float  # p99, of the wall
    doubts: list[str]  # why this run says nothing; empty: it counts


def figures(
    outcomes: Sequence[Outcome],
    spent: Spent,
    *,
    speed_up: float = 1.0,
    computed_tokens: Sequence[int] = (),
    engines_late_s: float = 0.0,
    engines_compute: bool = False,
) -> Figures:
    """The figures of a run. O(requests · log). NoAnswerError if no request was answered.

    `computed_tokens`: of prompts, by replica; none: engines do not tell. `engines_late_s`: p99, of
    the wall. `engines_compute`: they may take the whole machine, that is their work.
    """
    whole = [outcome for outcome in outcomes if not outcome.error]
    if not whole:
        first = _first_error(outcomes)
        raise NoAnswerError(f"none of {len(outcomes)} requests was answered: {first}")
    ttfts = sorted((outcome.first_s - outcome.due_s) * speed_up for outcome in whole)
    late = sorted(outcome.sent_s - outcome.due_s for outcome in outcomes)
    truncated = sum(outcome.truncated for outcome in outcomes)
    cpu_s = spent.router_cpu_s + spent.engines_cpu_s + spent.client_cpu_s
    found = Figures(
        requests=len(outcomes),
        failed=len(outcomes) - len(whole) - truncated,
        truncated=truncated,
        cached=sum(o.usage.cached for o in whole) / max(1, sum(o.usage.prompt for o in whole)),
        ttft_mean_s=sum(ttfts) / len(ttfts),
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p90_s=percentile(ttfts, 0.9),
        ttft_p99_s=percentile(ttfts, 0.99),
        e2e_mean_s=sum(o.ended_s - o.due_s for o in whole) * speed_up / len(whole),
        balance=_balance(computed_tokens),
        router_cpu_ms=spent.router_cpu_s * 1e3 / len(outcomes),
        busy=cpu_s / spent.wall_s / spent.num_cores,
        client_late_s=percentile(late, 0.99),
        engines_late_s=engines_late_s,
        doubts=[],
    )
    return msgspec.structs.replace(
        found, doubts=_doubts(found, speed_up, may_be_busy=engines_compute)
    )


def _doubts(found: Figures, speed_up: float, *, may_be_busy: bool) -> list[str]:
    bound_s = max(MAX_LATE_S, MAX_LATE_SHARE * found.ttft_mean_s / speed_up)
    reasons = []
    if found.client_late_s > bound_s:
        reasons.append(f"the client was {found.client_late_s * 1e3:.0f} ms late")
    if found.engines_late_s > bound_s:
        reasons.append(f"the engines were {found.engines_late_s * 1e3:.0f} ms late")
    if found.busy > MAX_BUSY and not may_be_busy:
        reasons.append(f"the machine was {found.busy:.0%} busy")
    return reasons


def _balance(computed: Sequence[int]) -> float:
    return max(computed) * len(computed) / sum(computed) if any(computed) else 0.0


def _first_error(outcomes: Sequence[Outcome]) -> str:
    return next((outcome.error for outcome in outcomes if outcome.error), "there were none")


_COLUMNS = (
    ("cached", "cached", "{:.1%}"),
    ("ttft_mean_s", "ttft", "{:.3f}"),
    ("ttft_p50_s", "p50", "{:.3f}"),
    ("ttft_p90_s", "p90", "{:.3f}"),
    ("ttft_p99_s", "p99", "{:.3f}"),
    ("e2e_mean_s", "e2e", "{:.2f}"),
    ("balance", "balance", "{:.2f}"),
    ("router_cpu_ms", "CPU ms", "{:.2f}"),
    ("busy", "busy", "{:.0%}"),
)
_NAME_WIDTH = 30
_WIDTH = 8


def table(rounds: dict[str, list[Figures]], ours: str) -> list[str]:
    """A line for each router: medians of the rounds without doubts, ratios to `ours`.

    Failed and cut requests are those of all rounds. A router whose rounds are all in doubt is
    shown with a mark and gets no ratio.
    """
    names = [title for _, title, _ in _COLUMNS] + ["mean/", "p90/", "ok"]
    lines = [f"{'router':<{_NAME_WIDTH}}" + "".join(f"{name:>{_WIDTH}}" for name in names)]
    base = rounds.get(ours, [])
    for name, found in rounds.items():
        cells = [shape.format(medians(found, figure)) for figure, _, shape in _COLUMNS]
        cells += [_ratio(found, base, figure) for figure in ("ttft_mean_s", "ttft_p90_s")]
        num_requests = sum(one.requests for one in found)
        num_bad = sum(one.failed + one.truncated for one in found)
        cells.append(f"{num_requests - num_bad}/{num_requests}")
        label = name if _certain(found) else f"{name} (!)"
        line = f"{label:<{_NAME_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells[:-1])
        lines.append(f"{line}  {cells[-1]}")
    lines += [
        f"(!) {name}, round {number + 1}: {'; '.join(one.doubts)}"
        for name, found in rounds.items()
        for number, one in enumerate(found)
        if one.doubts
    ]
    return lines


def medians(found: Sequence[Figures], figure: str) -> float:
    """The median of the rounds without doubts; of all where there is none."""
    values: list[float] = [getattr(one, figure) for one in _certain(found) or found]
    return median(values)


def _certain(found: Sequence[Figures]) -> list[Figures]:
    return [one for one in found if not one.doubts]


def _ratio(found: Sequence[Figures], base: Sequence[Figures], figure: str) -> str:
    """Median of the ratios round by round, of rounds in which neither is in doubt."""
    pairs = [
        getattr(one, figure) / getattr(two, figure)
        for one, two in zip(found, base, strict=False)
        if not one.doubts and not two.doubts
    ]
    return f"{median(pairs):.2f}" if pairs else "-"
