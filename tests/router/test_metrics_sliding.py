"""Windows at their edges, and quantiles against sorted samples."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.sliding import LogHistogram, Sliding


class Count:
    def __init__(self) -> None:
        self.number = 0


def number_in(window: Sliding[Count], now: float) -> int:
    return sum(slot.number for slot in window.recent(now))


def test_what_was_counted_leaves_after_the_window():
    window = Sliding(Count, 5.0, 12)
    window.at(100.0).number += 1
    window.at(104.9).number += 1
    window.at(105.0).number += 1

    assert [number_in(window, now) for now in (105.0, 159.9, 160.0, 164.9, 165.0)] == [
        3,
        3,
        1,
        1,
        0,
    ]


def test_only_the_slots_of_the_window_are_kept():
    window = Sliding(Count, 5.0, 12)
    for now in range(10_000):
        window.at(float(now)).number += 1

    assert len(window._slots) == 12
    assert number_in(window, 9_999.0) == 60


def test_a_clock_that_seems_to_go_back_counts_where_it_was():
    window = Sliding(Count, 5.0, 12)
    window.at(10.0)
    window.at(9.999).number += 1

    assert number_in(window, 10.0) == 1


@pytest.mark.parametrize(
    ("now", "span_s"),
    [(7.0, 5.0), (11.0, 5.0), (12.0, 5.0), (30.0, 23.0), (64.0, 57.0), (65.0, 55.0), (69.0, 59.0)],
)
def test_a_rate_is_over_the_time_that_was_seen(now, span_s):
    window = Sliding(Count, 5.0, 12)
    window.at(7.0)

    assert window.span_s(now) == span_s


def test_a_part_of_the_window_is_its_end():
    window = Sliding(Count, 10.0, 60)
    for now in range(0, 600, 10):
        window.at(float(now)).number += 1

    assert (len(window.recent(595.0)), len(window.recent(595.0, 6))) == (60, 6)
    assert (window.span_s(595.0), window.span_s(595.0, 6)) == (595.0, 55.0)


def test_a_window_that_never_counted_has_a_slot_of_time():
    assert Sliding(Count, 5.0, 12).span_s(1e6) == 5.0


@given(st.lists(st.integers(0, 1 << 40), min_size=1), st.floats(0.01, 1.0))
def test_quantiles_are_within_an_eighth(values, share):
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)

    found = histogram.quantile(share)

    exact = sorted(values)[min(len(values) - 1, int(share * len(values) - 1e-9))]
    assert exact * 7 / 8 - 1 <= found <= exact * 9 / 8 + 1


@given(st.lists(st.integers(0, 1 << 40)), st.integers(0, 1 << 41))
def test_weights_above_a_limit_err_in_one_bucket_only(values, limit):
    histogram = LogHistogram()
    for value in values:
        histogram.add(value, 2.0)

    least = sum(2.0 for value in values if value > limit * 9 / 8 + 1)
    most = sum(2.0 for value in values if value >= limit * 7 / 8 - 1)
    assert least - 1e-6 <= histogram.above(limit) <= most + 1e-6
    assert histogram.above(-1) == pytest.approx(histogram.total) == 2.0 * len(values)


def test_nothing_counted_has_no_quantile():
    assert LogHistogram().quantile(0.5) is None
    assert LogHistogram().total == 0.0


def test_merged_histograms_are_one():
    rng, whole, parts = Random(1), LogHistogram(), [LogHistogram() for _ in range(3)]
    for number in range(300):
        value, weight = rng.randrange(10_000), rng.random()
        whole.add(value, weight)
        parts[number % 3].add(value, weight)

    found = LogHistogram()
    for part in parts:
        found.merge(part)

    assert found.total == pytest.approx(whole.total)
    for share in (0.1, 0.5, 0.99):
        assert found.quantile(share) == pytest.approx(whole.quantile(share))
