"""Whether what a client got is right: the promises of a stream, checked event by event.

    id          the same in all chunks
    role        once, in a chat's first chunk
    text        at all times a beginning of the undisturbed answer; at the end all of it
    finish      one finish_reason a choice, the right one; [DONE] after it, nothing after [DONE]
    usage       once if asked for, else never; the undisturbed answer's figures
    error       one event, then no [DONE] and no proper end

`Judge` collects what is wrong in `faults`; what it got is in `outcome`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any
from zlib import crc32

import msgspec

from roost_loadtest.simulation.language import Answer, num_prompt_tokens


class Outcome(Enum):
    """How a request ended, as its client saw it."""

    OK = "ok"
    ERROR = "error"  # a whole answer that says no
    LOST = "lost"  # an error event, and the connection cut
    CUT = "cut"  # the connection gone, and no word about it
    GONE = "gone"  # the client left
    BEHIND = "behind one that was cut"  # pipelined, never answered
    UNREACHED = "unreached"  # the router does not accept connections


class Ask(msgspec.Struct, kw_only=True):
    """One request that a client is to make."""

    number: int
    is_chat: bool = True
    stream: bool = True
    include_usage: bool = False
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    text: str = ""
    is_spaced: bool = False
    request_id: str | None = None
    timeout_s: float | None = None  # told to the router
    #: Leaves after so many seconds or body bytes, whichever is first; by an RST or a FIN.
    leaves_after_s: float | None = None
    leaves_after_bytes: int | None = None
    leaves_by_reset: bool = False

    @property
    def leaves(self) -> bool:
        """Whether the client may leave before the end."""
        return self.leaves_after_s is not None or self.leaves_after_bytes is not None

    @property
    def prompt(self) -> bytes:
        """What identifies the prompt to the model (language.py)."""
        return msgspec.json.encode(self._messages()) if self.is_chat else self._text().encode()

    def path(self) -> bytes:
        """Where it is sent."""
        return b"/v1/chat/completions" if self.is_chat else b"/v1/completions"

    def body(self) -> bytes:
        """The request's body."""
        fields: dict[str, Any] = {"model": "sim"}
        if self.is_chat:
            fields["messages"] = self._messages()
        else:
            fields["prompt"] = self._text() + "|>"
        if self.stream:
            fields["stream"] = True
            if self.include_usage:
                fields["stream_options"] = {"include_usage": True}
        for name in ("max_tokens", "seed"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if self.n != 1:
            fields["n"] = self.n
        encoded = msgspec.json.encode(fields)
        return msgspec.json.format(encoded, indent=2) + b"\n" if self.is_spaced else encoded

    def _text(self) -> str:
        return f"{self.text}#{self.number}#"

    def _messages(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": self.text},
            {"role": "user", "content": f"#{self.number}#"},
        ]


class Judge:
    """Reads one answer."""

    def __init__(
        self, ask: Ask, answers: Callable[[], list[Answer]], *, is_counted: bool = True
    ) -> None:
        """`is_counted`: every usage must be exact; a foreign engine that breaks off tells none."""
        self._ask = ask
        self._is_counted = is_counted
        self._answers = answers  # the undisturbed ones: one for each seed that was drawn
        self._rest = b""
        self._ids: set[str] = set()
        self._texts = [""] * ask.n
        self._reasons: list[str | None] = [None] * ask.n
        self._roles = [0] * ask.n
        self._num_usages = 0
        self._is_done = False
        self._error: dict[str, Any] | None = None
        self._status = 0
        self._is_stream = False
        self._whole: list[bytes] = []
        self.num_events = 0
        self.num_bytes = 0
        self.checksum = 0  # of the body's bytes, so that a log tells runs apart
        self.faults: list[str] = []

    @property
    def status(self) -> int:
        """Of the head; 0 before it."""
        return self._status

    @property
    def has_error_event(self) -> bool:
        """Whether the stream told of its end."""
        return self._error is not None

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The answer's head."""
        self._status = status
        self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if status == 200 and self._is_stream != self._ask.stream:
            self._fault("the answer is of the other kind")
        if b"x-roost-request-id" in headers:
            self._fault("an internal header came through")

    def body(self, data: bytes) -> None:
        """Some of the body."""
        self.num_bytes += len(data)
        self.checksum = crc32(data, self.checksum)
        if not self._is_stream:
            self._whole.append(data)
            return
        if self._is_done or self._error is not None:
            self._fault(f"bytes after the end: {data[:60]!r}")
        self._rest += data
        while True:
            event, found, rest = self._rest.partition(b"\n\n")
            other, crlf, after = self._rest.partition(b"\r\n\r\n")
            if crlf and len(other) < len(event):
                event, found, rest = other, crlf, after
            if not found:
                return
            self._rest = rest
            self._event(event)

    def end(self, *, is_proper: bool) -> Outcome:
        """The answer is over; `is_proper`: by HTTP's rules it is complete."""
        if self._status != 200:
            return self._end_of_error(is_proper=is_proper)
        if not is_proper:
            if self._is_done and not self._ask.leaves:
                self._fault("cut after [DONE]")
            return Outcome.LOST if self._error is not None else Outcome.CUT
        if self._error is not None:
            self._fault("a proper end after an error event")
        if not self._is_stream:
            self._read_whole()
        elif not self._is_done:
            self._fault("the stream ends without [DONE], as if all was well")
        elif self._rest:
            self._fault(f"half an event at the end: {self._rest[:60]!r}")
        self._compare()
        return Outcome.OK

    # the parts

    def _fault(self, text: str) -> None:
        self.faults.append(text)

    def _event(self, event: bytes) -> None:
        data = self._data_of(event)
        if data is None:
            return
        self.num_events += 1
        if self._is_done or self._error is not None:
            self._fault(f"an event after the end: {data[:60]!r}")
        if data == b"[DONE]":
            self._is_done = True
            if None in self._reasons:
                self._fault("[DONE] without finish_reason")
            return
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError:
            self._fault(f"an event that is not JSON: {data[:80]!r}")
            return
        if "error" in chunk:
            self._error = chunk["error"]
            if chunk["error"].get("code") != "upstream_lost":
                self._fault(f"an error event that is not the router's: {data[:200]!r}")
            return
        self._chunk(chunk)

    def _data_of(self, event: bytes) -> bytes | None:
        """The data of an event; None for a comment."""
        data = None
        for line in event.replace(b"\r\n", b"\n").split(b"\n"):
            if line.startswith(b": roost"):
                self._fault("token ids came through to the client")
            elif line.startswith(b"data:"):
                if data is not None:
                    self._fault("two data lines in an event")
                data = line[5:].strip()
            elif line and not line.startswith((b":", b"event:")):
                self._fault(f"not a line of an event stream: {line[:60]!r}")
        return data

    def _chunk(self, chunk: dict[str, Any]) -> None:
        self._ids.add(chunk["id"])
        if len(self._ids) > 1:
            self._fault(f"several ids: {sorted(self._ids)}")
        if chunk.get("usage") is not None:
            self._usage(chunk["usage"])
            if None in self._reasons:
                self._fault("usage before finish_reason")
        for choice in chunk["choices"]:
            self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        if self._ask.is_chat:
            delta = choice.get("delta", {})
            text = delta.get("content") or ""
            if "role" in delta:
                self._roles[index] += 1
                if self._roles[index] > 1:
                    self._fault("a second role chunk")
                if self._texts[index]:
                    self._fault("role after text")
            elif not self._roles[index]:
                self._fault("no role chunk at the start")
        else:
            text = choice.get("text") or ""
        if self._reasons[index] is not None:
            self._fault("a chunk after finish_reason")
        self._texts[index] += text
        self._reasons[index] = choice.get("finish_reason")
        if text and not any(a.text.startswith(self._texts[index]) for a in self._answers()):
            self._fault(f"text that was never said: {self._texts[index][-60:]!r}")

    def _usage(self, usage: dict[str, Any]) -> None:
        self._num_usages += 1
        if self._ask.stream and not self._ask.include_usage:
            self._fault("usage that nobody asked for")
        if self._num_usages > 1:
            self._fault("a second usage")
        if not self._is_counted:
            return
        prompt = num_prompt_tokens(self._ask.prompt)
        counts = {len(a.token_ids) * self._ask.n for a in self._answers()}
        if usage["prompt_tokens"] != prompt or usage["completion_tokens"] not in counts:
            self._fault(f"usage {usage}, expected {prompt} and one of {sorted(counts)}")
        elif usage["total_tokens"] != prompt + usage["completion_tokens"]:
            self._fault(f"usage that does not add up: {usage}")

    def _read_whole(self) -> None:
        try:
            answer = msgspec.json.decode(b"".join(self._whole))
        except msgspec.DecodeError:
            self._fault("a whole answer that is not JSON")
            return
        for choice in answer["choices"]:
            said = choice["message"]["content"] if self._ask.is_chat else choice["text"]
            self._texts[choice["index"]] = said
            self._reasons[choice["index"]] = choice["finish_reason"]
        self._usage(answer["usage"])

    def _compare(self) -> None:
        """The whole answer is the undisturbed one."""
        for text, reason in zip(self._texts, self._reasons, strict=True):
            if not any(a.text == text and a.finish_reason == reason for a in self._answers()):
                self._fault(f"not the answer: {text[-60:]!r}, {reason}")
        is_expected = self._ask.include_usage and self._ask.stream and self._is_counted
        if is_expected and not self._num_usages:
            self._fault("no usage, though asked for")

    def _end_of_error(self, *, is_proper: bool) -> Outcome:
        if not is_proper:
            return Outcome.CUT
        try:
            error = msgspec.json.decode(b"".join(self._whole))["error"]
            assert isinstance(error["message"], str)
            assert "code" in error
        except (msgspec.DecodeError, KeyError, TypeError, AssertionError):
            self._fault(f"an error that is not OpenAI's: {b''.join(self._whole)[:80]!r}")
        return Outcome.ERROR
