"""Ratios, roofline and the mark of disturbed figures, on records written by hand."""

from __future__ import annotations

from roost_loadtest.bench_engine_table import (
    Comparison,
    OfflineRecord,
    ReadyRecord,
    ServedRecord,
    mean,
    offline_table,
    ready_table,
    served_table,
)
from roost_loadtest.canary import Reading
from roost_loadtest.served_load import ServedResult

CALM = Reading(gb_s=40.0, gflop_s=400.0, kind="bf16")
COMPARISON = Comparison(beside={"peer": "ours"}, bytes_per_token={"ours": 200e6})


def record(engine: str, rates: list[float], canary: Reading = CALM) -> list[OfflineRecord]:
    return [
        OfflineRecord(round=n, workload="decode 1", engine=engine, tokens_s=rate, canary=canary)
        for n, rate in enumerate(rates)
    ]


def test_a_ratio_is_of_the_same_round() -> None:
    """Both are slow in the last round: the ratio is 2 throughout, medians of each would differ."""
    records = record("ours", [100, 90, 20]) + record("peer", [50, 45, 10])

    ours, peer = offline_table(records, COMPARISON)[1:]

    assert ours.split()[2] == "ours"
    assert ours.split()[3] == "90.0"
    assert " 2.00 " in peer


def test_rounds_that_only_one_side_has_give_no_ratio() -> None:
    records = record("ours", [100]) + record("peer", [50, 1])

    assert " 2.00 " in offline_table(records, COMPARISON)[2]


def test_the_roofline_is_the_bandwidth_that_weights_took() -> None:
    (line,) = offline_table(record("ours", [150]), COMPARISON)[1:]

    assert " 75% " in line  # 150 x 200 MB of 40 GB/s


def test_only_single_stream_decoding_has_a_roofline() -> None:
    batch = OfflineRecord(round=0, workload="decode 16", engine="ours", tokens_s=900, canary=CALM)

    (line,) = offline_table([batch], COMPARISON)[1:]

    assert "%" not in line


def test_a_figure_beside_which_the_canary_sank_is_marked() -> None:
    just_calm = Reading(gb_s=34.0, gflop_s=340.0, kind="bf16")  # 85 %
    slow_memory = Reading(gb_s=33.9, gflop_s=400.0, kind="bf16")
    slow_cores = Reading(gb_s=40.0, gflop_s=339.0, kind="bf16")
    records = record("usual", [1.0] * 9) + record("a", [1.0], just_calm)
    records += record("b", [1.0], slow_memory) + record("c", [1.0], slow_cores)

    lines = offline_table(records, COMPARISON)[1:]

    assert [line.endswith(" *") for line in lines] == [False, False, True, True]


def test_one_bad_or_good_reading_marks_nothing() -> None:
    """Figures are medians, so is the canary beside them; a lucky reading sets no standard."""
    lucky = Reading(gb_s=60.0, gflop_s=600.0, kind="bf16")
    slow = Reading(gb_s=20.0, gflop_s=200.0, kind="bf16")
    records = [*record("a", [1.0] * 2), *record("a", [1.0], slow), *record("b", [1.0] * 2)]
    records += record("b", [1.0], lucky)

    assert "*" not in "".join(offline_table(records, COMPARISON))


def test_two_readings_count_half_each() -> None:
    assert mean(Reading(1.0, 9.0, "bf16"), Reading(2.0, 8.0, "bf16")) == Reading(1.5, 8.5, "bf16")


def test_served_times_are_compared_with_the_first_of_ours() -> None:
    def served(engine: str, seconds: float) -> ServedRecord:
        result = ServedResult(seconds=seconds, ttft_p50_s=0.5, ttft_p95_s=1.5)
        return ServedRecord(round=0, engine=engine, result=result, canary=CALM)

    ours, peer = served_table([served("ours", 6.0), served("peer", 10.0)], "ours")[1:]

    assert " - " in ours
    assert " 0.60 " in peer
    assert " 1.500 " in peer


def test_ready_takes_the_median_of_the_starts() -> None:
    starts = [
        ReadyRecord(round=n, engine="ours", seconds=seconds, canary=CALM)
        for n, seconds in enumerate([9.0, 1.0, 2.0])
    ]

    assert ready_table(starts)[1].split() == ["ours", "2.00", "1.00", "-", "9.00"]
