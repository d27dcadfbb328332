"""Tables of `roost bench engine`: medians, ratios and what the canary said, out of raw records.

    ratio      of ours to a peer, of the same round, then the median over rounds: what slows the
               machine for a whole round slows both
    roofline   share of the canary's bandwidth that single-stream decoding used. Each token
               reads every weight once; KV and activations are left out
    *          disturbed: the median canary beside this figure is below 85 % of the whole run's
               median. Not of its best: on shared machines single readings jump by half

Pure. Not here: measuring (bench_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from roost_loadtest.canary import Reading
from roost_loadtest.served_load import ServedResult

_DISTURBED = 0.85


class OfflineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One offline measurement, with the mean of the canary's readings before and after it."""

    round: int
    workload: str
    engine: str
    tokens_s: float
    canary: Reading


class ServedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One served measurement."""

    round: int
    engine: str
    result: ServedResult
    canary: Reading


class ReadyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a server."""

    round: int
    engine: str
    seconds: float
    canary: Reading


class Comparison(msgspec.Struct, frozen=True):
    """Which of our engines a peer is compared with, and what one token reads."""

    beside: dict[str, str]  # peer -> ours
    bytes_per_token: dict[str, float]  # ours -> bytes of weights


def mean(before: Reading, after: Reading) -> Reading:
    """What the machine gave meanwhile, as far as two readings around it can tell."""
    return Reading(
        (before.gb_s + after.gb_s) / 2, (before.gflop_s + after.gflop_s) / 2, before.kind
    )


def offline_table(records: Sequence[OfflineRecord], comparison: Comparison) -> list[str]:
    """A line for each workload and engine, in the order in which they were first measured."""
    head = f"{'workload':<13}{'engine':<22}{'tokens/s':>10}{'min - max':>16}{'ours/it':>9}"
    lines = [head + f"{'roofline':>10}{'GB/s':>7}{'GFLOP/s':>9}"]
    usual = _usual(record.canary for record in records)
    by_cell = _grouped(records)
    for (workload, engine), cell in by_cell.items():
        rates = [record.tokens_s for record in cell]
        ours = by_cell.get((workload, comparison.beside.get(engine, "")))
        lines.append(
            f"{workload:<13}{engine:<22}{median(rates):>10.1f}"
            f"{f'{min(rates):.0f} - {max(rates):.0f}':>16}"
            f"{_ratio(ours, cell):>9}{_roofline(cell, comparison):>10}"
            f"{_canary_cells([record.canary for record in cell], usual)}"
        )
    return lines


def served_table(records: Sequence[ServedRecord], ours: str) -> list[str]:
    """A line for each server; the last ratio is our time to its time, so less is better."""
    head = f"{'server':<22}{'seconds':>9}{'min - max':>16}{'TTFT p50':>10}{'p95':>8}"
    lines = [head + f"{'ours/it':>9}{'GB/s':>7}{'GFLOP/s':>9}"]
    usual = _usual(record.canary for record in records)
    our_seconds = {r.round: r.result.seconds for r in records if r.engine == ours}
    for engine in dict.fromkeys(record.engine for record in records):
        cell = [record for record in records if record.engine == engine]
        seconds = [record.result.seconds for record in cell]
        ratios = [our_seconds[r.round] / r.result.seconds for r in cell if r.round in our_seconds]
        ratio = f"{median(ratios):.2f}" if ratios and engine != ours else "-"
        lines.append(
            f"{engine:<22}{median(seconds):>9.2f}"
            f"{f'{min(seconds):.2f} - {max(seconds):.2f}':>16}"
            f"{median(r.result.ttft_p50_s for r in cell):>10.3f}"
            f"{median(r.result.ttft_p95_s for r in cell):>8.3f}{ratio:>9}"
            f"{_canary_cells([record.canary for record in cell], usual)}"
        )
    return lines


def ready_table(records: Sequence[ReadyRecord]) -> list[str]:
    """A line for each server."""
    lines = [f"{'server':<22}{'ready s':>9}{'min - max':>16}"]
    for engine in dict.fromkeys(record.engine for record in records):
        seconds = [record.seconds for record in records if record.engine == engine]
        spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
        lines.append(f"{engine:<22}{median(seconds):>9.2f}{spread:>16}")
    return lines


def _grouped(records: Sequence[OfflineRecord]) -> dict[tuple[str, str], list[OfflineRecord]]:
    """By workload, then engine, each in order of appearance."""
    engines = dict.fromkeys(record.engine for record in records)
    workloads = dict.fromkeys(record.workload for record in records)
    cells = {
        (workload, engine): [r for r in records if r.workload == workload and r.engine == engine]
        for workload in workloads
        for engine in engines
    }
    return {key: cell for key, cell in cells.items() if cell}


def _ratio(ours: Sequence[OfflineRecord] | None, theirs: Sequence[OfflineRecord]) -> str:
    if ours is None:
        return "-"
    rates = {record.round: record.tokens_s for record in ours}
    ratios = [rates[r.round] / r.tokens_s for r in theirs if r.round in rates]
    return f"{median(ratios):.2f}" if ratios else "-"


def _roofline(cell: Sequence[OfflineRecord], comparison: Comparison) -> str:
    num_bytes = comparison.bytes_per_token.get(cell[0].engine)
    if num_bytes is None or cell[0].workload != "decode 1":
        return "-"
    shares = [r.tokens_s * num_bytes / (r.canary.gb_s * 1e9) for r in cell]
    return f"{median(shares):.0%}"


def _usual(readings: Iterable[Reading]) -> tuple[float, float]:
    """Medians of a run: (GB/s, GFLOP/s)."""
    pairs = [(reading.gb_s, reading.gflop_s) for reading in readings]
    return median(gb_s for gb_s, _ in pairs), median(gflop_s for _, gflop_s in pairs)


def _canary_cells(readings: Sequence[Reading], usual: tuple[float, float]) -> str:
    here = _usual(readings)
    disturbed = any(now < _DISTURBED * then for now, then in zip(here, usual, strict=True))
    return f"{here[0]:>7.1f}{here[1]:>9.0f}{' *' if disturbed else ''}"
