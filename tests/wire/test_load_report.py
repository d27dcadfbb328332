"""Load reports are read from pages as vLLM, our engine and others write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_wire.load_report import LoadReport, parse_load_report

VLLM_PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-0.6B"} 3.0
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-0.6B"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="Qwen/Qwen3-0.6B"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="2048",x="a\\"}b"} 1.0
process_start_time_seconds 1.79e+09
roost_engine:queued_tokens{engine="0",model_name="Qwen/Qwen3-0.6B"} 512.0
"""


def test_a_vllm_page_is_read():
    assert parse_load_report(VLLM_PAGE) == LoadReport(
        num_running=3,
        num_waiting=2,
        kv_usage=0.25,
        kv_capacity_tokens=32768,
        started_at=1.79e9,
        queued_tokens=512,
    )


SGLANG_PAGE = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 12.0
sglang:num_running_reqs_offline_batch{model_name="m"} 5.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 4.0
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.5
sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 400000.0
"""
TENSORRT_LLM_PAGE = """\
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 3.0
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 1.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.125
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32.0
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 1000.0
"""
LLAMA_CPP_PAGE = """\
llamacpp:prompt_tokens_total 1085
llamacpp:requests_processing 8
llamacpp:requests_deferred 2
"""


@pytest.mark.parametrize(
    ("page", "report"),
    [
        (
            SGLANG_PAGE,
            LoadReport(num_running=12, num_waiting=4, kv_usage=0.5, kv_capacity_tokens=400_000),
        ),
        (
            TENSORRT_LLM_PAGE,
            LoadReport(num_running=3, num_waiting=1, kv_usage=0.125, kv_capacity_tokens=32_000),
        ),
        (LLAMA_CPP_PAGE, LoadReport(num_running=8, num_waiting=2)),
    ],
)
def test_pages_of_other_engines_are_read(page, report):
    assert parse_load_report(page) == report


def test_data_parallel_ranks_are_added_up():
    page = "".join(
        f'vllm:num_requests_running{{engine="{rank}"}} {rank + 1}\n'
        f'vllm:kv_cache_usage_perc{{engine="{rank}"}} 0.{rank + 1}\n'
        f'vllm:cache_config_info{{engine="{rank}",block_size="16",num_gpu_blocks="10"}} 1\n'
        for rank in range(2)
    )

    report = parse_load_report(page)

    assert (report.num_running, report.kv_capacity_tokens) == (3, 320)
    assert report.kv_usage is not None
    assert abs(report.kv_usage - 0.15) < 1e-9


def test_figures_that_cannot_be_true_are_none():
    page = (
        f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{"9" * 400}"}} 1\n'
        'vllm:num_requests_running{a="b"} -3\n'
        'vllm:num_requests_waiting{a="b"} 1e300\n'
    )

    assert parse_load_report(page) == LoadReport()
    assert parse_load_report('vllm:cache_config_info{block_size="0",num_gpu_blocks="9"} 1\n') == (
        LoadReport()
    )


def test_what_is_missing_or_broken_is_none():
    page = (
        'vllm:num_requests_running{a="b"} NaN\n'
        'vllm:num_requests_waiting{a="b"} many\n'
        'vllm:cache_config_info{block_size="None",num_gpu_blocks="2"} 1\n'
        "vllm:kv_cache_usage_perc\n"
    )

    assert parse_load_report(page) == LoadReport()


@given(st.text())
def test_no_page_makes_the_reader_fail(page):
    parse_load_report("vllm:kv_cache_usage_perc" + page)
    parse_load_report(page)
