"""When refused clients are told to come back."""

from __future__ import annotations

import pytest

from roost_engine.retry_after import LEAST_S, MOST_S, EndRate


def rate(*ends: float) -> EndRate:
    remembered = EndRate()
    for end in ends:
        remembered.note(end)
    return remembered


@pytest.mark.parametrize(
    ("ends", "num_waiting", "now", "seconds"),
    [
        ([], 1000, 5.0, LEAST_S),
        ([1.0], 1000, 5.0, LEAST_S),
        ([0.0, 1.0, 2.0], 0, 2.0, 1),  # one a second, nobody waits
        ([0.0, 1.0, 2.0], 8, 2.0, 5),  # half of 8, and one more
        ([0.0, 0.1], 10, 0.1, 1),
        ([0.0, 1.0], 2, 11.0, 22),  # nothing has ended for long: slower and slower
        ([0.0, 1.0], 1024, 1.0, MOST_S),
        ([3.0, 3.0], 4, 3.0, LEAST_S),
    ],
)
def test_table(ends: list[float], num_waiting: int, now: float, seconds: int) -> None:
    assert rate(*ends).retry_after_s(num_waiting, now) == seconds


def test_only_recent_ends_count() -> None:
    slow_then_fast = rate(*range(0, 1000, 10), *(1000 + step / 10 for step in range(64)))

    assert slow_then_fast.retry_after_s(98, 1006.3) == 5
