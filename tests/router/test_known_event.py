"""Events known by the bytes around their text: read as if each had been decoded."""

from __future__ import annotations

from random import Random

import pytest

from roost_router.answer import events as events_module
from roost_router.answer import known_event
from roost_router.answer.events import Emitted, EventReader
from roost_router.answer.known_event import KnownEvent

CHAT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":%b},"finish_reason":null}]}\n\n'
TEXTS = [
    b"word ", b"a", b"", b'a \\" quote',
    b"\\u00e9", "é".encode(), b"\xff", b"tab\\t", b"}", b"data: x",
]  # fmt: skip


class NeverKnown(KnownEvent):
    """Decodes all."""

    def text(self, event: bytes) -> None: ...


def said(reader: EventReader, emitted: Emitted) -> tuple[object, ...]:
    return (
        reader.num_events, reader.fault, emitted.num_tokens, bytes(emitted.text),
        bytes(emitted.token_ids), emitted.started, emitted.finished, emitted.first_chunk,
        emitted.is_done, emitted.is_understood, emitted.is_plain_text,
    )  # fmt: skip


def read(events: list[bytes], *, reports_ids: bool = False) -> tuple[bytes, tuple[object, ...]]:
    emitted = Emitted()
    reader = EventReader(emitted, reports_ids=reports_ids)
    relayed = b"".join([reader.feed(event) for event in events] + [reader.end()])
    return relayed, said(reader, emitted)


def decode_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roost_router.answer.events.KnownEvent", NeverKnown)


@pytest.mark.interpreted
def test_a_repeating_event_is_known_after_two_and_decoded_no_more(monkeypatch):
    decoded = []

    def decode(payload: bytes) -> object:
        decoded.append(payload)
        return original(payload)

    original = events_module.decode_chunk
    monkeypatch.setattr("roost_router.answer.events.decode_chunk", decode)
    relayed, (num_events, _, num_tokens, text, *_) = read([CHAT % b'"word "'] * 50)
    assert relayed == CHAT % b'"word "' * 50
    assert (num_events, num_tokens, text) == (50, 50, b"word " * 50)
    assert len(decoded) < 10


@pytest.mark.parametrize("reports_ids", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_streams_say_the_same_as_if_all_were_decoded(monkeypatch, seed, reports_ids):
    rng = Random(seed)
    shapes = [
        CHAT,
        b'data: {"choices":[{"index":1,"text":%b,"finish_reason":null}]}\n\n',
        b'data: {"x":{"content":"word "},"choices":[{"index":0,"delta":{"content":%b}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":%b,"refusal":"no"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":%b}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"delta":{"content":%b},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"b","content":%b}}]}\n\n',
    ]
    events = []
    for shape in rng.choices(shapes, k=6):
        for _ in range(rng.randrange(6)):
            ids = b": roost %d\n" % rng.randrange(99) if reports_ids and rng.random() < 0.8 else b""
            events.append(ids + shape % (b'"%b"' % rng.choice(TEXTS)))
    events.append(b"data: [DONE]\n\n")
    known = read(events, reports_ids=reports_ids)
    decode_all(monkeypatch)
    assert known == read(events, reports_ids=reports_ids)


def test_a_text_that_stands_elsewhere_as_well_is_not_taken_for_the_answers():
    """The first `"word "` belongs to a field that nobody reads."""
    event = b'data: {"x":"word ","choices":[{"index":0,"delta":{"content":"wor\\u0064 "}}]}\n\n'
    other = event.replace(b'"x":"word "', b'"x":"evil"')
    _, (_, _, _, text, *_) = read([event] * 5 + [other])
    assert text == b"word " * 6


def test_events_that_always_differ_are_tried_a_few_times_only():
    known = KnownEvent(lambda _: None)
    calls = []
    known._read = calls.append  # type: ignore[assignment, return-value]
    for number in range(50):
        for _ in range(2):
            known.learn(b'{"n":%d,"content":"a"}' % number, "a")
    assert len(calls) == known_event._MAX_TRIES
