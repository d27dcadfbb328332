"""How long a call takes, for benchmarks of what runs in one process."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def median_us(work: Callable[[], object], rounds: int) -> float:
    """Median µs of one call, over `rounds` batches of about a millisecond."""
    started = time.perf_counter()
    work()
    batch = max(1, int(0.001 / (time.perf_counter() - started)))
    took: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(batch):
            work()
        took.append((time.perf_counter() - started) / batch)
    return median(took) * 1e6
