"""A simulated replica: continuous batching in virtual time, without a step at a time. Pure.

Its owner keeps the clock:

    submit(job, now)     a request comes
    ends_s               when something happens next; None: idle
    step(now)            then: what happened, and what comes next is begun

A step is one token of every running stream and up to `chunk_tokens` of prompts, first come first
served; requests are admitted when the cache has room for their prompt and answer. Where steps
are alike they are one *stretch*, computed in closed form (model.py): whole chunks of one long
prompt until the first stream ends, or streams alone until the first of them ends. A request that
comes while streams are alone cuts the stretch at the end of the step under way.

Figures kept of all streams together: `_num_steps` counts steps, so that a stream's end is known
when it begins (a heap of step numbers), and the sum of contexts grows by one a stream and step.

The engine's own scheduler and block pool do as well (engine_replica.py), at a fraction of the pace:
they step through each token and hash token ids.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

from roost_wire.load_report import LoadReport

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.cache import BlockCache
    from roost_loadtest.fleet_sim.model import StepTimes
    from roost_loadtest.fleet_sim.told import BlockNews
    from roost_loadtest.fleet_sim.trace import Request
    from roost_wire.kv_events import KvEvent


class Job:
    """One request on its way. Times in seconds of the simulation."""

    __slots__ = (
        "arrived_s",
        "cached_tokens",
        "computed_tokens",
        "ended_s",
        "first_token_s",
        "num_private",
        "number",
        "replica",
        "request",
    )

    def __init__(self, number: int, request: Request, num_private: int, arrived_s: float) -> None:
        self.number = number
        self.request = request
        self.num_private = num_private  # blocks of it that nobody shares
        self.arrived_s = arrived_s
        self.replica = -1
        self.cached_tokens = 0  # at admission
        self.computed_tokens = 0  # of the prompt, cached ones included
        self.first_token_s = -1.0
        self.ended_s = -1.0

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return self.request.prompt_tokens - self.computed_tokens


class Happened(Enum):
    """What a replica tells of a request."""

    FIRST_TOKEN = "first token"  # noqa: S105
    END = "end"


class Replica(Protocol):
    """What the event loop and the figures ask of a replica."""

    @property
    def ends_s(self) -> float | None:
        """When `step` is to be called; None: idle."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds in which it computed."""
        ...

    @property
    def computed_tokens(self) -> int:
        """Tokens of prompts that it computed."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests here, waiting ones included."""
        ...

    @property
    def num_waiting(self) -> int:
        """Those that are not admitted."""
        ...

    def submit(self, job: Job, now: float) -> None:
        """Take a request; it must fit into an empty cache."""
        ...

    def look(self, now: float) -> None:
        """There may be room now for those that wait."""
        ...

    def step(self, now: float) -> list[tuple[Happened, Job]]:
        """It is `ends_s`: what happened; what comes next is begun."""
        ...

    def report(self) -> LoadReport:
        """What its metrics page says, as vLLM's does."""
        ...

    def queued_tokens(self) -> int:
        """Tokens of prompts that are left to compute, of those that wait what is not cached."""
        ...

    def take_news(self) -> list[KvEvent]:
        """What it tells of its blocks since this was asked last."""
        ...


class SimReplica:
    """One replica in closed form."""

    def __init__(
        self,
        times: StepTimes,
        cache: BlockCache,
        block_tokens: int,
        news: BlockNews | None = None,
    ) -> None:
        """`news`: where it tells which blocks it has computed; None: nowhere."""
        self.ends_s: float | None = None
        self.busy_s = 0.0
        self.computed_tokens = 0  # of prompts
        self.waiting: deque[Job] = deque()  # not admitted yet
        self.num_streams = 0
        self._times = times
        self._cache = cache
        self._block_tokens = block_tokens
        self._news = news
        self._prefilling: deque[Job] = deque()  # admitted, in order
        self._streams: list[tuple[int, int, Job]] = []  # heap: last step, order, job
        self._context_tokens = 0  # of all streams
        self._num_steps = 0
        self._began_s = 0.0
        self._steps = 0  # of the stretch under way
        self._chunks: list[tuple[Job, int]] = []  # and the prompt tokens that it computes

    @property
    def num_requests(self) -> int:
        """Requests here, waiting ones included."""
        return len(self.waiting) + len(self._prefilling) + self.num_streams

    @property
    def num_waiting(self) -> int:
        """Those that are not admitted."""
        return len(self.waiting)

    def report(self) -> LoadReport:
        """What its metrics page says at this moment."""
        cache = self._cache
        return LoadReport(
            num_running=len(self._prefilling) + self.num_streams,
            num_waiting=len(self.waiting),
            kv_usage=cache.used_blocks / cache.capacity_blocks,
            kv_capacity_tokens=cache.capacity_blocks * self._block_tokens,
        )

    def queued_tokens(self) -> int:
        """Tokens of prompts that are left to compute; of those that wait, by what is cached now."""
        total = sum(job.uncached_tokens for job in self._prefilling)
        for job in self.waiting:
            total += job.request.prompt_tokens - self._cached_tokens(job)
        return total

    def _cached_tokens(self, job: Job) -> int:
        """Of a request that came now; its last token is always computed. O(blocks)."""
        cached = self._cache.peek(job.request.block_ids) * self._block_tokens
        return min(cached, job.request.prompt_tokens - 1)

    def take_news(self) -> list[KvEvent]:
        """What it tells of its blocks since this was asked last."""
        return self._news.take() if self._news is not None else []

    def queued_s(self) -> float:
        """Seconds of prefill that stand before a request that comes now. O(queue).

        Of requests that are not admitted yet the whole prompt counts.
        """
        times, total = self._times, 0.0
        for job in self._prefilling:
            total += times.prefill_s(job.uncached_tokens, job.computed_tokens)
        for job in self.waiting:
            total += times.prefill_s(job.request.prompt_tokens, 0)
        return total

    def step_decode_s(self) -> float:
        """Seconds that the running streams add to a step."""
        return self._times.decode_s(1, self.num_streams, self._context_tokens)

    def prefill_s(self, job: Job) -> float:
        """Seconds of prefill of a request that came now, alone. O(blocks)."""
        cached = self._cached_tokens(job)
        return self._times.prefill_s(job.request.prompt_tokens - cached, cached)

    def chunk_s(self) -> float:
        """Seconds of a whole chunk at the start of a prompt."""
        return self._times.prefill_s(self._times.chunk_tokens, 0)

    def submit(self, job: Job, now: float) -> None:
        """Take a request; it must fit into an empty cache."""
        self.waiting.append(job)
        if len(self.waiting) == 1:
            self.look(now)

    def look(self, now: float) -> None:
        """Requests wait, and there may be room: soon a step that admits them begins."""
        if self.ends_s is None:
            self._begin(now)
        elif not self._chunks and self._steps > 1:
            begun = self._times.steps_begun(
                now - self._began_s, self.num_streams, self._context_tokens
            )
            if begun < self._steps:
                self._steps = begun
                self.ends_s = self._began_s + self._times.decode_s(
                    begun, self.num_streams, self._context_tokens
                )

    def step(self, now: float) -> list[tuple[Happened, Job]]:
        """End the stretch under way and begin the next; what happened, ends first."""
        happened: list[tuple[Happened, Job]] = []
        self.busy_s += now - self._began_s
        self._num_steps += self._steps
        self._context_tokens += self._steps * self.num_streams
        streams = self._streams
        while streams and streams[0][0] <= self._num_steps:
            job = heappop(streams)[2]
            self.num_streams -= 1
            self._context_tokens -= job.request.prompt_tokens + job.request.output_tokens
            happened.append(self._end(job, now))
        for job, num_tokens in self._chunks:
            if self._news is not None:
                self._tell_computed(self._news, job, num_tokens)
            job.computed_tokens += num_tokens
            self.computed_tokens += num_tokens
            if not job.uncached_tokens:
                self._prefilling.popleft()
                self._start_stream(job, now, happened)
        self.ends_s = None
        self._begin(now)
        return happened

    def _tell_computed(self, news: BlockNews, job: Job, num_tokens: int) -> None:
        """A stretch ends that computed `num_tokens` more of a prompt.

        A block that lacks its last token, which is computed again, may be told of twice.
        """
        size, ids, before = self._block_tokens, job.request.block_ids, job.computed_tokens
        first = -(-before // size) if before == job.cached_tokens else before // size
        is_whole = num_tokens == job.uncached_tokens
        news.stored(ids, first, len(ids) if is_whole else (before + num_tokens) // size)

    def _start_stream(self, job: Job, now: float, happened: list[tuple[Happened, Job]]) -> None:
        job.first_token_s = now
        happened.append((Happened.FIRST_TOKEN, job))
        if job.request.output_tokens == 1:
            happened.append(self._end(job, now))
            return
        last = self._num_steps + job.request.output_tokens - 1
        heappush(self._streams, (last, job.number, job))
        self.num_streams += 1
        self._context_tokens += job.request.prompt_tokens + 1

    def _end(self, job: Job, now: float) -> tuple[Happened, Job]:
        job.ended_s = now
        self._cache.free(job.request.block_ids, job.num_private)
        return Happened.END, job

    def _begin(self, now: float) -> None:
        """Begin the next stretch, if there is anything to do."""
        self._chunks, self._steps = self._choose()
        if not self._steps:
            return
        self._began_s = now
        duration_s = self._times.decode_s(self._steps, self.num_streams, self._context_tokens)
        for job, num_tokens in self._chunks:
            duration_s += self._times.prefill_s(num_tokens, job.computed_tokens)
        self.ends_s = now + duration_s

    def _choose(self) -> tuple[list[tuple[Job, int]], int]:
        """The chunks of the next stretch, and its steps."""
        left = self._streams[0][0] - self._num_steps if self._streams else None
        budget = self._times.chunk_tokens
        if self._prefilling or self._admit():
            job = self._prefilling[0]
            num_whole = job.uncached_tokens // budget
            if num_whole:
                steps = num_whole if left is None else min(num_whole, left)
                return [(job, steps * budget)], steps
        chunks: list[tuple[Job, int]] = []
        place = 0
        while budget and (place < len(self._prefilling) or self._admit()):
            job = self._prefilling[place]
            num_tokens = min(budget, job.uncached_tokens)
            chunks.append((job, num_tokens))
            budget -= num_tokens
            place += 1
        if chunks:
            return chunks, 1
        return chunks, left or 0

    def _admit(self) -> bool:
        """Move the first of those waiting to those being computed, if the cache has room."""
        if not self.waiting:
            return False
        job = self.waiting[0]
        request = job.request
        matched = self._cache.take(request.block_ids, job.num_private)
        if matched is None:
            return False
        self.waiting.popleft()
        # The last token is always computed: its output is the first of the answer.
        job.cached_tokens = min(matched * self._block_tokens, request.prompt_tokens - 1)
        job.computed_tokens = job.cached_tokens
        self._prefilling.append(job)
        return True
