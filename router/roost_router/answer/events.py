"""Read a stream of completion chunks as it passes: whole events out, what they say noted. Pure.

    bytes of a leg --feed--> whole events to relay        an incomplete tail is held back
                     └─────> Emitted, finish reasons, usage, [DONE], faults

Only whole events leave, so that a stream which breaks off can be continued: what the client has
ends where an event ends. Replicas write events whole; holding back costs nothing then.

A *fault* is the end of what can be relayed of this leg: an error event, an event without end, or
[DONE] before every choice has its finish_reason. None of it reaches the client; what to do
instead is decided in phases.py.

A stream whose events are not completion chunks is passed on event by event; nothing is known of
it but [DONE], so it cannot be resumed.

Cost: O(bytes) however the stream is cut, and no decoding where an event differs from the one
before in its text only (known_event.py); memory is bounded by one event and by the text emitted.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from roost_router.answer.chunk import Choice, Chunk, Delta, decode_chunk
from roost_router.answer.known_event import KnownEvent
from roost_router.answer.usage import Usage, decode_usage
from roost_wire.resume import COMMENT_PREFIX, read_comment

#: A longer event cuts the leg; it may carry logprobs, hence more than a text needs.
MAX_EVENT_BYTES: Final = 1 << 20

_NOTHING: Final = frozenset({b"", b"null", b"[]", b"{}", b'""'})
_BETWEEN: Final = re.compile(rb"(?:\r?\n){2,}")


class Emitted:
    """What the client has of a streamed answer, over all legs."""

    def __init__(self) -> None:
        self.first_chunk = b""  # JSON of the first chunk: id, created, model
        self.num_tokens = 0  # as reported; where none are, chunks with text are counted
        self.text = bytearray()  # of choice 0, UTF-8
        self.token_ids = bytearray()  # of choice 0, decimal, a space before each
        self.is_plain_text = True  # only text so far: no tool calls, no reasoning
        self.is_understood = True  # every event was a completion chunk
        self.started: set[int] = set()  # choices that began
        self.finished: set[int] = set()  # choices that have their finish_reason
        self.has_usage = False  # the usage chunk was relayed
        self.is_done = False  # [DONE] was relayed

    @property
    def has_begun(self) -> bool:
        """Whether any event but comments was relayed."""
        return bool(self.first_chunk) or not self.is_understood or self.is_done

    @property
    def is_finished(self) -> bool:
        """Whether every choice that began has its finish_reason."""
        return bool(self.finished) and self.started <= self.finished

    def add_ids(self, ids: bytes) -> None:
        """Note reported ids, each with a space before it."""
        if ids:
            self.token_ids += ids
            self.num_tokens += ids.count(b" ")

    def ids(self) -> list[int]:
        """Token ids as the replica reported them. ValueError if they are not to be trusted."""
        return read_comment(COMMENT_PREFIX + bytes(self.token_ids[1:])) if self.token_ids else []


class EventReader:
    """One leg's stream."""

    def __init__(self, emitted: Emitted, *, reports_ids: bool) -> None:
        """`reports_ids`: comments with token ids come (roost_wire/resume.py); they end here."""
        self._emitted = emitted
        self._reports_ids = reports_ids
        self._tail = b""
        self._known = KnownEvent(_only_text)
        self._only_text: str | None = None  # of the last event, if it said nothing else
        self.num_events = 0  # that carried text
        self.usage: Usage | None = None
        self.fault: str | None = None  # why nothing more of this leg is relayed

    def feed(self, data: bytes) -> bytes:
        """The whole events among what has come, as they go to the client."""
        if self.fault is not None or self._emitted.is_done:
            return b""
        if self._tail:
            data = self._tail + data
        elif not self._reports_ids:
            text = self._known.text(data)
            if text is not None:
                self._add_text(text)
                return data
        end = _end_of_events(data)
        self._tail = data[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            self.fault = f"the replica sent an event of more than {MAX_EVENT_BYTES} bytes"
        if not end:
            return b""
        whole = data[:end]
        if whole[0] in b"\r\n":  # blank lines before an event are none
            whole = whole.lstrip(b"\r\n")
            end = len(whole)
            if not end:
                return b""
        if whole.find(b"\n\n") == end - 2 and b"\r" not in whole:  # one event, the usual case
            return self._read_one(whole)
        blocks = [self._read(block) for block in _BETWEEN.split(whole) if block]
        return b"".join(map(_closed, blocks))

    def _read_one(self, whole: bytes) -> bytes:
        """Note what one whole event says; the event as it is relayed."""
        ids, event = b"", whole
        if self._reports_ids and whole.startswith(COMMENT_PREFIX):
            line, _, event = whole.partition(b"\n")
            ids = line[len(COMMENT_PREFIX) - 1 :].rstrip()
        text = self._known.text(event)
        if text is not None:
            self._emitted.add_ids(ids)
            self._add_text(text)
            return event
        block = self._read(whole[:-2])
        if self._only_text is not None:
            self._known.learn(event, self._only_text)
        return whole if block is not None and len(block) == len(whole) - 2 else _closed(block)

    def _add_text(self, text: bytes) -> None:
        """Note what `_note` would of an event that is known."""
        emitted = self._emitted
        self.num_events += 1
        emitted.num_tokens += not self._reports_ids
        emitted.text += text

    def end(self) -> bytes:
        """The stream is over: only [DONE] may lack its blank line.

        Half of any other event cannot be told from a whole one; it is dropped, as the WHATWG's
        specification of server-sent events asks.
        """
        if data_of(self._tail) != b"[DONE]":
            return b""
        self._tail = b"data: [DONE]"
        return self.feed(b"\n\n")

    def _read(self, block: bytes) -> bytes | None:
        """Note what an event says; the event as it is relayed, or None."""
        self._only_text = None
        if self.fault is not None or self._emitted.is_done:
            return None
        ids = b""
        if self._reports_ids and block.startswith(COMMENT_PREFIX):
            line, _, block = block.partition(b"\n")
            ids = line[len(COMMENT_PREFIX) - 1 :].rstrip()
        payload = (
            block[6:] if block.startswith(b"data: ") and b"\n" not in block else data_of(block)
        )
        if payload is None:  # a comment, or another field
            self._emitted.add_ids(ids)
            return block or None
        if payload == b"[DONE]":
            return block if self._may_end() else None
        return block if self._note(payload, ids) else None

    def _may_end(self) -> bool:
        emitted = self._emitted
        if emitted.is_understood and not emitted.is_finished:
            self.fault = "the replica ended the stream without a finish_reason"
            return False
        emitted.is_done = True
        return True

    def _note(self, payload: bytes, ids: bytes) -> bool:
        emitted = self._emitted
        try:
            chunk = decode_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            emitted.is_understood = False
            self.num_events += 1
            return True
        if chunk.error and bytes(chunk.error) not in _NOTHING:
            self.fault = f"the replica reported an error: {_message(chunk.error)}"
            return False
        emitted.add_ids(ids)
        for choice in chunk.choices:
            self._note_choice(choice)
        if emitted.first_chunk:
            self._only_text = _text_of(chunk)
        if not emitted.first_chunk:
            emitted.first_chunk = payload
        if chunk.usage and bytes(chunk.usage) != b"null":
            self.usage = decode_usage(bytes(chunk.usage)) or self.usage
            emitted.has_usage |= not chunk.choices
        return True

    def _note_choice(self, choice: Choice) -> None:
        emitted, text, delta = self._emitted, choice.text, choice.delta
        if delta is not None:
            text = delta.content
            if (
                delta.tool_calls or delta.reasoning_content or delta.reasoning
                or delta.function_call or delta.refusal
            ) and _holds_more(delta):  # fmt: skip
                emitted.is_plain_text = False
                self.num_events += 1
        emitted.started.add(choice.index)
        if text:
            emitted.num_tokens += not self._reports_ids
            self.num_events += 1
            emitted.text += text.encode("utf-8", "surrogatepass")
        if choice.finish_reason is not None:
            emitted.finished.add(choice.index)


def _only_text(event: bytes) -> str | None:
    """What a whole event says if that is only text, else None."""
    if not event.startswith(b"data: ") or not event.endswith(b"\n\n") or b"\n" in event[:-2]:
        return None
    try:
        return _text_of(decode_chunk(event[6:-2]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _text_of(chunk: Chunk) -> str | None:
    """The text of a chunk that holds nothing else, or None."""
    if len(chunk.choices) != 1 or chunk.error or (chunk.usage and bytes(chunk.usage) != b"null"):
        return None
    choice, delta = chunk.choices[0], chunk.choices[0].delta
    if choice.finish_reason is not None or (delta is not None and _holds_more(delta)):
        return None
    return (choice.text if delta is None else delta.content) or None


def data_of(block: bytes) -> bytes | None:
    """The data of an event, its lines joined; None if it has none."""
    lines = [line[5:].removeprefix(b" ") for line in block.splitlines() if line[:5] == b"data:"]
    return b"\n".join(lines).strip() if lines else None


def split_events(whole: bytes) -> list[bytes]:
    """The blocks of whole events, without the blank lines between them."""
    return [block for block in _BETWEEN.split(whole) if block]


def _end_of_events(data: bytes) -> int:
    """Where the last whole event ends; 0 if none does."""
    end = data.rfind(b"\n\n") + 2
    with_returns = data.rfind(b"\n\r\n") + 3
    return max(end if end > 1 else 0, with_returns if with_returns > 2 else 0)


def _closed(block: bytes | None) -> bytes:
    return block + b"\n\n" if block is not None else b""


def _holds_more(delta: Delta) -> bool:
    """Whether a delta holds anything but text."""
    calls = (delta.tool_calls, delta.function_call)
    texts = (delta.refusal, delta.reasoning, delta.reasoning_content)
    return any(bytes(part) not in _NOTHING for part in (*calls, *texts))


def _message(error: msgspec.Raw) -> str:
    """What an error object says, at most 200 characters."""
    try:
        decoded = msgspec.json.decode(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "unreadable"
    message = decoded.get("message") if isinstance(decoded, dict) else decoded
    return str(message)[:200]
