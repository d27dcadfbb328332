"""Resuming: comments and bodies survive the way over the wire, and nothing else passes for one."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_wire.resume import COMMENT_PREFIX, FIELD, Resume, comment, read_comment, with_resume

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=50)
seeds = st.integers(-(2**63), 2**63 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def test_the_line_is_the_documented_one():
    """Replicas and routers of different releases talk to each other."""
    assert comment([12, 345, 6]) == b": roost 12 345 6\n"
    assert comment([]) == b""


@given(token_ids.filter(bool), st.sampled_from([b"", b"\n", b"\r\n"]))
def test_a_comment_tells_the_tokens(ids, line_end):
    line = comment(ids).removesuffix(b"\n") + line_end

    assert line.startswith(COMMENT_PREFIX)
    assert read_comment(line) == ids


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b": roost ",
        b": roost",
        b": keepalive",
        b": roost 1  2",
        b": roost 1 2 ",
        b": roost -1",
        b": roost +1",
        b": roost 1_0",
        b": roost 1,2",
        b": roost 1.0",
        b": roost 0x1",
        b": roost 1\n: roost 2",
        b": roost \xd9\xa3",  # an Arabic digit
        b": roost 2147483648",
        b": roost 99999999999",
        b"data: 1",
    ],
)
def test_a_line_that_is_not_a_list_of_tokens_is_refused(line):
    with pytest.raises(ValueError, match=r"not a comment|exceeds"):
        read_comment(line)


def test_the_largest_token_id_passes():
    assert read_comment(comment([2**31 - 1])) == [2**31 - 1]


@given(
    st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    token_ids,
    seeds,
    st.sampled_from(["", " ", "\n", " \r\n\t"]),
    st.sampled_from([None, 2]),
)
def test_a_body_keeps_its_bytes_and_gains_the_field(fields, ids, seed, space, indent):
    body = (space + json.dumps(fields, indent=indent) + space).encode()

    resumed = with_resume(body, Resume(ids, seed))

    assert json.loads(resumed) == fields | {FIELD: {"token_ids": ids, "seed": seed}}
    assert resumed.startswith(body.rstrip()[:-1].rstrip())


def test_the_field_that_was_there_already_loses():
    once = with_resume(b'{"a":1}', Resume([1], 5))

    decoded = msgspec.json.decode(with_resume(once, Resume([1, 2], 5)))

    assert decoded == {"a": 1, FIELD: {"token_ids": [1, 2], "seed": 5}}


def test_the_field_is_the_documented_one():
    assert (
        with_resume(b"{}", Resume([1, 2], -3)) == b'{"roost_resume":{"token_ids":[1,2],"seed":-3}}'
    )


@pytest.mark.parametrize("body", [b"", b"  ", b"[]", b"}", b"null", b'{"a":1', b'"}"'])
def test_what_is_no_object_cannot_be_resumed(body):
    with pytest.raises(ValueError, match="not a JSON object"):
        with_resume(body, Resume([], 0))


@pytest.mark.parametrize(
    "value",
    [
        {"token_ids": [2**31], "seed": 1},
        {"token_ids": [-1], "seed": 1},
        {"token_ids": [1.5], "seed": 1},
        {"token_ids": [True], "seed": 1},
        {"token_ids": [1]},
        {"seed": 1},
        {"token_ids": [1], "seed": 2**63},
        {"token_ids": [1], "seed": -(2**63) - 1},
        {"token_ids": [1], "seed": None},
        {"token_ids": [1], "seed": 1, "text": "x"},
    ],
)
def test_a_field_out_of_range_is_refused(value):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(value, Resume)


@pytest.mark.parametrize(("ids", "seed"), [([2**31 - 1, 0], 2**63 - 1), ([], -(2**63))])
def test_the_edges_of_the_ranges_are_taken(ids, seed):
    read = msgspec.convert({"token_ids": ids, "seed": seed}, Resume)

    assert (read.token_ids, read.seed) == (ids, seed)
