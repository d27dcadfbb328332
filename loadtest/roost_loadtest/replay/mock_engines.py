"""Engines that are simulated behind a real OpenAI API: `python -m ... CONFIG` (JSON). Linux.

One process serves several replicas, each on its port: fleet_sim's replica under the wall clock
(paced.py), prompts cut into blocks named by chained hashes of their text, as engines do with
tokens (four bytes count as one). Streams are vLLM's: the head at once, an event a token, usage
with `cached_tokens` at the end. Tokens that fall into one interval of FLUSH_S leave in one write.

    /v1/chat/completions        streamed or whole
    /v1/chat/completions/render the prompt's token ids: vllm-router asks for them
    /v1/models, /metrics        vLLM's names
    /stats                      what the replica did and how late its timers were, for the replay

Left out: a client that leaves does not end its request; nothing is refused but what could never
fit into the cache (400).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
from collections.abc import AsyncIterator, Callable
from math import ceil

import httptools
import msgspec
import uvloop
import xxhash
import zmq

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import Happened, Job
from roost_loadtest.fleet_sim.trace import Request
from roost_loadtest.percentile import percentile
from roost_loadtest.replay import mock_answers as answers
from roost_loadtest.replay.client import acknowledge_at_once
from roost_loadtest.replay.mock_kv_events import KvPublisher, ToldCache
from roost_loadtest.replay.paced import PacedReplica, SteppedReplica
from roost_loadtest.replay.prompts import TOKEN_BYTES

#: Seconds of the wall between two writes of a stream.
FLUSH_S = 0.05


class MockConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of one process; all alike."""

    ports: list[int] = []
    speed_up: float = 1.0
    times: StepTimes = StepTimes()
    kv_tokens: int = 500_000
    block_tokens: int = 64
    event_ports: list[int] = []  # one a replica: publish KV events there


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica did. Seconds are of the simulation."""

    requests: int
    computed_tokens: int
    busy_s: float
    late_p99_s: float  # of its timers


class _Engine:
    """One replica and the answers that it is writing."""

    def __init__(self, config: MockConfig, cache: BlockCache, started_s: float) -> None:
        """`started_s`: when time began, monotonic."""
        self._cache = cache
        self.paced = PacedReplica(
            SteppedReplica(config.times, cache, config.block_tokens),
            clock=self._clock,
            call_at=self._call_at,
            tell=self._tell,
        )
        self._loop = asyncio.get_running_loop()
        self._config = config
        self._started_s = started_s
        self._answers: dict[int, _Answer] = {}  # by number of the job
        self._num_requests = 0
        self._flushing = False

    def submit(self, body: answers.Body, answer: _Answer) -> bool:
        """Begin to answer; False if the request could never fit."""
        config = self._config
        prompt = body.prompt
        num_prompt = max(1, -(-len(prompt) // TOKEN_BYTES))
        num_blocks = -(-(num_prompt + body.num_output) // config.block_tokens)
        if num_blocks * config.block_tokens > config.kv_tokens:
            return False
        names = block_names(prompt, config.block_tokens * TOKEN_BYTES)
        answer.accepted()
        if isinstance(self._cache, ToldCache):
            self._cache.expect(names, prompt)
        request = Request(num_prompt, body.num_output, names, 0.0)
        job = Job(self._num_requests, request, num_blocks - len(names), 0.0)
        self._num_requests += 1
        self._answers[job.number] = answer
        self.paced.submit(job)
        return True

    def metrics(self) -> bytes:
        """Its page of metrics."""
        return answers.metrics_page(self.paced.replica.report(), self._config.block_tokens)

    def stats(self) -> bytes:
        """Its page of Stats."""
        replica, late = self.paced.replica, sorted(self.paced.late_s)
        return answers.page(
            msgspec.json.encode(
                Stats(
                    requests=self._num_requests,
                    computed_tokens=replica.computed_tokens,
                    busy_s=replica.busy_s,
                    late_p99_s=percentile(late, 0.99) if late else 0.0,
                )
            )
        )

    def _clock(self) -> float:
        return (time.monotonic() - self._started_s) * self._config.speed_up

    def _call_at(self, at: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """Never too early: uvloop rounds to milliseconds."""
        delay_s = at / self._config.speed_up + self._started_s - time.monotonic()
        return self._loop.call_later(max(0, ceil(delay_s * 1e3)) / 1e3, call)

    def _tell(self, what: Happened, job: Job) -> None:
        if what is Happened.FIRST_TOKEN:
            self._answers[job.number].begin(job, self.paced.replica.num_steps)
            if not self._flushing:
                self._flushing = True
                self._loop.call_later(FLUSH_S, self._flush)
        else:
            self._answers.pop(job.number).end(job)

    def _flush(self) -> None:
        """Write what streams have gained; again soon while there are any."""
        streams = [answer for answer in self._answers.values() if answer.job is not None]
        for answer in streams:
            assert answer.job is not None
            answer.show(self.paced.tokens_of(answer.job, answer.first_step))
        self._flushing = bool(streams)
        if streams:
            self._loop.call_later(FLUSH_S, self._flush)


class _Answer:
    """An answer on its way."""

    def __init__(self, connection: _Connection, *, streams: bool) -> None:
        self.job: Job | None = None  # from its first token on
        self.first_step = 0
        self._write = connection.write
        self._streams = streams
        self._num_shown = 0

    def accepted(self) -> None:
        """It will come: a stream's head leaves at once."""
        if self._streams:
            self._write(answers.STREAM_HEAD)

    def begin(self, job: Job, first_step: int) -> None:
        """Its first token is there."""
        self.job, self.first_step = job, first_step
        self._num_shown = 1
        if self._streams:
            self._write(answers.FIRST_TOKEN)

    def show(self, num_tokens: int) -> None:
        """It has so many tokens by now; the last leaves with the end."""
        assert self.job is not None
        new = min(num_tokens, self.job.request.output_tokens - 1) - self._num_shown
        if self._streams and new > 0:
            self._num_shown += new
            self._write(answers.tokens(new))

    def end(self, job: Job) -> None:
        """All of it is there."""
        prompt, output = job.request.prompt_tokens, job.request.output_tokens
        if not self._streams:
            self._write(answers.whole(prompt, output, job.cached_tokens))
            return
        left = output - self._num_shown
        self._write(answers.stream_end(left, prompt, output, job.cached_tokens))


class _Connection(asyncio.Protocol):
    """One client of a replica."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        """To the client, if it is still there."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        acknowledge_at_once(self._transport)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.close()  # some routers greet in HTTP/2

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, []

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"POST":
            self._post()
        elif self._url == b"/v1/models":
            self.write(answers.page(answers.MODELS_PAGE))
        elif self._url == b"/metrics":
            self.write(self._engine.metrics())
        elif self._url == b"/stats":
            self.write(self._engine.stats())
        else:
            self.write(answers.page(b"{}"))

    def _post(self) -> None:
        raw = b"".join(self._body)
        match self._url:
            case b"/v1/chat/completions":
                self._complete(raw)
            case b"/v1/chat/completions/render":
                self.write(_rendered(raw))
            case _:
                self._refuse(b"404 Not Found", "no such path")

    def _complete(self, raw: bytes) -> None:
        try:
            body = answers.body_decoder.decode(raw)
        except msgspec.DecodeError as error:
            self._refuse(b"400 Bad Request", str(error))
            return
        if not self._engine.submit(body, _Answer(self, streams=body.stream)):
            self._refuse(b"400 Bad Request", "the prompt does not fit into the KV cache")

    def _refuse(self, status: bytes, message: str) -> None:
        self.write(answers.refusal(status, message))


@functools.lru_cache(maxsize=64)  # vllm-router asks all replicas for the same
def _rendered(body: bytes) -> bytes:
    try:
        return answers.token_ids(answers.body_decoder.decode(body).prompt)
    except msgspec.DecodeError as error:
        return answers.refusal(b"400 Bad Request", str(error))


def block_names(prompt: bytes, block_bytes: int) -> tuple[int, ...]:
    """Chained hashes of the whole blocks of a prompt. O(bytes)."""
    names = []
    parent = 0
    for start in range(0, len(prompt) - block_bytes + 1, block_bytes):
        parent = xxhash.xxh3_64_intdigest(prompt[start : start + block_bytes], seed=parent)
        names.append(parent)
    return tuple(names)


def _caches(config: MockConfig) -> list[BlockCache]:
    num_blocks = config.kv_tokens // config.block_tokens
    if not config.event_ports:
        return [BlockCache(num_blocks) for _ in config.ports]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publishers = [KvPublisher(context, port) for port in config.event_ports]
    return [ToldCache(num_blocks, config.block_tokens, publisher) for publisher in publishers]


@contextlib.asynccontextmanager
async def serving(config: MockConfig) -> AsyncIterator[None]:
    """The replicas listen meanwhile."""
    loop = asyncio.get_running_loop()
    started_s = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        for port, cache in zip(config.ports, _caches(config), strict=True):
            accept = functools.partial(_Connection, _Engine(config, cache, started_s))
            server = await loop.create_server(accept, "127.0.0.1", port, backlog=4096)
            await stack.enter_async_context(server)
        yield


async def _main() -> None:
    config = msgspec.json.decode(sys.argv[1].encode(), type=MockConfig)
    async with serving(config):
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main())
