"""A simulated replica: an OpenAI-shaped server whose model is language.py.

Two dialects. A *roost* replica tells the ids of its tokens to whoever asks and continues from
them (roost_wire/resume.py is written here a second time, on purpose: if the two disagree, runs
fail). A *vllm* replica tells none; it continues an assistant's message that is not finished, or a
prompt with more text. How answers are laid out (spaces, line ends, where chunks are cut) differs
from replica to replica, since the router must not care.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import httptools
import msgspec

from roost_loadtest.simulation.faults import BAD_HEADS, OF_HOST, Fault, Kind
from roost_loadtest.simulation.language import Answer, answer, num_prompt_tokens, position_of
from roost_loadtest.simulation.loop import VirtualLoop
from roost_loadtest.simulation.network import Host, SimTransport

MODEL = "sim"
#: What every prompt holds, and what ends the prompt of a completion: text after it is an answer's.
REQUEST_NUMBER = re.compile(rb"#(\d+)#")
END_OF_PROMPT = "|>"

#: Faults that an answer of known length has not: it breaks off instead.
_OF_STREAMS = frozenset({Kind.CLEAN_END, Kind.DONE_EARLY, Kind.ERROR_EVENT, Kind.BAD_CHUNK})
#: Seconds after the part before; bytes on the wire, or something that happens.
Part = tuple[float, bytes | Callable[[], None]]


class Leg(msgspec.Struct, kw_only=True):
    """What one replica did for one request: an entry of the ledger."""

    number: int  # of the request, from its prompt
    request_id: str
    replica: str
    at: float  # seconds
    seed: int | None = None
    resumed_from: int = 0  # tokens
    aborted_at: float | None = None  # the connection went while it was working
    ended_at: float | None = None
    #: On a kept connection, which ended without a byte: the router cannot tell this from a
    #: connection that was closed before the request came, and sends it once more.
    looks_stale: bool = False


class Body(msgspec.Struct):
    """What a replica reads of a request."""

    model: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    roost_resume: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Style(msgspec.Struct, frozen=True):
    """How a replica writes."""

    dialect: str = "roost"
    is_spaced: bool = False  # json.dumps' way, with spaces and \u escapes
    line_end: bytes = b"\n"
    tells_prompt_tokens: bool = True
    finish_with_text: bool = False  # the last text and finish_reason in one event
    num_tokens_a_step: int = 1
    cut_share: float = 0.1  # of chunks that are cut at another place than an event's end
    merge_share: float = 0.1  # of events that travel with the next
    says_keepalive: bool = False
    idle_close_s: float | None = None

    @staticmethod
    def drawn(rng: Random, dialect: str) -> Style:
        """Any style of `dialect`."""
        return Style(
            dialect=dialect,
            is_spaced=rng.random() < 0.3,
            line_end=b"\r\n" if dialect != "roost" and rng.random() < 0.2 else b"\n",
            tells_prompt_tokens=dialect == "roost",
            finish_with_text=dialect != "roost" and rng.random() < 0.4,
            num_tokens_a_step=rng.choice((1, 1, 2, 3)) if dialect == "roost" else 1,
            cut_share=rng.choice((0.0, 0.1, 0.6)),
            merge_share=rng.choice((0.0, 0.1, 0.6)),
            says_keepalive=rng.random() < 0.2,
        )


class Pace(msgspec.Struct, frozen=True):
    """How fast a replica is, in seconds."""

    ttft_s: float = 0.03
    itl_s: float = 0.01


class SimReplica:
    """One replica: a host, a style, a pace, and what will go wrong."""

    def __init__(
        self,
        host: Host,
        loop: VirtualLoop,
        rng: Random,
        *,
        style: Style,
        pace: Pace,
        next_fault: Callable[[Body, float], Fault],
        ledger: dict[int, list[Leg]],
        log: Callable[..., None],
    ) -> None:
        self.host = host
        self.loop = loop
        self.rng = rng
        self.style = style
        self.pace = pace
        self.next_fault = next_fault
        self.ledger = ledger
        self.log = log
        self.complaints: list[str] = []  # requests that no correct router sends
        self.connections: dict[ReplicaConnection, None] = {}
        self.num_answers = 0
        self.was_struck = False  # by a fault of its whole host
        self.started_at = 1.0
        self.start()

    @property
    def name(self) -> str:
        """Its host's."""
        return self.host.name

    @property
    def num_working(self) -> int:
        """Requests being computed."""
        return sum(connection.leg is not None for connection in self.connections)

    def start(self) -> None:
        """Listen."""
        self.host.listener = lambda: ReplicaConnection(self)

    def restart(self) -> None:
        """A new process at the same address."""
        self.started_at += 1.0
        self.log(self.name, "restarts")
        self.start()

    def strike(self, fault: Fault) -> None:
        """A fault of the whole host."""
        self.log(self.name, fault.kind.value, round(fault.duration_s, 3))
        self.was_struck = True
        if fault.kind is Kind.FREEZE:
            self.host.freeze()
            heal = self.host.thaw
        elif fault.kind is Kind.VANISH:
            self.host.disconnect()
            heal = self.host.reconnect
        else:
            self.host.kill()
            heal = self.restart
        self.loop.at(self.loop.time() + fault.duration_s, self._heal, heal)

    def _heal(self, heal: Callable[[], None]) -> None:
        self.log(self.name, "heals")
        heal()


class ReplicaConnection(asyncio.Protocol):
    """A connection that the router opened."""

    def __init__(self, replica: SimReplica) -> None:
        self._replica = replica
        self._parser = httptools.HttpRequestParser(self)
        self._transport: SimTransport
        self._headers: dict[bytes, bytes] = {}
        self._body = b""
        self._target = b""
        self._is_dead = False
        self._is_paused = False
        self._waiting: Callable[[], None] | None = None  # for the buffer to have room
        self._num_served = 0
        self._has_answered = False  # a byte of the present answer was sent
        self.leg: Leg | None = None  # being computed

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the router connected."""
        assert isinstance(transport, SimTransport)
        self._transport = transport
        self._replica.connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the router is gone; whatever was being computed stops."""
        self.process_died()
        if self.leg is not None:
            self._replica.log(self._replica.name, "abort of", self.leg.number, str(exc))

    def process_died(self) -> None:
        """The host was killed."""
        self._is_dead = True
        self._replica.connections.pop(self, None)
        if self.leg is not None and self.leg.ended_at is None:
            self.leg.aborted_at = self.leg.ended_at = self._replica.loop.time()
            self.leg.looks_stale = self._num_served > 1 and not self._has_answered

    def pause_writing(self) -> None:
        """asyncio: the router does not read."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """asyncio: it reads again."""
        self._is_paused = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes of a request."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._replica.complaints.append(f"{self._replica.name} got no HTTP: {error!r}")
            self._transport.close()

    # llhttp's side

    def on_message_begin(self) -> None:
        """llhttp: a request begins."""
        self._headers, self._body, self._target = {}, b"", b""
        if self.leg is not None:
            self._replica.complaints.append("a request while another is being answered")

    def on_url(self, url: bytes) -> None:
        """llhttp: the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header."""
        self._headers[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        """llhttp: some of the body."""
        self._body += data

    def on_message_complete(self) -> None:
        """llhttp: the request is complete."""
        replica = self._replica
        body = msgspec.json.decode(self._body, type=Body)
        found = REQUEST_NUMBER.search(self._body)
        if found is None:
            replica.complaints.append(f"a request from nobody: {self._body[:80]!r}")
            return
        number = int(found.group(1))
        leg = Leg(
            number=number,
            request_id=self._headers.get(b"x-request-id", b"").decode(),
            replica=replica.name,
            at=replica.loop.time(),
        )
        replica.ledger.setdefault(number, []).append(leg)
        self.leg = leg
        self._num_served += 1
        self._has_answered = False
        fault = replica.next_fault(body, leg.at)
        if not body.stream and fault.kind in _OF_STREAMS:
            fault = msgspec.structs.replace(fault, kind=Kind.CLOSE)
        replica.num_answers += 1
        replica.log(replica.name, "gets", number, leg.request_id, fault.kind.value)
        try:
            script = _Script(replica, body, self._headers, self._target, leg)
            parts = script.parts()
        except _RefusedError as error:
            replica.complaints.append(f"{replica.name} must refuse {number}: {error}")
            parts = [(0.001, _whole(400, {"error": {"message": str(error), "code": "bad"}}))]
        self._perform(parts, fault)

    # answering

    def _perform(self, parts: list[Part], fault: Fault) -> None:
        """Play the answer, with its fault."""
        replica, kind = self._replica, fault.kind
        ttft_s = parts[0][0]
        place = int(fault.place * len(parts))
        end: Callable[[], None] = self._complete
        if kind is Kind.HANG_EARLY:
            return
        if kind in {Kind.RESET_EARLY, Kind.CLOSE_EARLY}:
            parts, end = [(ttft_s, b"")], self._reset if kind is Kind.RESET_EARLY else self._close
        elif kind is Kind.STATUS:
            parts = [(0.001, _error_answer(fault))]
        elif kind is Kind.BAD_HEAD:
            parts, end = [(ttft_s, BAD_HEADS[fault.variant])], self._close
        elif kind is Kind.INTERIM:
            parts = [(0.001, b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"), *parts]
        elif kind is Kind.EXCESS:
            # The first comes in one segment with the end, so that the connection is known to be
            # bad before its next request; the second when that may be waiting for its answer.
            delay_s, last = parts[-1]
            assert isinstance(last, bytes)
            smuggled = _whole(200, {"smuggled": True})
            parts = [*parts[:-1], (delay_s, last + smuggled), (fault.duration_s / 10, smuggled)]
        elif kind is Kind.LAST:
            end = self._close
        elif kind is Kind.STALL:
            parts = [*parts[:place], (fault.duration_s, b""), *parts[place:]]
        elif kind in OF_HOST:  # a dead process sends no more; one that thaws goes on
            parts = [*parts[:place], (0.0, lambda: replica.strike(fault)), *parts[place:]]
        elif kind is not Kind.NONE:
            parts, end = self._cut(parts, fault)
        self._play(iter(parts), end)

    def _cut(self, parts: list[Part], fault: Fault) -> tuple[list[Part], Callable[[], None]]:
        """The parts until the fault, and the fault."""
        kind = fault.kind
        # After the head, before the last part: what comes later is no fault.
        place = 1 + int(fault.place * max(1, len(parts) - 1))
        if kind in {Kind.ERROR_EVENT, Kind.DONE_EARLY}:  # written between events, not inside one
            while place < len(parts) - 1 and not _ends_event(parts[place - 1]):
                place += 1
        if kind is Kind.DONE_EARLY:  # after the finish_reason it would not be early
            while place > 1 and (_has_finish(parts[:place]) or not _ends_event(parts[place - 1])):
                place -= 1
        kept = parts[:place]
        is_text = kind in {Kind.RESET, Kind.CLOSE, Kind.HANG}
        if fault.is_inside_part and is_text and place < len(parts):
            delay_s, data = parts[place]
            assert isinstance(data, bytes)
            kept = [*kept, (delay_s, data[: len(data) // 2])]
        ends: dict[Kind, Callable[[], None]] = {
            Kind.RESET: self._reset,
            Kind.CLOSE: self._close,
            Kind.HANG: self._hang,
            Kind.CLEAN_END: self._complete,
            Kind.DONE_EARLY: self._complete,
            Kind.ERROR_EVENT: self._complete,
            Kind.BAD_CHUNK: self._hang,
        }
        if kind is Kind.CLEAN_END:
            kept = [*kept, (0.001, b"0\r\n\r\n")]
        elif kind is Kind.DONE_EARLY:
            kept = [*kept, (0.001, _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")]
        elif kind is Kind.ERROR_EVENT:
            event = b'data: {"error":{"message":"it broke","type":"server_error","code":500}}\n\n'
            tail = b"data: [DONE]\n\n" if fault.variant % 2 else b""
            kept = [*kept, (0.001, _chunk(event + tail) + b"0\r\n\r\n")]
        elif kind is Kind.BAD_CHUNK:
            kept = [*kept, (0.001, b"xyz\r\n")]
        return kept, ends[kind]

    def _play(self, parts: Any, end: Callable[[], None]) -> None:
        """Send the next part when it is due, then the others, then `end`."""
        part = next(parts, None)
        if part is None:
            if not self._is_dead:
                end()
            return
        delay_s, data = part
        self._replica.host.later(delay_s, self._play_now, data, parts, end)

    def _play_now(self, data: Any, parts: Any, end: Callable[[], None]) -> None:
        if self._is_dead:
            return
        if callable(data):
            data()
        else:
            self._has_answered |= bool(data)
            self._transport.write(data)
        if self._is_paused:
            self._waiting = lambda: self._play(parts, end)
        else:
            self._play(parts, end)

    def _complete(self) -> None:
        self._end_leg()
        replica = self._replica
        if replica.style.idle_close_s is not None:
            replica.host.later(replica.style.idle_close_s, self._close_idle, self._num_served)

    def _close_idle(self, num_served: int) -> None:
        if self._num_served == num_served and not self._is_dead:
            self._transport.close()

    def _end_leg(self) -> None:
        if self.leg is not None:
            self.leg.ended_at = self._replica.loop.time()
            self.leg.looks_stale = self._num_served > 1 and not self._has_answered
            self.leg = None

    def _reset(self) -> None:
        self._end_leg()
        self._transport.reset()

    def _close(self) -> None:
        self._end_leg()
        self._transport.close()

    def _hang(self) -> None:
        """Say nothing more; the request still takes its place."""


class _RefusedError(Exception):
    """No engine would serve this."""


class _Script:
    """The parts of one answer as they would go out undisturbed."""

    def __init__(
        self,
        replica: SimReplica,
        body: Body,
        headers: dict[bytes, bytes],
        target: bytes,
        leg: Leg,
    ) -> None:
        self._replica = replica
        self._style = replica.style
        self._rng = replica.rng
        self._body = body
        self._leg = leg
        self._is_chat = target.endswith(b"/chat/completions")
        self._is_roost = self._style.dialect == "roost"
        self._reports = self._is_roost and headers.get(b"x-roost-resumable") == b"1" and body.n == 1
        self._prompt, shown = self._split_prompt()
        leg.seed = self._seed()
        self._whole = self._read_resume(shown)
        self._id = f"cmpl-{leg.number}-{replica.name}-{replica.num_answers}"

    def parts(self) -> list[Part]:
        """Head, pieces of the body, end."""
        return self._stream() if self._body.stream else self._at_once()

    # reading the request

    def _split_prompt(self) -> tuple[bytes, str]:
        """The prompt, and the part of the answer that is given with it."""
        body = self._body
        if not self._is_chat:
            prompt, _, shown = (body.prompt or "").partition(END_OF_PROMPT)
            return prompt.encode(), shown
        messages = body.messages or []
        if not body.continue_final_message:
            return msgspec.json.encode(messages), ""
        if body.add_generation_prompt or messages[-1].get("role") != "assistant":
            raise _RefusedError("continue_final_message needs an assistant's message at the end")
        return msgspec.json.encode(messages[:-1]), messages[-1]["content"]

    def _seed(self) -> int:
        resume = self._body.roost_resume
        if resume is not None:
            return int(resume["seed"])
        if self._body.seed is not None:
            return self._body.seed
        return self._rng.randrange(1 << 40) if self._is_roost else 0

    def _read_resume(self, shown: str) -> Answer:
        """The whole answer that this leg gives or continues."""
        body, leg, resume = self._body, self._leg, self._body.roost_resume
        assert leg.seed is not None
        limit = body.limit
        if shown:  # by text: the limit is what is left of it
            leg.seed, leg.resumed_from = self._find(shown)
            limit = None if limit is None else limit + leg.resumed_from
        whole = answer(self._prompt, leg.seed, limit, holds_back=self._is_roost and not shown)
        if resume is not None:
            token_ids = tuple(resume["token_ids"])
            if not self._is_roost:
                raise _RefusedError("roost_resume is not known here")
            if not body.stream or body.n != 1:
                raise _RefusedError("only a stream of one choice can be resumed")
            if whole.token_ids[: len(token_ids)] != token_ids:
                raise _RefusedError(f"these tokens were never generated: {token_ids}")
            leg.resumed_from = len(token_ids)
        return whole

    def _find(self, shown: str) -> tuple[int, int]:
        """Seed and position of a text: any engine continues any text, this one knows whose."""
        earlier = [leg.seed for leg in self._replica.ledger[self._leg.number]]
        for seed in (self._leg.seed, *earlier):
            if seed is not None:
                position = position_of(shown, answer(self._prompt, seed, None, holds_back=False))
                if position is not None:
                    return seed, position
        raise _RefusedError(f"the model never said {shown!r}")

    # writing the answer

    def _head(self, *lines: bytes) -> bytes:
        told: list[bytes] = [b"HTTP/1.1 200 OK", *lines]
        if self._style.tells_prompt_tokens:
            told.append(b"x-roost-prompt-tokens: %d" % num_prompt_tokens(self._prompt))
            told.append(b"x-roost-cached-tokens: 0")
        if self._reports:
            told.append(b"x-roost-seed: %d" % (self._leg.seed or 0))
        return b"\r\n".join(told) + b"\r\n\r\n"

    def _usage(self) -> dict[str, int]:
        prompt, num = num_prompt_tokens(self._prompt), len(self._whole.token_ids) * self._body.n
        if not self._is_roost:  # what came with the prompt is prompt to it
            prompt, num = prompt + self._leg.resumed_from, num - self._leg.resumed_from
        return {"prompt_tokens": prompt, "completion_tokens": num, "total_tokens": prompt + num}

    def _at_once(self) -> list[Part]:
        whole, pace = self._whole, self._replica.pace
        choices = []
        for index in range(self._body.n):
            said: dict[str, Any] = {"text": whole.text}
            if self._is_chat:
                said = {"message": {"role": "assistant", "content": whole.text}}
            choices.append({"index": index, **said, "finish_reason": whole.finish_reason})
        body = self._json({**self._envelope(""), "choices": choices, "usage": self._usage()})
        wait_s = pace.ttft_s + pace.itl_s * len(whole.token_ids)
        kind = b"content-type: application/json"
        if self._rng.random() < 0.3:
            head = self._head(kind, b"transfer-encoding: chunked")
            half = len(body) // 2
            ends = [(0.001, _chunk(body[half:])), (0.0, b"0\r\n\r\n")]
            return [(wait_s, head), (0.0, _chunk(body[:half])), *ends]
        head = self._head(kind, b"content-length: %d" % len(body))
        half = self._rng.randrange(len(body))
        return [(wait_s, head), (0.0, body[:half]), (0.001, body[half:])]

    def _stream(self) -> list[Part]:
        style, rng, pace = self._style, self._rng, self._replica.pace
        head = self._head(
            b"content-type: text/event-stream; charset=utf-8", b"transfer-encoding: chunked"
        )
        parts: list[Part] = []
        is_early = rng.random() < 0.5  # many servers send the head before the first token
        parts.append((pace.ttft_s * (0.1 if is_early else 1.0), head))
        held = b""
        events = self._events()
        wait_s = pace.ttft_s * 0.9 if is_early else 0.0
        if style.says_keepalive:
            parts.append((wait_s / 2, _chunk(b": keepalive\n\n")))
            wait_s /= 2
        for position, (event, num_tokens) in enumerate(events):
            data = held + event
            held = b""
            is_last = position == len(events) - 1
            if not is_last and rng.random() < style.merge_share:
                held = data
            elif not is_last and rng.random() < style.cut_share:
                cut = rng.randrange(1, len(data))
                data, held = data[:cut], data[cut:]
            if not held or data != held:
                parts.append((wait_s, _chunk(data)))
                wait_s = 0.0
            wait_s += pace.itl_s * num_tokens * (0.5 + rng.random())
        parts.append((0.0, b"0\r\n\r\n"))
        return parts

    def _events(self) -> list[tuple[bytes, int]]:
        """Events, and how many tokens each took."""
        whole, start = self._whole, self._leg.resumed_from
        num_tokens, step = len(whole.token_ids), self._style.num_tokens_a_step
        events: list[tuple[bytes, int]] = []
        if self._is_chat and self._body.roost_resume is None:
            events += [
                (self._event({"role": "assistant", "content": ""}, None, index=index), 0)
                for index in range(self._body.n)
            ]
        reported = shown_until = start
        position = start
        is_finished = False
        while position < num_tokens:
            before, position = position, min(num_tokens, position + step)
            text = whole.visible[position][len(whole.visible[shown_until]) :]
            if not text:
                continue
            shown_until = position
            is_finished = position == num_tokens and self._style.finish_with_text
            reason = whole.finish_reason if is_finished else None
            comment = self._comment(reported, position)
            reported = position
            events += [
                (comment + self._event(self._delta(text), reason, index=index), position - before)
                for index in range(self._body.n)
            ]
        if not is_finished:
            comment = self._comment(reported, num_tokens)
            events += [
                (comment + self._event(self._delta(""), whole.finish_reason, index=index), 0)
                for index in range(self._body.n)
            ]
        if self._body.wants_usage:
            usage = {**self._envelope(".chunk"), "choices": [], "usage": self._usage()}
            events.append((self._data(self._json(usage)), 0))
        events.append((self._data(b"[DONE]"), 0))
        return events

    def _comment(self, start: int, end: int) -> bytes:
        if not self._reports or start == end:
            return b""
        ids = self._whole.token_ids[start:end]
        return b": roost " + b" ".join(b"%d" % token_id for token_id in ids) + b"\n"

    def _delta(self, text: str) -> dict[str, str]:
        return {"content": text} if text else {}

    def _event(self, delta: dict[str, str], reason: str | None, *, index: int) -> bytes:
        choice: dict[str, Any] = {"index": index}
        if self._is_chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        choice["finish_reason"] = reason
        return self._data(self._json({**self._envelope(".chunk"), "choices": [choice]}))

    def _envelope(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._is_chat else "text_completion"
        created = 1_700_000_000 + int(self._leg.at)
        return {"id": self._id, "object": kind, "created": created, "model": self._body.model}

    def _json(self, value: dict[str, Any]) -> bytes:
        if self._style.is_spaced:
            return json.dumps(value).encode()
        return msgspec.json.encode(value)

    def _data(self, text: bytes) -> bytes:
        return b"data: " + text + self._style.line_end * 2


def _ends_event(part: Part) -> bool:
    data = part[1]
    return isinstance(data, bytes) and data.endswith((b"\n\n\r\n", b"\r\n\r\n\r\n"))


def _has_finish(parts: list[Part]) -> bool:
    sent = b"".join(data for _, data in parts if isinstance(data, bytes))
    return b'"finish_reason":"' in sent or b'"finish_reason": "' in sent


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(status: int, body: dict[str, Any]) -> bytes:
    text = msgspec.json.encode(body)
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(text)) + text


def _error_answer(fault: Fault) -> bytes:
    if fault.variant % 2:
        text = b"<html>something is wrong</html>"
        head = b"HTTP/1.1 %d Bad\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n"
        return head % (fault.status, len(text)) + text
    error = {"message": "not now", "type": "server_error", "code": fault.status}
    return _whole(fault.status, {"error": error})
