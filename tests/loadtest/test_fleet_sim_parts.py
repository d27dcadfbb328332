"""The simulator's parts: step times, cache, traces, load, prompts."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.load import TooLargeError, time_scale, work_s
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.prompts import canonical_prompt
from roost_loadtest.fleet_sim.trace import Request, Trace, TraceError, read_trace
from roost_router.index.text_chain import text_chain

TIMES = StepTimes()
BLOCK = 10


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=10), st.integers(0, 50_000))
def test_a_prefill_costs_the_same_however_it_is_cut(chunks, cached):
    total, before = 0.0, cached
    for chunk in chunks:
        total += TIMES.prefill_s(chunk, before)
        before += chunk

    assert total == pytest.approx(TIMES.prefill_s(sum(chunks), cached))


@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 10**6))
def test_alike_steps_add_up(num_steps, num_streams, context):
    total = sum(TIMES.decode_s(1, num_streams, context + i * num_streams) for i in range(num_steps))

    assert TIMES.decode_s(num_steps, num_streams, context) == pytest.approx(total)


@given(
    st.integers(1, 5000),
    st.floats(0.001, 0.999),
    st.integers(1, 50),
    st.integers(0, 10**6),
    st.sampled_from([TIMES, StepTimes(context_s=0.0)]),
)
def test_the_step_under_way_is_found(step, share, num_streams, context, times):
    begin = times.decode_s(step - 1, num_streams, context)
    end = times.decode_s(step, num_streams, context)

    elapsed_s = begin + share * (end - begin)

    assert times.steps_begun(elapsed_s, num_streams, context) == step


def test_at_least_one_step_has_begun():
    assert TIMES.steps_begun(0.0, 1, 0) == 1


def test_a_cache_evicts_tails_first_and_keeps_what_is_in_use():
    cache = BlockCache(5)
    assert cache.take((1, 2, 3), 0) == 0
    assert cache.take((1, 4), 1) == 1  # 1 is shared: five blocks in all
    assert cache.take((5,), 0) is None
    cache.free((1, 2, 3), 0)

    assert cache.take((5,), 0) == 0  # instead of 3

    assert (cache.used_blocks, cache.idle_blocks) == (4, 1)
    cache.free((5,), 0)
    cache.free((1, 4), 1)
    assert cache.take((1, 2, 3), 0) == 2


def test_a_refused_request_changes_nothing():
    cache = BlockCache(3)
    cache.take((1, 2), 0)
    cache.free((1, 2), 0)

    assert cache.take((1, 2), 2) is None

    assert (cache.used_blocks, cache.idle_blocks) == (0, 2)
    assert cache.take((1, 2), 1) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 3)), max_size=60))
def test_a_cache_never_exceeds_its_capacity_and_finds_only_prefixes(steps):
    """Families of nested prompts, taken and freed at random."""
    cache, held = BlockCache(12), []
    for family, length, num_private in steps:
        ids = tuple(100 * family + place for place in range(length))
        matched = cache.take(ids, num_private)
        if matched is None:
            assert held
            cache.free(*held.pop(0))
        else:
            held.append((ids, num_private))
        assert cache.used_blocks + cache.idle_blocks <= 12
    for ids, num_private in held:
        cache.free(ids, num_private)
    assert cache.used_blocks == 0


def line(**changes) -> dict[str, object]:
    return {"t": 0, "in": 25, "out": 5, "hash_ids": [1, 2, 3], "block": 10} | changes


def write(path, lines, *, packed=False):
    text = "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_trace_is_read_in_order_of_arrival(tmp_path, packed):
    lines = [line(t=3000), line(t=1000, out=0, hash_ids=[7]), line(t=2000)]

    trace = read_trace(write(tmp_path / "some.jsonl", lines, packed=packed))

    assert trace.name == "some"
    assert trace.block_tokens == 10
    assert [request.arrives_s for request in trace.requests] == [0.0, 1.0, 2.0]
    assert trace.requests[0] == Request(25, 1, (7,), 0.0)
    assert trace.num_private(trace.requests[0]) == 2
    assert trace.num_private(trace.requests[1]) == 0


def test_sessions_start_at_the_time_of_their_first_request(tmp_path):
    lines = [
        line(t=2000, sid="b", think=9.0),
        line(t=1000, sid=1),
        line(t=None, sid="b", think=500),
        line(t=0, sid=1, think=-1, hash_ids=[]),
        line(t=1500),
    ]

    trace = read_trace(write(tmp_path / "t.jsonl", lines))

    told = [(r.session, r.arrives_s, r.think_s, len(r.block_ids)) for r in trace.requests]
    assert told == [
        (1, 0.0, 0.0, 3),
        (1, 0.0, 0.0, 0),
        (None, 0.5, 0.0, 3),
        ("b", 1.0, 0.009, 3),
        ("b", 1.0, 0.5, 3),
    ]


def test_the_first_lines_of_a_trace(tmp_path):
    path = write(tmp_path / "t.jsonl", [line(), line(t=5), "nonsense\n"])

    assert len(read_trace(path, 2).requests) == 2


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ("{nonsense\n", "malformed"),
        ("[]\n", "object"),
        (line(**{"in": "many"}), "`int`"),
        (line(**{"in": 0}), "`in` 0"),
        (line(out=-1), "`out` -1"),
        (line(block=16), "`block` is 16, before it was 10"),
        (line(hash_ids=[1, 2, 3, 4]), "4 `hash_ids` of 10 tokens for 25 tokens"),
        (line(hash_ids=[1, 1]), "twice"),
        (line(t=None), "`t` is missing"),
        (line(sid=1, t=None), "`t` is missing"),
        ({"t": 0, "in": 25, "block": 10}, "missing required field"),
    ],
)
def test_a_bad_line_is_named_with_its_cause(tmp_path, bad, cause):
    path = write(tmp_path / "bad.jsonl", [line(), bad])

    with pytest.raises(TraceError) as caught:
        read_trace(path)

    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert cause in str(caught.value).lower() or cause in str(caught.value)


def test_an_empty_trace_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="no requests"):
        read_trace(write(tmp_path / "t", []))


def test_a_truncated_gzip_is_an_error(tmp_path):
    path = write(tmp_path / "t", [line(t=n) for n in range(100)], packed=True)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(TraceError, match=str(path)):
        read_trace(path)


PLAIN = StepTimes(token_s=0.001, pair_s=0.0, step_s=0.010, context_s=0.0, chunk_tokens=100)


def trace_of(*requests: Request) -> Trace:
    return Trace("t", 10, list(requests))


def test_the_work_of_a_trace_counts_what_one_cache_misses():
    """20 + 10 prompt tokens; 4 + 4 steps of 1 ms and a fourth part of 10 ms: four fit at once."""
    trace = trace_of(Request(20, 5, (1, 2), 0.0), Request(20, 5, (1, 3), 10.0))

    assert work_s(trace, PLAIN, 100) == pytest.approx(0.030 + 8 * (0.001 + 0.010 / 4))
    assert time_scale(trace, 4.0, speed=2, load=0.5) == pytest.approx(0.4)
    assert time_scale(trace_of(trace.requests[0]), 4.0, speed=2, load=0.5) == 1.0


def test_a_request_that_fits_nowhere_is_named():
    trace = trace_of(Request(20, 5, (), 0.0), Request(20, 11, (), 0.0))

    with pytest.raises(TooLargeError, match=r"request 1 needs 4 blocks of 10 tokens.* has 3:"):
        work_s(trace, PLAIN, 39)
    assert work_s(trace, PLAIN, 40) > 0.0


def test_block_ids_may_be_hashes_of_any_size():
    ids = (-1, 1 << 63, (1 << 64) - 1000, 1 << 70)

    prompt = canonical_prompt(Request(4 * BLOCK, 1, ids, 0.0), BLOCK, 1)

    assert len(prompt) == 16 * BLOCK
    assert len({prompt[at : at + 4 * BLOCK] for at in range(0, 16 * BLOCK, 4 * BLOCK)}) == 4


@pytest.mark.parametrize("block_tokens", [512, 16, 7])
def test_prompts_agree_as_far_as_their_block_ids(block_tokens):
    length = 20 * block_tokens
    one = canonical_prompt(Request(length, 1, tuple(range(20)), 0.0), block_tokens, 1)
    other_ids = (*range(13), *range(113, 119))  # and a block without an id
    other = canonical_prompt(Request(length, 1, other_ids, 0.0), block_tokens, 2)
    third = canonical_prompt(Request(length, 1, other_ids, 0.0), block_tokens, 3)

    assert len(one) == len(other) == 4 * length
    assert one[: 13 * 4 * block_tokens] == other[: 13 * 4 * block_tokens]
    assert one[13 * 4 * block_tokens] != other[13 * 4 * block_tokens]
    assert other[: 19 * 4 * block_tokens] == third[: 19 * 4 * block_tokens]
    assert other[19 * 4 * block_tokens :] != third[19 * 4 * block_tokens :]
    assert text_chain(one)[0] == text_chain(other)[0]
