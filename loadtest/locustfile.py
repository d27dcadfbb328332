"""Locust users of an LLM service: chat, agents, documents, a trace. For any OpenAI-compatible URL.

    pip install 'roost[loadtest]'
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless
    locust -f loadtest/locustfile.py --host ... --headless RagUser -u 16 -t 5m
    locust -f loadtest/locustfile.py --host ... --headless --trace trace.jsonl.gz --speed-up 4

8 users for 60 s unless said otherwise; without --headless, http://localhost:8089 has the controls.

Rows of the table, all in ms unless said:

    POST     a request from its start to its end; it fails if it got no whole answer
    ttft     to its first token
    itl      between its tokens, mean
    cached   percent of its prompt that the server had cached
    slo      a request with both within --ttft-slo and --itl-slo; it fails if not, so that the
             failures are what goodput lacks
    cut      answers that began and broke off; only failures

The exit code is 1 if any request got no whole answer, or none was sent; missing the SLO does not
count as that.

Chat, agents and documents are closed loops: a user waits for an answer, then thinks. The trace is
open: its requests leave when they are due, on as many users as there are (so have enough of them;
how late they were is in the row `late`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from locust import HttpUser, between, constant, events, task
from locust.env import Environment

from roost_loadtest.fleet_sim.trace import read_trace
from roost_loadtest.prompts import handbook
from roost_loadtest.replay.answer import Answer
from roost_loadtest.replay.prompts import TraceText

_RUN_S, _USERS, _SPAWN_RATE = 60, 8, 4
_DOCUMENTS = 24


class CutError(Exception):
    """An answer that began and did not end as it must."""


class MissedError(Exception):
    """A whole answer outside the SLO."""


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("LLM load")
    group.add_argument("--model", default="", help="Model to ask for.  [default: the first served]")
    group.add_argument("--max-tokens", type=int, default=64, help="Of an answer. [default: 64]")
    group.add_argument("--ttft-slo", type=float, default=2.0, help="Seconds. [default: 2]")
    group.add_argument("--itl-slo", type=float, default=0.1, help="Seconds. [default: 0.1]")
    group.add_argument("--trace", default="", help="Trace to play, instead of the other users.")
    group.add_argument("--speed-up", type=float, default=1.0, help="Of the trace. [default: 1]")
    group.add_argument("--limit", type=int, default=2000, help="Of its requests. [default: 2000]")
    parser.set_defaults(run_time=_RUN_S, num_users=_USERS, spawn_rate=_SPAWN_RATE)


@events.init.add_listener
def _choose_users(environment: Environment, **_: Any) -> None:
    """The trace's users play alone, or not at all."""
    options = environment.parsed_options
    if options is None:
        return
    if options.trace:
        TraceUser.text = TraceText(read_trace(Path(options.trace), options.limit))
        TraceUser.coming = iter(TraceUser.text.turns(1 / options.speed_up))
        environment.user_classes = [TraceUser]
    elif TraceUser in environment.user_classes:
        environment.user_classes.remove(TraceUser)


@events.test_start.add_listener
def _start_clock(**_: Any) -> None:
    TraceUser.began = time.perf_counter()


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    """Failures of the rows `slo` and `cut` are figures; those of requests are failures."""
    entries = environment.stats.entries.items()
    asked = [entry for (_, row), entry in entries if row == "POST"]
    lost = not asked or any(entry.num_failures for entry in asked)
    environment.process_exit_code = int(lost)


class LlmUser(HttpUser):
    """What all have in common: a streamed answer and its figures."""

    abstract = True

    served = ""  # the model, known to all when the first has asked

    def on_start(self) -> None:
        """Find out what to ask for."""
        self.rng = random.Random(id(self))
        self.model = self.environment.parsed_options.model or LlmUser.served
        if not self.model:
            page = self.client.get("/v1/models", name="/v1/models")
            self.model = LlmUser.served = page.json()["data"][0]["id"]

    def ask(self, kind: str, messages: list[dict[str, str]], *, session: str = "") -> str:
        """One chat completion; its text, empty if there was no whole answer."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.environment.parsed_options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self.send(kind, msgspec.json.encode(body), session)

    def send(self, kind: str, body: bytes, session: str) -> str:
        """Send a body, read the stream, count."""
        headers = {"content-type": "application/json", "x-session-id": session}
        answer, pieces = Answer(), []
        began = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            data=body,
            headers=headers,
            name=kind,
            stream=True,
            catch_response=True,
        ) as response:
            error: Exception | None = None
            if response.status_code == 200:
                try:
                    for piece in response.iter_content(chunk_size=None):
                        answer.feed(piece, time.perf_counter())
                        pieces.append(piece)
                except OSError as lost:  # requests' errors are
                    error = lost
            response.request_meta["response_time"] = (time.perf_counter() - began) * 1e3
            if answer.is_whole and error is None:
                response.success()
                self._count(kind, answer, began)
                return _text(b"".join(pieces))
            if response.status_code == 200:
                error = CutError(f"cut: {error or 'no finish reason or no [DONE]'}")
                self._fire("cut", kind, 0.0, exception=error)
            response.failure(error or f"status {response.status_code}: {response.text[:200]}")
            return ""

    def _count(self, kind: str, answer: Answer, began: float) -> None:
        options, usage = self.environment.parsed_options, answer.usage
        first_s = began if answer.first_s is None else answer.first_s
        last_s = first_s if answer.last_s is None else answer.last_s
        ttft_s, itl_s = first_s - began, (last_s - first_s) / max(1, usage.output - 1)
        self._fire("ttft", kind, ttft_s * 1e3)
        self._fire("itl", kind, itl_s * 1e3)
        if usage.prompt:
            self._fire("cached", kind, 100.0 * usage.cached / usage.prompt)
        missed = ttft_s > options.ttft_slo or itl_s > options.itl_slo
        message = f"not within {options.ttft_slo:g} s and {options.itl_slo:g} s a token"
        self._fire("slo", kind, ttft_s * 1e3, exception=MissedError(message) if missed else None)

    def _fire(self, row: str, kind: str, value: float, exception: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=row,
            name=kind,
            response_time=value,
            response_length=0,
            exception=exception,
            context={},
        )


class ChatUser(LlmUser):
    """A conversation: each turn extends the one before; a new one after some turns."""

    wait_time = between(1, 4)

    kind = "chat"
    max_turns = 8
    system_tokens, message_tokens = 300, 60

    def on_start(self) -> None:
        """Nothing said so far."""
        super().on_start()
        self.messages: list[dict[str, str]] = []

    @task
    def turn(self) -> None:
        """Say something, hear the answer."""
        number = self.rng.randrange(1 << 30)
        if len(self.messages) > 2 * self.max_turns:
            self.messages.clear()
        if not self.messages:
            self.session = str(number)
            self._say("system", handbook(f"{self.kind} service", self.system_tokens))
        self._say("user", handbook(f"message {number}", self.message_tokens))
        self._say("assistant", self.ask(self.kind, self.messages, session=self.session))

    def _say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


class AgentUser(ChatUser):
    """A tool loop: all share long instructions, results are long, thinking is short."""

    wait_time = between(0.1, 0.5)
    kind = "agent"
    max_turns = 16
    system_tokens, message_tokens = 1500, 250


class RagUser(LlmUser):
    """Questions about documents that all share, the popular ones more often (Zipf)."""

    wait_time = between(0.5, 2)

    @task
    def question(self) -> None:
        """Ask about one of them."""
        weights = [1 / (place + 1) for place in range(_DOCUMENTS)]
        document = self.rng.choices(range(_DOCUMENTS), weights)[0]
        text = handbook(f"house {document}", 1000)
        question = handbook(f"question {self.rng.randrange(1 << 30)}", 20)
        self.ask("rag", [{"role": "user", "content": f"{text}\n\n{question}"}])


class TraceUser(LlmUser):
    """Plays a trace's conversations when they are due; see replay/prompts.py for their text."""

    wait_time = constant(0)
    text: TraceText
    coming: Iterator[tuple[float, list[tuple[int, float]]]]
    began: float

    @task
    def next(self) -> None:
        """Wait until the next is due, play it."""
        taken = next(self.coming, None)
        if taken is None:
            time.sleep(1)  # others may still wait for answers; gevent's, as locust has replaced it
            return
        due = self.began + taken[0]
        for place, (number, think_s) in enumerate(taken[1]):
            due = time.perf_counter() + think_s if place else due
            body, session = self.text.body(self.model, number)
            time.sleep(max(0.0, due - time.perf_counter()))
            self._fire("late", "trace", (time.perf_counter() - due) * 1e3)
            self.send("trace", body, session)


def _text(stream: bytes) -> str:
    """What the answer said."""
    lines = (line[6:] for line in stream.splitlines() if line.startswith(b"data: {"))
    choices = (choice for line in lines for choice in msgspec.json.decode(line).get("choices", []))
    return "".join(choice.get("delta", {}).get("content") or "" for choice in choices)
