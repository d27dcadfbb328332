"""The state machine of an answer: phases, and what to do when a replica is lost in each. Pure.

    phase        of the client's answer                a leg lost, stalled or refused means
    WAITING      nothing sent to a replica             AGAIN on another replica, inside the
    SENT         sent, no byte came back               attempts, the retry budget and the
    HEAD         status known, nothing forwarded       deadline; else FAIL
    STREAMING    events forwarded, not finished        RESUME elsewhere; else CUT
    FINISHED     every finish_reason forwarded         COMPLETE: what is missing is made up
    RELAYING     part of a whole answer forwarded      CUT
    OVER

A *leg* is one attempt on one replica. A stream is forwarded event by event; its head waits for
its first event, so until then a lost replica costs nothing. A whole (non-streamed) answer is
held until complete, since no client can use half of it; one over MAX_HELD_BYTES is relayed. A
status that another replica may do better (429, 500, 502, 503, 504) is a loss; if nobody is left
who could, the client gets that answer.

A stream that ends without a finish_reason is a lost replica, never a success.

Source: phases and actions as facts/reliability.md §1.3 asks. The shell (http/exchange.py) does
what the verdicts say and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from roost_router.answer.events import Emitted, EventReader
from roost_router.answer.resume import (
    EXACT_DIALECT,
    TEXT_DIALECTS,
    Asked,
    CannotResumeError,
    Continuation,
    closing_events,
    exact_body,
    read_asked,
    text_body,
)
from roost_router.answer.usage import Usage, read_usage

#: A non-streamed answer up to this size is held until it is complete.
MAX_HELD_BYTES: Final = 4 << 20

#: Comments held back until the first event; more are a way to stay alive, not an answer.
_MAX_COMMENT_BYTES: Final = 4 << 10

_RETRYABLE: Final = frozenset({429, 500, 502, 503, 504})


class Phase(Enum):
    """How far the client's answer is."""

    WAITING = 0
    SENT = 1
    HEAD = 2
    STREAMING = 3
    FINISHED = 4
    RELAYING = 5
    OVER = 6


#: A tuple, for it is asked on every request: its members are compared by identity, not hashed.
_NOTHING_FORWARDED: Final = (Phase.WAITING, Phase.SENT, Phase.HEAD)


#: Of an answer that is no stream; nothing is ever added to it.
_NOTHING_EMITTED: Final = Emitted()


class Verdict(Enum):
    """What the shell is to do now."""

    AGAIN = "again"  # place the request on another replica
    RESUME = "resume"  # place the rest of it on another replica
    COMPLETE = "complete"  # write `closing` and end the answer well
    WHOLE = "whole"  # write the held answer
    FAIL = "fail"  # answer an error
    CUT = "cut"  # tell the client that the rest will not come


class Allowance(Protocol):
    """Who else has a say in a retry: the model's retry budget (fleet/retry_budget.py)."""

    def try_withdraw(self, now: float) -> bool:
        """Take one retry out of the budget, if there is one."""
        ...


class Limits(Protocol):
    """How often a request is tried (RouterConfig)."""

    @property
    def max_attempts(self) -> int:
        """Legs before the first forwarded byte."""
        ...

    @property
    def max_resumes(self) -> int:
        """Legs after it."""
        ...


class Answer:
    """One request's answer over all its legs."""

    # What a fresh answer has; a default of the class costs nothing for each request.
    phase = Phase.WAITING
    num_attempts = 0
    num_resumes = 0
    prompt_tokens: int | None = None  # as the first leg told
    cached_tokens: int | None = None
    reason = ""  # of the last loss, for people
    budget_is_spent = False  # that is why no retry was made
    _emitted = _NOTHING_EMITTED  # a stream has its own, from its head on
    _seed: int | None = None  # while every leg reports its token ids
    _asked: Asked | None = None
    # of the present leg:
    status = 0
    reader: EventReader | None = None
    _held_bytes = 0
    _comments = b""  # that came before the first event
    _continuation: Continuation | None = None

    def __init__(self, body: bytes, limits: Limits, budget: Allowance, deadline: float) -> None:
        """`deadline`: seconds, monotonic; no leg begins after it."""
        self.held: list[bytes] = []  # of an answer that is no stream; of the present leg
        self._body = body
        self._limits = limits
        self._budget = budget
        self.deadline = deadline

    def _clear_leg(self) -> None:
        self.status = 0
        self.reader = self._continuation = None
        self.held.clear()
        self._held_bytes = 0
        self._comments = b""

    # a leg's life

    def begin(self) -> None:
        """A leg was sent."""
        if self.num_attempts:
            self._clear_leg()
        self.num_attempts += 1
        if self.phase in _NOTHING_FORWARDED:
            self.phase = Phase.SENT

    def head(self, status: int, *, is_stream: bool, seed: int | None) -> None:
        """Status and kind of the leg's answer. `seed`: the replica reports token ids."""
        self.status = status
        is_later = self.phase is Phase.STREAMING
        if self.phase is Phase.SENT:
            self.phase = Phase.HEAD
        if status != 200 or not is_stream:
            return
        if is_later:
            is_exact = self._seed is not None and seed is not None
            self._continuation = Continuation(
                self._emitted, is_exact=is_exact, cached_tokens=self.cached_tokens
            )
            self._seed = seed if is_exact else None
        else:
            self._emitted = Emitted()
            self._seed = seed
        self.reader = EventReader(self._emitted, reports_ids=seed is not None)

    def body(self, data: bytes) -> bytes:
        """More of the leg's answer; what of it goes to the client now."""
        if self.reader is not None:
            events = self.reader.feed(data)
            if self.phase is Phase.STREAMING and self._continuation is None:
                return events
            return self._forward(events)
        if self.phase is Phase.RELAYING:
            return data
        self.held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes <= MAX_HELD_BYTES or self.phase is not Phase.HEAD:
            return b""
        self.phase = Phase.RELAYING
        data = b"".join(self.held)
        self.held.clear()
        return data

    def whole(self, body: bytes) -> Usage | None:
        """`head`, `body` and `end` of a 200 that is no stream and came at once, while SENT.

        It is to be written as it came; returns what it says of its cost.
        """
        self.status = 200
        self.phase = Phase.HEAD
        return read_usage(body)

    @property
    def fault(self) -> str | None:
        """Why the leg is as good as lost, though its connection is not."""
        return self.reader.fault if self.reader is not None else None

    @property
    def is_done(self) -> bool:
        """Whether [DONE] was forwarded: all that counts has come."""
        return self._emitted.is_done

    @property
    def usage(self) -> Usage | None:
        """What the leg said of its cost."""
        if self.reader is not None:
            return self.reader.usage
        return read_usage(b"".join(self.held)) if self.status == 200 else None

    def end(self, now: float, has_others: Callable[[], bool]) -> tuple[Verdict, bytes]:
        """The leg's answer is complete, as HTTP goes; a verdict, and bytes to forward first.

        `has_others`: whether a replica is left that was not asked yet; the same replica would
        answer the same.
        """
        if self.reader is not None:
            rest = self._forward(self.reader.end())
            if self.is_done:
                return Verdict.COMPLETE, rest
            reason = self.fault or "the replica ended the stream before it was complete"
            return self.lost(reason, now), rest
        if self.phase is Phase.RELAYING:
            return Verdict.COMPLETE, b""
        if self.phase is Phase.STREAMING:
            return self.lost(f"the replica answered {self.status} to a resumed stream", now), b""
        if self.status in _RETRYABLE and has_others() and self._may_try(now):
            self.reason = f"the replica answered {self.status}"
            return Verdict.AGAIN, b""
        return Verdict.WHOLE, b""

    def lost(self, reason: str, now: float) -> Verdict:
        """The leg broke off, stalled, or went wrong."""
        self.reason = reason
        if self.is_done:
            return Verdict.COMPLETE
        if self.phase is Phase.STREAMING and self._is_finished():
            self.phase = Phase.FINISHED
            return Verdict.COMPLETE
        if self.phase is Phase.STREAMING:
            return Verdict.RESUME if self._may_resume(now) else Verdict.CUT
        if self.phase is Phase.RELAYING:
            return Verdict.CUT
        return Verdict.AGAIN if self._may_try(now) else Verdict.FAIL

    # what the verdicts need

    def dialects(self) -> tuple[frozenset[str] | None, ...]:
        """Kinds of servers that could continue, best first; None: any."""
        by_text: tuple[frozenset[str] | None, ...] = (TEXT_DIALECTS,)
        if self.asked().has_text_prompt:  # any server goes on from a longer prompt
            by_text = (TEXT_DIALECTS, None)
        if self._seed is not None:
            return frozenset({EXACT_DIALECT}), *by_text
        is_empty = not self._emitted.text and self._emitted.is_plain_text
        return (None,) if is_empty else by_text

    def next_body(self, dialect: str) -> bytes | None:
        """The body of the next leg on a replica of `dialect` (its `owned_by`).

        None: nothing is left to generate, the answer is to be completed. CannotResumeError.
        """
        if self.phase is not Phase.STREAMING:
            return self._body
        asked = self.asked()
        if asked.num_choices > 1:
            raise CannotResumeError("an answer of several choices cannot be continued")
        if self._seed is not None and dialect == EXACT_DIALECT:
            return exact_body(self._body, self._emitted, self._seed)
        if not self._emitted.text and self._emitted.is_plain_text:
            return self._body  # only the role was sent
        if dialect not in TEXT_DIALECTS and not asked.has_text_prompt:
            raise CannotResumeError(f"a server of '{dialect or 'unknown'}' cannot continue a text")
        if asked.max_tokens is not None and asked.max_tokens <= self._emitted.num_tokens:
            return None
        return text_body(asked, self._emitted)

    def closing(self, *, is_exhausted: bool = False) -> bytes:
        """The events that a finished stream still lacks; nothing if it lacks none."""
        if self.reader is None or self.is_done:
            return b""
        reason = "length" if is_exhausted else None
        return closing_events(
            self._emitted, self.asked(), self.prompt_tokens, self.cached_tokens,
            is_counted=self._seed is not None,
            finish_reason=reason,
        )  # fmt: skip

    def asked(self) -> Asked:
        """What the body asked for; decoded once, and only where it is needed."""
        if self._asked is None:
            self._asked = read_asked(self._body)
        return self._asked

    def _forward(self, events: bytes) -> bytes:
        if not events:
            return events
        if self._continuation is not None:
            return self._continuation.rewrite(events)
        if self.phase is Phase.HEAD:
            if not self._emitted.has_begun:  # comments only: no reason to be bound to this leg
                self._comments += events
                if len(self._comments) > _MAX_COMMENT_BYTES:
                    self._comments = b""
                return b""
            self.phase = Phase.STREAMING
            events = self._comments + events
        return events

    def _is_finished(self) -> bool:
        emitted = self._emitted
        return emitted.is_finished and len(emitted.finished) >= self.asked().num_choices

    def _may_resume(self, now: float) -> bool:
        if self.num_resumes >= self._limits.max_resumes or now >= self.deadline:
            return False
        self.num_resumes += 1
        return True

    def _may_try(self, now: float) -> bool:
        if self.num_attempts >= self._limits.max_attempts or now >= self.deadline:
            return False
        self.budget_is_spent = not self._budget.try_withdraw(now)
        return not self.budget_is_spent
