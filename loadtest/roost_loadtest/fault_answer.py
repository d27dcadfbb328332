"""What a client has seen of one streamed answer, and whether that is a whole answer. Pure.

An answer is delivered only if a client that checks nothing gets all of it: status 200, the text
expected, one id, one role, one finish reason, the usage it asked for, [DONE] last. Whatever else
happened has a name:

    refused   no connection
    status    an error instead of an answer
    cut       the connection broke before the end
    silent    a clean end without finish reason or [DONE]: SDKs take it for a success
    error     an error event, then no [DONE]
    error+[DONE]   an error event, then [DONE] as after a success
    hang      nothing for as long as the client waits
    wrong     it looks complete, but it is not what the engine would have said undisturbed

Not here: sockets and clocks (fault_client.py).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec


class Verdict(Enum):
    """How a request ended for its client."""

    OK = "ok"
    REFUSED = "refused"
    STATUS = "status"
    CUT = "cut"
    SILENT = "silent"
    ERROR = "error"
    ERROR_DONE = "error+[DONE]"
    HANG = "hang"
    WRONG = "wrong"
    LEFT = "left"  # the client itself went away


class Ending(Enum):
    """How the connection behaved at the end."""

    COMPLETE = "complete"  # the message's framing ended as it should
    BROKEN = "broken"  # reset, or closed inside the message
    REFUSED = "refused"
    SILENCE = "silence"  # the client stopped waiting
    LEFT = "left"


class Expected(msgspec.Struct, frozen=True):
    """The undisturbed answer."""

    text: str
    finish_reason: str
    completion_tokens: int | None = None  # None: the engine may count another way
    prompt_tokens: int | None = None  # None: usage may be missing, too


class _Delta(msgspec.Struct):
    content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed; 0 where the server does not tell."""
        details = self.prompt_tokens_details
        return details.cached_tokens if details else 0


class _Event(msgspec.Struct):
    id: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class Answer:
    """Reads a body of server-sent events as it comes."""

    def __init__(self) -> None:
        self.status = 0  # 0: no head yet
        self.ids: set[str] = set()
        self.num_roles = 0
        self.finish_reasons: list[str] = []
        self.usages: list[_Usage] = []
        self.num_done = 0
        self.num_after_done = 0
        self.error: str | None = None
        self.arrivals: list[float] = []  # of events with text
        self.num_events = 0
        self._pieces: list[str] = []
        self._open_line = b""
        self._is_broken_json = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    def feed(self, data: bytes, now: float) -> int:
        """More of the body; the number of events in it. Cost: O(bytes)."""
        *lines, self._open_line = (self._open_line + data).split(b"\n")
        before = self.num_events
        for line in lines:
            if line.startswith(b"data:"):
                self.num_events += 1
                self._event(line[5:].strip(), now)
        return self.num_events - before

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.num_done += 1
            return
        self.num_after_done += self.num_done
        try:
            event = _decoder.decode(payload)
        except msgspec.MsgspecError:
            self._is_broken_json = True
            return
        if event.error is not None:
            self.error = str(event.error)
            return
        if event.id is not None:
            self.ids.add(event.id)
        if event.usage is not None:
            self.usages.append(event.usage)
        for choice in event.choices:
            self.num_roles += choice.delta.role is not None
            if choice.finish_reason is not None:
                self.finish_reasons.append(choice.finish_reason)
            if piece := choice.delta.content or choice.text:
                self._pieces.append(piece)
                self.arrivals.append(now)

    def judge(self, ending: Ending, expected: Expected | None) -> tuple[Verdict, str]:
        """The verdict and, where it needs one, a detail."""
        if ending in _WITHOUT_LOOKING:
            return _WITHOUT_LOOKING[ending], ""
        if self.status not in {0, 200}:
            return Verdict.STATUS, str(self.status)
        if self.error is not None:
            return (Verdict.ERROR_DONE if self.num_done else Verdict.ERROR), self.error
        if ending is Ending.SILENCE:
            return Verdict.HANG, f"after {len(self.arrivals)} events"
        if not (self.num_done and self.finish_reasons):
            if ending is Ending.BROKEN:
                return Verdict.CUT, f"after {len(self.arrivals)} events"
            return Verdict.SILENT, "with [DONE]" if self.num_done else ""
        flaw = None if expected is None else self._flaw(expected)
        return (Verdict.OK, "") if flaw is None else (Verdict.WRONG, flaw)

    def _flaw(self, expected: Expected) -> str | None:
        """What differs from the undisturbed answer, or None."""
        if self.text != expected.text:
            return _difference(self.text, expected.text)
        usage = self.usages[-1] if self.usages else _Usage()
        found = {
            "ids": (len(self.ids), 1),
            "roles": (self.num_roles, 1),
            "finish reasons": (self.finish_reasons, [expected.finish_reason]),
            "[DONE]s": (self.num_done, 1),
            "events after [DONE]": (self.num_after_done, 0),
            "usages": (len(self.usages), 1 if expected.prompt_tokens is not None else None),
            "unreadable events": (self._is_broken_json, False),
            "completion tokens": (usage.completion_tokens, expected.completion_tokens),
            "prompt tokens": (usage.prompt_tokens, expected.prompt_tokens),
        }
        for name, (seen, wanted) in found.items():
            if wanted is not None and seen != wanted:
                return f"{name}: {seen}, not {wanted}"
        return None


_WITHOUT_LOOKING = {Ending.REFUSED: Verdict.REFUSED, Ending.LEFT: Verdict.LEFT}


def _difference(seen: str, wanted: str) -> str:
    """Where two texts part."""
    pairs = zip(seen, wanted, strict=False)
    shorter = min(len(seen), len(wanted))
    at = next((n for n, (left, right) in enumerate(pairs) if left != right), shorter)
    return f"text differs at {at}: {seen[at : at + 30]!r}, not {wanted[at : at + 30]!r}"
