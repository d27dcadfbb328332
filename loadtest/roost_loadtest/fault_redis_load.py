"""Conversations whose turns come to one of several routers at random, and what became of each turn.

A turn's prompt is that of the turn before and a little more, so all but its end is cached where the
turn before was computed: the share of those tokens that the replica had (*hit*) says whether
routers know of each other. A conversation's first turn counts in times and failures only.

Clients are a load balancer's: connections to each router are kept, and where `retries` is set, a
turn that a router did not answer is asked of the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client, Outcome
from roost_loadtest.percentile import percentile
from roost_loadtest.replay.prompts import MODEL, TOKEN_BYTES

#: Of the mocks' caches.
BLOCK_TOKENS = 64
_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
_TURNS = 8
_TURN_BYTES = 1600
_ANSWER_TOKENS = 4
_THINK_S = 0.25  # at most twice that
_PATIENCE_S = 20.0


class Turn(NamedTuple):
    """One request of a client. Times are time.monotonic(), in seconds."""

    sent_at: float
    first_s: float  # until the first token, with what retries took; of a whole answer
    router: int  # that answered, or was asked last
    known_tokens: int  # whole blocks of the turn before; 0: the first of its conversation
    cached_tokens: int  # of them
    lost: tuple[tuple[int, float, float, str], ...]  # attempts: router, from, to, how it ended
    is_answered: bool


class Load:
    """Clients that talk until they are told to stop."""

    def __init__(self, ports: Sequence[int], clients: int, seed: int, *, retries: int = 0) -> None:
        self.turns: list[Turn] = []
        self.ports = list(ports)  # may be changed while clients talk
        self._retries = retries
        self._rng = Random(seed)
        self._is_over = False
        self._number = 0
        self._tasks = [asyncio.create_task(self._talk()) for _ in range(clients)]

    async def stop(self) -> None:
        """No further turns; returns when the last one is answered."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _talk(self) -> None:
        clients: dict[int, Client] = {}
        while not self._is_over:
            self._number += 1
            name = f"{self._rng.getrandbits(60)} {self._number}"
            messages: list[dict[str, str]] = []
            known = 0
            for turn in range(_TURNS):
                await asyncio.sleep(self._rng.uniform(0.0, 2 * _THINK_S))
                if self._is_over:
                    break
                if messages:
                    messages.append({"role": "assistant", "content": " a" * _ANSWER_TOKENS})
                messages.append({"role": "user", "content": _words(name, turn)})
                self.turns.append(await self._ask(clients, messages, known))
                prompt = "\n".join(message["content"] for message in messages)
                known = len(prompt.encode()) // _BLOCK_BYTES * BLOCK_TOKENS
        for client in clients.values():
            await client.close()

    async def _ask(
        self, clients: dict[int, Client], messages: list[dict[str, str]], known: int
    ) -> Turn:
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": messages,
            "max_tokens": _ANSWER_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        router = self._rng.randrange(len(self.ports))
        lost: list[tuple[int, float, float, str]] = []
        sent_at = time.monotonic()
        while True:
            port = self.ports[router]
            client = clients.setdefault(port, Client(port))
            outcome = await client.ask(body, patience_s=_PATIENCE_S, keep=True)
            if outcome.verdict is Verdict.OK:
                first_s = outcome.arrivals[0] - sent_at
                cached = min(known, outcome.cached_tokens)
                return Turn(sent_at, first_s, router, known, cached, tuple(lost), is_answered=True)
            lost.append((router, outcome.sent_at, outcome.ended_at, _how(outcome)))
            if len(lost) > self._retries:
                return Turn(sent_at, 0.0, router, known, 0, tuple(lost), is_answered=False)
            router = (router + 1) % len(self.ports)


class Figures(NamedTuple):
    """Turns of some time together."""

    requests: int
    failed: int
    p50_ms: float  # to the first token
    p99_ms: float
    hit: float  # share of the tokens of the turns before; nan where there are none


def figures(turns: Iterable[Turn]) -> Figures:
    """What they amount to."""
    all_turns = list(turns)
    answered = [turn for turn in all_turns if turn.is_answered]
    firsts = sorted(turn.first_s * 1e3 for turn in answered) or [float("nan")]
    known = sum(turn.known_tokens for turn in answered)
    cached = sum(turn.cached_tokens for turn in answered)
    return Figures(
        len(all_turns),
        len(all_turns) - len(answered),
        percentile(firsts, 0.5),
        percentile(firsts, 0.99),
        cached / known if known else float("nan"),
    )


def _words(name: str, turn: int) -> str:
    start = f"{name}, turn {turn}: "
    return (start * (_TURN_BYTES // len(start) + 1))[:_TURN_BYTES]


def _how(outcome: Outcome) -> str:
    return f"{outcome.verdict.value} {outcome.status} {outcome.detail}".strip()
