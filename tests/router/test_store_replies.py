"""Replies of Redis that are what was asked for, and others."""

from __future__ import annotations

import pytest

from roost_router.store.address import Node
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.replies import bytes_of, entries_of, expecting, redirection

HERE = Node("10.0.0.1", 7000)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("MOVED 3999 10.0.0.2:6381", Node("10.0.0.2", 6381)),
        ("ASK 3999 redis-1.example:6381", Node("redis-1.example", 6381)),
        ("MOVED 3999 :6381", Node("10.0.0.1", 6381)),
        ("MOVED 3999 ::1:6381", Node("::1", 6381)),
    ],
)
def test_redirections_name_a_node(text, node):
    assert redirection(text, HERE) == node


@pytest.mark.parametrize("text", ["MOVED", "MOVED 3999", "MOVED 3999 host", "MOVED 1 a:1 b"])
def test_redirections_to_nowhere_are_nonsense(text):
    with pytest.raises(StoreError) as caught:
        redirection(text, HERE)
    assert caught.value.fault is StoreFault.NONSENSE


def test_entries_of_others_have_no_blob():
    reply = [
        [b"1-0", [b"b", b"ours"]],
        [b"2-0", [b"a", b"1"]],
        [b"3-0", [b"b", b"1", b"c", b"2"]],
        [b"4-0", []],
    ]

    assert entries_of(reply) == (
        [(b"1-0", b"ours"), (b"2-0", b""), (b"3-0", b""), (b"4-0", b"")],
        3,
    )


@pytest.mark.parametrize(
    "reply", [b"x", 1, [1], [[b"1-0"]], [[b"1-0", 1]], [[1, [b"b", b"x"]]], [[b"1", [b"b", 1]]]]
)
def test_entries_of_another_shape_are_nonsense(reply):
    with pytest.raises(StoreError) as caught, expecting():
        entries_of(reply)
    assert caught.value.fault is StoreFault.NONSENSE


@pytest.mark.parametrize("reply", [None, 1, "x", [b"x"]])
def test_what_is_no_bytes_is_nonsense(reply):
    assert bytes_of(b"") == b""
    with pytest.raises(StoreError):
        bytes_of(reply)
