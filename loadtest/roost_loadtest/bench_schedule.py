"""Benchmark: what the engine's scheduling costs a step, without any model.

Every request decodes; a step is `schedule` and `update` with given tokens. Requests stand at
different places of their blocks, so each step completes its share of blocks, as in service. What
is measured is handed in: this package sees replicas from outside only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

_BATCHES = (1, 32, 256)
_CONTEXTS_TOKENS = (128, 4096)
_STEPS = 64  # of a round: each request completes four blocks

#: (number of requests, tokens of context each, number of steps) -> a function that takes a step.
Build = Callable[[int, int, int], Callable[[], object]]


def bench_schedule(build: Build, *, rounds: int) -> None:
    """Print ms a step for several batches and contexts: median and slowest of the rounds.

    The slowest one may hold a full collection of Python's garbage, which visits every block.
    """
    print(f"{'batch':>6} {'context':>8} {'ms a step':>10} {'slowest':>9} {'µs a request':>13}")
    for context_tokens in _CONTEXTS_TOKENS:
        for batch in _BATCHES:
            took = _round_ms(build(batch, context_tokens, rounds * _STEPS), rounds)
            typical = median(took)
            print(
                f"{batch:>6} {context_tokens:>8} {typical:>10.3f} {max(took):>9.3f} "
                f"{typical / batch * 1e3:>13.2f}"
            )


def _round_ms(step: Callable[[], object], rounds: int) -> list[float]:
    """Mean ms of a step in each of so many rounds."""
    took: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(_STEPS):
            step()
        took.append((time.perf_counter() - started) / _STEPS * 1e3)
    return took
