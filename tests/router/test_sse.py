"""The observer sees the same stream however it is cut."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from roost_router import sse
from roost_router.sse import SseObserver, read_usage

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}


IMPOSSIBLE = (
    b'{"usage": {"prompt_tokens": "x"}}',
    b'{"usage": {"prompt_tokens": -1}}',
    b'{"usage": {"prompt_tokens": 99999999999}}',
    b'{"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": -1}}}',
)


def stream(separator: bytes, *, done: bool = True) -> bytes:
    events = [
        json.dumps({"choices": [{"delta": {"content": text}}], "usage": None}).encode()
        for text in ("a", '"usage": {', "data: [DONE]", "\n\ndata: [DONE]\n\n", "é")
    ]
    events.append(json.dumps({"choices": [], "usage": USAGE}).encode())
    if done:
        events.append(b"[DONE]")
    return b"".join(b"data: " + event + separator for event in events)


@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_cuts_do_not_matter(cuts, separator):
    data, observer, at = stream(separator), SseObserver(), 0
    for cut in cuts:
        observer.feed(data[at : at + cut])
        at += cut
    observer.feed(data[at:])

    assert observer.is_done
    assert observer.num_events == 7
    assert observer.usage is not None
    assert (
        observer.usage.prompt_tokens,
        observer.usage.completion_tokens,
        observer.usage.cached_tokens,
    ) == (9, 2, 8)


def test_a_stream_without_done_is_not_done():
    observer = SseObserver()

    observer.feed(stream(b"\n\n", done=False))

    assert not observer.is_done


def test_an_endless_event_does_not_grow_memory(monkeypatch):
    monkeypatch.setattr(sse, "MAX_LINE_BYTES", 100)
    observer = SseObserver()

    for _ in range(50):
        observer.feed(b"x" * 60)
    observer.feed(b"\n\n" + stream(b"\n\n"))

    assert observer.is_done
    assert observer.usage is not None


def test_the_end_is_seen_without_a_space_and_without_a_line_break():
    for tail in (b"data:[DONE]", b"data: [DONE]", b"data: [DONE]\r", b"\r\ndata: [DONE]\n"):
        observer = SseObserver()
        observer.feed(b"data: {}\n" + tail)
        observer.end()
        assert observer.is_done, tail


def test_it_is_known_whether_a_line_is_open():
    observer = SseObserver()
    for data, is_inside in ((b"data: {", True), (b"}", True), (b"\n\n", False), (b"d", True)):
        observer.feed(data)
        assert observer.is_inside_line is is_inside


def test_a_usage_that_is_not_one_is_none():
    for body in (b"", b"[]", b'{"usage": 3}', b"\xff", *IMPOSSIBLE):
        assert read_usage(body) is None
    usage = read_usage(b'{"usage": {"prompt_tokens": 3}}')
    assert usage is not None
    assert usage.cached_tokens is None
    usage = read_usage(
        b'{"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}}'
    )
    assert usage is not None
    assert usage.cached_tokens is None  # more than there was
