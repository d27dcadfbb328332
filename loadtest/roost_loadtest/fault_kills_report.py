"""What the kills found, as lines for a terminal. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import quantiles

from roost_loadtest.fault_kills import KillReport


def kill_lines(report: KillReport) -> list[str]:
    """The report as lines for a terminal."""
    kinds = Counter(kind for stream in report.killed for kind in stream.kinds)
    places = [place for stream in report.killed for place in stream.after_events]
    variants = Counter(stream.variant for stream in report.killed)
    hit = [each for each in report.hit_by_process_kills if any(each.after_events)]
    lines = [
        f"streams {report.num_streams}, of them undisturbed {report.num_undisturbed}",
        f"kills {report.num_kills}: {_counted(kinds)}",
        f"in {len(report.killed)} streams: {_counted(variants)}",
        f"after {min(places, default=0)} to {max(places, default=0)} events",
        f"SIGKILLs of engines {report.process_kills}, in the middle of {len(hit)} streams",
        f"not delivered exactly: {sum(report.lost.values())} ({_counted(Counter(report.lost))})",
        *(f"  {example}" for example in report.examples),
    ]
    quick = [stream for stream in report.killed if "hang" not in stream.kinds]
    hung = [stream for stream in report.killed if "hang" in stream.kinds]
    parts = {
        "gap, undisturbed": report.undisturbed_gaps_ms,
        "gap, killed": [stream.gap_ms for stream in quick],
        "gap, SIGKILL": [stream.gap_ms for stream in hit],
        "gap, hung": [stream.gap_ms for stream in hung],
        "of it router: kill to next leg": [s.router_ms for s in quick if s.router_ms is not None],
        "of it engine: leg to first event": [s.engine_ms for s in quick if s.engine_ms is not None],
    }
    return lines + [f"{name:<34} {spread(values)}" for name, values in parts.items() if values]


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def spread(values: Sequence[float]) -> str:
    """Median, 99th percentile and maximum of milliseconds."""
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return f"p50 {cuts[49]:8.1f} ms   p99 {cuts[98]:8.1f} ms   max {max(values):8.1f} ms"
