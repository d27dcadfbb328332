"""What our engine tells of its load is read as it was written, and nothing else is."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_wire.load_report import LoadReport
from roost_wire.told_load import MAX_COUNT, ToldLoad, read_header, read_packed

LOAD = ToldLoad(3, 1, 1296, 2048, 512)
counts = st.integers(0, MAX_COUNT)


def test_the_header_is_sglangs_numbers_in_sglangs_order():
    assert LOAD.header() == "[3,1,1296,2048,512]"


@given(st.builds(ToldLoad, counts, counts, counts, counts, counts))
def test_what_is_written_is_read(load):
    assert read_header(load.header().encode()) == load
    assert read_packed(msgspec.msgpack.encode(load)) == load


@pytest.mark.parametrize("more", [b",7", b',"x"', b",[[]]", b"," + b"9" * 200])
def test_numbers_at_the_end_that_a_reader_does_not_know_are_passed_over(more):
    assert read_header(b"[3,1,1296,2048,512" + more + b"]") == LOAD


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"3 1 1296 2048 512",
        b"[3,1,1296,2048]",
        b"[3,1,1296,2048,-1]",
        b"[3,1,1296,2048,%d]" % (MAX_COUNT + 1),
        b"[3,1,1296,2048,5.5]",
        b"[3,1,1296,2048,null]",
        b"[3,1,1296,2048,512] x",
        b"[3,1,1296,2048,512,\xff]",
        b"[3,1,1296,2048,512," + b"9" * 250 + b"]",
        b"[3,1,1296,2048,512," + b"[" * 30_000,
        b"{}",
    ],
)
def test_what_is_no_load_is_none(value):
    assert read_header(value) is None
    assert read_packed(value) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_load_or_none(value):
    for read in (read_header, read_packed):
        load = read(value)
        assert load is None or read_header(load.header().encode()) == load


def test_a_report_takes_in_a_load_and_keeps_what_that_does_not_tell():
    before = LoadReport(num_running=9, kv_usage=1.0, started_at=5.0)

    assert before.with_load(LOAD) == LoadReport(
        num_running=3,
        num_waiting=1,
        kv_usage=1296 / 2048,
        kv_capacity_tokens=2048,
        started_at=5.0,
        queued_tokens=512,
    )


@pytest.mark.parametrize(("used", "capacity", "usage"), [(5, 0, None), (5, 4, 1.0), (0, 4, 0.0)])
def test_kv_usage_is_a_share_whatever_is_told(used, capacity, usage):
    report = LoadReport().with_load(ToldLoad(0, 0, used, capacity, 0))

    assert (report.kv_usage, report.kv_capacity_tokens) == (usage, capacity or None)
