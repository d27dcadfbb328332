"""The reader sees the same stream however it is cut, and lets only whole events through."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from roost_router.answer.events import MAX_EVENT_BYTES, Emitted, EventReader
from roost_router.answer.usage import read_usage

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
TEXTS = ("a", '"usage": {', "data: [DONE]", "\n\ndata: [DONE]\n\n", "é")


IMPOSSIBLE = (
    b'{"usage": {"prompt_tokens": "x"}}',
    b'{"usage": {"prompt_tokens": -1}}',
    b'{"usage": {"prompt_tokens": 99999999999}}',
    b'{"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": -1}}}',
)


def chunk(text: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
    return json.dumps({"id": "c1", "choices": choices, "usage": None, **more}).encode()


def stream(separator: bytes, *, done: bool = True) -> bytes:
    payloads = [chunk(text) for text in TEXTS]
    payloads += [chunk(reason="stop"), chunk(choices=[], usage=USAGE)]
    if done:
        payloads.append(b"[DONE]")
    return b"".join(b"data: " + payload + separator for payload in payloads)


def read(*pieces: bytes, reports_ids: bool = False) -> tuple[bytes, Emitted, EventReader]:
    emitted = Emitted()
    reader = EventReader(emitted, reports_ids=reports_ids)
    relayed = b"".join([reader.feed(piece) for piece in pieces])
    return relayed + reader.end(), emitted, reader


@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_cuts_do_not_matter(cuts, separator):
    data, pieces, at = stream(separator), [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut

    relayed, emitted, reader = read(*pieces, data[at:])

    assert relayed.replace(b"\r", b"") == stream(b"\n\n")
    assert emitted.is_done
    assert emitted.is_finished
    assert emitted.text.decode() == "".join(TEXTS)
    assert (emitted.num_tokens, reader.num_events) == (5, 5)
    assert reader.usage is not None
    assert (reader.usage.prompt_tokens, reader.usage.cached_tokens) == (9, 8)


@given(st.integers(1, 300))
def test_only_whole_events_are_relayed(cut):
    data = stream(b"\n\n")

    reader = EventReader(Emitted(), reports_ids=False)
    relayed = reader.feed(data[:cut])

    assert data.startswith(relayed)
    assert relayed == b"" or relayed.endswith(b"\n\n")
    assert data[len(relayed) : cut].find(b"\n\n") < 0


@given(st.lists(st.integers(1, 30), max_size=40))
def test_token_ids_end_here(cuts):
    parts = [(b": roost 1 22\n", "a"), (b"", "b"), (b": roost 333\n", "c")]
    data = b"".join(ids + b"data: " + chunk(text) + b"\n\n" for ids, text in parts)
    data += b": roost 4\n\n"  # tokens whose text is held back
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut

    relayed, emitted, _ = read(*pieces, data[at:], reports_ids=True)

    assert relayed == b"".join(b"data: " + chunk(text) + b"\n\n" for text in "abc")
    assert emitted.ids() == [1, 22, 333, 4]


def test_comments_of_others_pass():
    data = b": keepalive\n\n: roost 1\ndata: " + chunk("a") + b"\n\n"

    relayed, emitted, _ = read(data)

    assert relayed == data
    assert emitted.ids() == []


def test_done_without_a_finish_reason_is_a_fault():
    relayed, emitted, reader = read(b"data: " + chunk("a") + b"\n\ndata: [DONE]\n\n")

    assert relayed == b"data: " + chunk("a") + b"\n\n"
    assert not emitted.is_done
    assert reader.fault is not None


def test_every_choice_needs_its_finish_reason():
    second = {"index": 1, "delta": {"content": "b"}, "finish_reason": None}
    _, emitted, _ = read(
        b"data: " + chunk("a") + b"\n\ndata: " + chunk(choices=[second]) + b"\n\n"
        b"data: " + chunk(reason="stop") + b"\n\n"
    )

    assert not emitted.is_finished


def test_an_error_event_is_a_fault_and_does_not_pass():
    for error in (
        b'data: {"error": {"message": "it broke"}}',
        b'event: error\ndata: {"error":"x"}',
    ):
        relayed, emitted, reader = read(
            b"data: " + chunk("a") + b"\n\n" + error + b"\n\ndata: [DONE]\n\n"
        )

        assert relayed == b"data: " + chunk("a") + b"\n\n"
        assert not emitted.is_done
        assert reader.fault is not None
        assert "reported an error" in reader.fault


def test_what_is_no_completion_chunk_passes_and_cannot_be_resumed():
    data = b'data: {"choices": 3}\n\ndata: what\n\ndata: [DONE]\n\n'

    relayed, emitted, reader = read(data)

    assert relayed == data
    assert emitted.is_done
    assert not emitted.is_understood
    assert reader.num_events == 2


def test_tool_calls_are_progress_but_no_plain_text():
    call = {"index": 0, "delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}
    _, emitted, reader = read(b"data: " + chunk(choices=[call]) + b"\n\n")
    assert not emitted.is_plain_text
    assert reader.num_events == 1

    empty = {"index": 0, "delta": {"content": "", "tool_calls": [], "refusal": None}}
    _, emitted, reader = read(b"data: " + chunk(choices=[empty]) + b"\n\n")
    assert emitted.is_plain_text
    assert reader.num_events == 0


def test_an_endless_event_is_a_fault_and_bounds_memory():
    reader = EventReader(Emitted(), reports_ids=False)

    assert reader.feed(b"x" * MAX_EVENT_BYTES) == b""
    assert reader.fault is None
    for _ in range(50):
        assert reader.feed(b"x" * 60_000) == b""

    assert reader.fault is not None
    assert len(reader._tail) == MAX_EVENT_BYTES + 60_000


def test_nothing_passes_after_done():
    data = stream(b"\n\n")

    relayed, _, _ = read(data + b"data: " + chunk("late") + b"\n\n", b"data: {}\n\n")

    assert relayed == data


def test_the_end_is_seen_without_a_space_and_without_a_blank_line():
    end = b"data: " + chunk(reason="stop") + b"\n\n"
    for tail in (b"data:[DONE]", b"data: [DONE]", b"data: [DONE]\r", b"\r\ndata: [DONE]\n"):
        relayed, emitted, _ = read(end + tail)
        assert emitted.is_done, tail
        assert relayed.endswith(b"data: [DONE]\n\n")


def test_half_an_event_at_the_end_is_dropped():
    for tail in (b": roost 12 34", b'data: {"id":"x', b"data: " + chunk("b")):
        relayed, emitted, _ = read(b"data: " + chunk("a") + b"\n\n" + tail, reports_ids=True)
        assert relayed == b"data: " + chunk("a") + b"\n\n"
        assert emitted.ids() == []


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


def test_blank_lines_between_events_do_not_hide_token_ids():
    one = b": roost 7\ndata: " + chunk("a") + b"\n\n"
    for blank in (b"\n", b"\n\n", b"\r\n\r\n"):
        for pieces in ((one + blank + one,), (one, blank, one), (one, blank + one)):
            relayed, emitted, _ = read(*pieces, reports_ids=True)
            assert emitted.ids() == [7, 7]
            assert relayed == (b"data: " + chunk("a") + b"\n\n") * 2
