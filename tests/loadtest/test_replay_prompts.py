"""Traces as requests: equal text exactly where block ids are equal."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from roost_loadtest.fleet_sim.trace import Request, Trace
from roost_loadtest.replay.mock_answers import Body, body_decoder
from roost_loadtest.replay.mock_engines import block_names
from roost_loadtest.replay.prompts import TOKEN_BYTES, TraceText, session_keys

BLOCK = 16

lengths = st.integers(0, 4)


def trace(*requests: Request) -> Trace:
    return Trace("t", BLOCK, list(requests))


def asked(ids: tuple[int, ...], prompt: int | None = None, **options: object) -> Request:
    return Request(prompt or max(1, len(ids) * BLOCK), 3, ids, 0.0, **options)


def common(one: str, two: str) -> int:
    """Characters that two texts begin with in common."""
    same = 0
    for left, right in zip(one, two, strict=False):
        if left != right:
            break
        same += 1
    return same


@given(lengths, lengths, lengths, st.integers(0, 3 * BLOCK), st.integers(0, 3 * BLOCK))
def test_prompts_agree_as_far_as_their_ids_do(shared, own_one, own_two, tail_one, tail_two):
    first = (*range(shared), *range(100, 100 + own_one))
    second = (*range(shared), *range(200, 200 + own_two))
    requests = [
        Request(max(1, len(ids) * BLOCK + tail), 1, ids, 0.0)
        for ids, tail in ((first, tail_one), (second, tail_two))
    ]
    text = TraceText(trace(*requests))

    prompts = [text.prompt(0), text.prompt(1)]

    assert [len(p) for p in prompts] == [r.prompt_tokens * TOKEN_BYTES for r in requests]
    same_bytes = shared * BLOCK * TOKEN_BYTES
    assert prompts[0][:same_bytes] == prompts[1][:same_bytes]
    assert common(*prompts) - same_bytes < 16  # within the first word that differs
    whole = BLOCK * TOKEN_BYTES
    names = [block_names(p.encode(), whole) for p in prompts]
    assert [one == two for one, two in zip(*names, strict=False)].count(True) == shared


def test_ids_may_have_any_size_and_sign():
    text = TraceText(trace(asked((-1,)), asked((2**64 - 1,)), asked((1 << 90,)), asked((-1,))))

    prompts = [text.prompt(number) for number in range(4)]

    assert prompts[0] == prompts[3]
    assert len(set(prompts)) == 3


def test_a_request_is_plain_json_whose_length_is_told():
    text = TraceText(trace(asked((5, 6), 40)))

    head, _, body = text.request(0).partition(b"\r\n\r\n")

    assert f"content-length: {len(body)}".encode() in head
    fields = json.loads(body)
    assert fields["messages"] == [{"role": "user", "content": text.prompt(0)}]
    assert text.prompt(0).encode() in body  # nothing was escaped
    assert (fields["max_tokens"], fields["stream"]) == (3, True)
    read: Body = body_decoder.decode(body)
    assert (len(read.prompt), read.num_output) == (160, 3)


def test_a_prompt_that_half_extends_an_earlier_one_is_of_its_session():
    requests = [asked((1, 2, 3, 4)), asked((9,)), asked((1, 2, 7, 8)), asked((1, 20, 30, 40))]

    assert session_keys(trace(*requests)) == [0, 1, 0, 3]


def test_sessions_of_the_trace_are_kept():
    requests = [asked((1,), session="a"), asked((1,), session="b"), asked((5,), session="a")]

    assert session_keys(trace(*requests)) == [0, 1, 0]


def test_a_session_is_one_conversation_and_times_are_scaled():
    first = Request(16, 1, (1,), 2.0, session=7)
    other = Request(16, 1, (2,), 4.0)
    second = Request(16, 1, (3,), 2.0, session=7, think_s=10.0)

    found = TraceText(trace(first, other, second)).turns(0.5)

    assert found == [(1.0, [(0, 0.0), (2, 5.0)]), (2.0, [(1, 0.0)])]
    chains = TraceText(trace(first, other, second)).chains(0.5)
    assert [chain.starts_s for chain in chains] == [1.0, 2.0]
    assert [len(chain.asks) for chain in chains] == [2, 1]
