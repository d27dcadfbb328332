"""Traces as chat requests: block ids as printable text. Pure.

A trace tells which blocks of two prompts are equal, not what they say. Here every block becomes a
word of its own, over and over, four bytes a token:

    block 7, 10 tokens    "00000000000007  00000000000007  00000000"

So two prompts agree exactly as far as their block ids do, JSON needs no escapes, and every router
sees ordinary text. What has no id is filled with a word of the request's own.

Sessions. Some policies want a key of the conversation. Traces without one get it as an operator's
client would know it: a prompt whose first half an earlier prompt has shown belongs to the session
of that one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from roost_loadtest.replay.client import Ask, Chain

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.trace import Request, Trace

MODEL = "mock"
TOKEN_BYTES = 4


class TraceText:
    """The requests of one trace as bytes of HTTP."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._block_bytes = trace.block_tokens * TOKEN_BYTES
        self._names: dict[int, int] = {}  # block id -> its place among all: ids of any size
        self._sessions = session_keys(trace)

    def turns(self, time_scale: float) -> list[tuple[float, list[tuple[int, float]]]]:
        """When each conversation starts, and its requests with the seconds thought before each.

        All times are the trace's times `time_scale`; without sessions each request is one.
        """
        found: list[tuple[float, list[tuple[int, float]]]] = []
        by_session: dict[int | str, list[tuple[int, float]]] = {}
        for number, request in enumerate(self._trace.requests):
            turn = (number, request.think_s * time_scale)
            if request.session is not None and request.session in by_session:
                by_session[request.session].append(turn)
                continue
            turns = [turn]
            found.append((request.arrives_s * time_scale, turns))
            if request.session is not None:
                by_session[request.session] = turns
        return found

    def chains(self, time_scale: float) -> list[Chain]:
        """The same for the client."""
        return [
            Chain(at, [Ask(partial(self.request, number), think_s) for number, think_s in turns])
            for at, turns in self.turns(time_scale)
        ]

    def prompt(self, number: int) -> str:
        """The text of a request. O(its bytes)."""
        request = self._trace.requests[number]
        names, size = self._names, self._block_bytes
        num_bytes = request.prompt_tokens * TOKEN_BYTES
        blocks = [_fill(names.setdefault(i, len(names)), " ", size) for i in request.block_ids]
        missing = num_bytes - len(blocks) * size
        if missing > 0:
            blocks.append(_fill(number, "~", missing))
        return "".join(blocks)[:num_bytes]

    def request(self, number: int) -> bytes:
        """A request of the trace as bytes to send."""
        return as_request(*self.body(MODEL, number))

    def body(self, model: str, number: int) -> tuple[bytes, str]:
        """A streamed chat completion, and the key of its session."""
        num_output = self._trace.requests[number].output_tokens
        body = chat_body(model, self.prompt(number), num_output)
        return body, str(self._sessions[number])


def chat_body(model: str, prompt: str, max_tokens: int) -> bytes:
    """A streamed chat completion with one message and exactly `max_tokens` tokens of answer."""
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def as_request(body: bytes, session: str = "") -> bytes:
    """A body as bytes to send; `session` in a header."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: replay\r\ncontent-type: application/json\r\n"
        b"x-session-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (session.encode(), len(body), body)
    )


def session_keys(trace: Trace) -> list[int]:
    """A key for each request; see the module. O(blocks)."""
    keys: list[int] = []
    owner: dict[int, int] = {}  # block -> session that showed it last
    named: dict[int | str, int] = {}
    for number, request in enumerate(trace.requests):
        if request.session is not None:
            key = named.setdefault(request.session, number)
        else:
            key = owner.get(_middle(request), number)
        keys.append(key)
        owner.update(dict.fromkeys(request.block_ids, key))
    return keys


def _middle(request: Request) -> int:
    """The block up to which half of the prompt reaches; ids stand for their prefix, too."""
    ids = request.block_ids
    return ids[(len(ids) - 1) // 2] if ids else -1


def _fill(name: int, mark: str, num_bytes: int) -> str:
    word = f"{name:014x}{mark} "
    return (word * (num_bytes // len(word) + 1))[:num_bytes]
