"""Token-budget scheduler: which tokens of which requests the next step computes.

There is no prefill phase and no decode phase. A step has a budget of tokens; a request has
tokens whose KV is missing (one while it decodes, many while it prefills) and gets as many of
them computed as the budget allows, the oldest requests first. `schedule` decides, the shell
computes (core.py), `update` takes the sampled tokens in.

    waiting --admit: prefix hit, blocks for all its tokens--> running --eos, max_tokens--> out
       ^ front                                                   |
       +---------------- preempt: give all blocks back ----------+

Decisions worth knowing:
    * A request gets blocks for all its known tokens when it is admitted, so a prefill, in
      however many chunks, never fails half way; only decodes ask for more.
    * Admission leaves one free block for each running request, or the next decodes would preempt
      what was just admitted. Reserving `max_tokens` instead (an exact peak) would serialise the
      many clients that do not set it.
    * No block for a decode: the most recently admitted request is preempted. Its blocks stay
      cached as long as nobody needs them, so recomputing is often a prefix hit. A step that
      preempted admits nothing.
    * A waiting request whose prefix is just being computed by another one waits until that one
      has filled it (in-batch sharing). Requests behind it may pass meanwhile; it waits at most
      for the leaders' prefill, and once it can run it is first in line again.
    * Position-keyed sampling makes a preempted request continue with the same tokens.

Invariants: a step never exceeds `max_step_tokens`, never holds more than `max_running`
requests; `running` is in order of admission; each request that runs alone fits the pool (checked
by `add`), so there is always progress.

Not here: text, stop strings, clocks, threads, tensors.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.request import FinishReason, Request, RequestState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.config import SchedulerConfig


class PromptTooLong(Exception):  # noqa: N818 - the name the API speaks of
    """Prompt and completion can never fit the context or the pool; the client's fault."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the limit "
            f"of {limit_tokens} tokens"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.limit_tokens = limit_tokens


class Scheduled(msgspec.Struct, frozen=True):
    """A request's chunk in a step."""

    request: Request
    chunk: Chunk


class Step(msgspec.Struct, frozen=True):
    """What is computed next; empty if there is nothing to do."""

    scheduled: list[Scheduled]

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks in the order in which the runner computes them."""
        return [entry.chunk for entry in self.scheduled]

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token, in the order of the rows of logits."""
        return [entry.request for entry in self.scheduled if entry.chunk.wants_logits]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(entry.chunk.token_ids) for entry in self.scheduled)


class Output(msgspec.Struct, frozen=True):
    """One generated token; `finish_reason` is set on the last. No token: ERROR."""

    request: Request
    token_id: int | None
    finish_reason: FinishReason | None


class Counters(msgspec.Struct):
    """Totals since the start, for metrics; written by the scheduler only."""

    prefix_queries_tokens: int = 0  # prompt tokens of admitted requests
    prefix_hits_tokens: int = 0  # of those, found in the cache
    prefill_tokens: int = 0  # prompt tokens computed, recomputation included
    generation_tokens: int = 0
    preemptions: int = 0


class _Leader(msgspec.Struct, frozen=True):
    """Whom a waiting request waits for, and until how many of its tokens are computed."""

    request: Request
    num_tokens: int

    @property
    def is_filling(self) -> bool:
        running = self.request.state is RequestState.RUNNING
        return running and self.request.num_computed < self.num_tokens


class Scheduler:
    """Continuous batching over one block pool. Not thread-safe: one thread owns it."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, eos_token_ids: frozenset[int]
    ) -> None:
        """`eos_token_ids` end a request unless it says `ignore_eos`."""
        self.config = config
        self.pool = pool
        self.counters = Counters()
        self._eos_token_ids = eos_token_ids
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._chains: dict[str, list[int]] = {}  # hashes of each unfinished request's blocks
        self._leaders: dict[str, _Leader] = {}  # of waiting requests that share a prefix

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._requests)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """PromptTooLong if such a request could never run. Reads configuration only."""
        pool_tokens = self.pool.num_blocks * self.pool.block_size
        limit = min(self.config.max_model_len, pool_tokens)
        if num_prompt_tokens + max_tokens > limit:
            raise PromptTooLong(num_prompt_tokens, max_tokens, limit)

    def add(self, request: Request) -> None:
        """Queue a new request. PromptTooLong if it could never run."""
        self.check_fits(request.num_prompt_tokens, request.sampling.max_tokens)
        assert request.id not in self._requests, f"{request.id} was added twice"
        self._requests[request.id] = request
        self._chains[request.id] = self.pool.chain(request.token_ids)
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any state and free its blocks; None if it is not here any more."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT)
        return request

    def schedule(self) -> Step:
        """Choose what the next step computes, and take the blocks for it.

        O(running + waiting requests looked at + blocks hit).
        """
        budget = self.config.max_step_tokens
        scheduled: list[Scheduled] = []

        # 1. One token for every running request that decodes; they have clients watching.
        preempted = self._make_room_for_decodes()
        for request in self._running:
            if request.num_uncomputed == 1:
                scheduled.append(_next_chunk(request, 1))
                budget -= 1

        # 2. Prefills under way, the oldest first. Their blocks are theirs already.
        for request in self._running:
            if request.num_uncomputed > 1 and budget > 0:
                scheduled.append(_next_chunk(request, budget))
                budget -= len(scheduled[-1].chunk.token_ids)

        # 3. New requests in order of arrival, unless memory was short just now.
        if not preempted:
            scheduled += self._admit(budget)

        return Step(scheduled)

    def update(self, step: Step, sampled: Sequence[int | None]) -> list[Output]:
        """Take in what a step computed: one sampled token for each of `step.sampling`.

        None stands for logits that are no numbers: the request ends with ERROR. Requests aborted
        since `schedule` are passed over.
        """
        tokens = iter(sampled)
        outputs: list[Output] = []
        for entry in step.scheduled:
            request, chunk = entry.request, entry.chunk
            token_id = next(tokens) if chunk.wants_logits else None
            if request.state is not RequestState.RUNNING:
                continue
            self._count_prefill(request, chunk)
            if chunk.wants_logits and token_id is None:
                outputs.append(self._fail(request))
                continue
            self._advance(request, chunk.start + len(chunk.token_ids))
            if token_id is not None:
                outputs.append(self._append(request, token_id))
        return outputs

    def __repr__(self) -> str:
        return f"<Scheduler running={self.num_running} waiting={self.num_waiting}>"

    def check(self) -> None:
        """Verify the scheduler's and the pool's invariants; AssertionError if one is broken."""
        self.pool.check([request.block_table for request in self._running])
        assert len(self._running) <= self.config.max_running
        assert len(self._requests) == len(self._running) + len(self._waiting)
        assert self._chains.keys() == self._requests.keys()
        for request in self._waiting:
            assert request.state is RequestState.WAITING, request
            assert not request.block_table, request
        for request in self._running:
            assert request.state is RequestState.RUNNING, request
            assert 0 <= request.num_computed < len(request.token_ids), request
            covered = len(request.block_table) * self.pool.block_size
            assert request.num_computed <= covered, request

    # -- running requests ---------------------------------------------------------------

    def _make_room_for_decodes(self) -> bool:
        """Give every decode the block it writes to; preempt the newest where there is none."""
        preempted = False
        index = 0
        while index < len(self._running):
            request = self._running[index]
            missing = self._num_missing_blocks(request)
            if missing <= self.pool.num_free:
                request.block_table += self.pool.allocate(missing)
                index += 1
            else:
                self._preempt(self._running[-1])
                preempted = True
        return preempted

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue; everything is recomputed, or found in the cache."""
        self._running.remove(request)
        self._release(request)
        request.state = RequestState.WAITING
        self._waiting.appendleft(request)
        self._chains[request.id] = self.pool.chain(request.token_ids)
        self.counters.preemptions += 1

    def _num_missing_blocks(self, request: Request) -> int:
        size = self.pool.block_size
        return -(-len(request.token_ids) // size) - len(request.block_table)

    # -- waiting requests ---------------------------------------------------------------

    def _admit(self, budget: int) -> list[Scheduled]:
        """Start waiting requests while budget, slots and blocks last; first come, first served.

        Only those that wait for a shared prefix are passed over. The first that does not fit
        ends the search: nobody smaller overtakes it.
        """
        admitted: list[Scheduled] = []
        passed_over: list[Request] = []
        while self._waiting and budget > 0 and len(self._running) < self.config.max_running:
            request = self._waiting.popleft()
            if self._waits_for_leader(request):
                passed_over.append(request)
                continue
            if not self._try_start(request):
                self._waiting.appendleft(request)
                break
            admitted.append(_next_chunk(request, budget))
            budget -= len(admitted[-1].chunk.token_ids)
        self._waiting.extendleft(reversed(passed_over))
        return admitted

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether another request is just computing a prefix that this one needs as well."""
        leader = self._leaders.get(request.id)
        if leader is None:
            leader = self._find_leader(request)
            if leader is None:
                return False
            self._leaders[request.id] = leader
        if leader.is_filling:
            return True
        del self._leaders[request.id]
        return False

    def _find_leader(self, request: Request) -> _Leader | None:
        """The prefilling request that will fill most of this one's prefix, if any does.

        The chains are compared, not the tokens: a collision would cost a wait, nothing else.
        """
        chain = self._shareable_chain(request)
        size = self.pool.block_size
        num_shared, leader = max(
            (
                (_common_prefix(chain, self._chains[other.id]), other)
                for other in self._running
                if other.num_uncomputed > 1
            ),
            key=lambda pair: pair[0],
            default=(0, request),
        )
        if num_shared * size <= leader.num_computed:
            return None
        if len(self.pool.lookup(request.token_ids, chain)) >= num_shared:
            return None
        return _Leader(leader, num_shared * size)

    def _shareable_chain(self, request: Request) -> list[int]:
        """The chain as far as it may be hit: one token at least is computed, for its logits."""
        most_blocks = (len(request.token_ids) - 1) // self.pool.block_size
        return self._chains[request.id][:most_blocks]

    def _try_start(self, request: Request) -> bool:
        """Admit a request if blocks for all its tokens are free; no change otherwise."""
        size = self.pool.block_size
        hits = self.pool.lookup(request.token_ids, self._shareable_chain(request))
        missing = -(-len(request.token_ids) // size) - len(hits)
        taken = missing + self.pool.num_free_among(hits)
        if taken + len(self._running) > self.pool.num_free:
            return False
        self.pool.acquire(hits)
        request.block_table = hits + self.pool.allocate(missing)
        request.num_computed = len(hits) * size
        request.state = RequestState.RUNNING
        self._running.append(request)
        self._count_admission(request)
        return True

    # -- progress -----------------------------------------------------------------------

    def _advance(self, request: Request, num_computed: int) -> None:
        """Note that the KV up to `num_computed` is there, and cache the blocks that are full."""
        size = self.pool.block_size
        first, end = request.num_computed // size, num_computed // size
        request.num_computed = num_computed
        for index in range(first, end):
            tokens = request.token_ids[index * size : (index + 1) * size]
            self.pool.register(request.block_table, index, tokens)

    def _append(self, request: Request, token_id: int) -> Output:
        request.token_ids.append(token_id)
        self.counters.generation_tokens += 1
        reason: FinishReason | None = None
        if token_id in self._eos_token_ids and not request.sampling.ignore_eos:
            reason = FinishReason.STOP
        elif request.num_output_tokens >= request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._finish(request, reason)
        return Output(request, token_id, reason)

    def _fail(self, request: Request) -> Output:
        """End a request whose logits are no numbers, and let nobody inherit its KV.

        Finite logits prove the KV before them finite; these leave all of it suspect, also what
        earlier chunks of the prompt put into the cache.
        """
        self.pool.forget(request.block_table)
        self._finish(request, FinishReason.ERROR)
        return Output(request, None, FinishReason.ERROR)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._release(request)
        else:
            self._waiting.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self._requests[request.id], self._chains[request.id]
        self._leaders.pop(request.id, None)

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed = 0

    def _count_admission(self, request: Request) -> None:
        if request.num_cached_tokens is not None:
            return  # admitted again after a preemption; usage tells of the first time
        request.num_cached_tokens = request.num_computed
        self.counters.prefix_queries_tokens += request.num_prompt_tokens
        self.counters.prefix_hits_tokens += request.num_computed

    def _count_prefill(self, request: Request, chunk: Chunk) -> None:
        of_prompt = request.num_prompt_tokens - chunk.start
        self.counters.prefill_tokens += max(0, min(len(chunk.token_ids), of_prompt))


def _next_chunk(request: Request, budget: int) -> Scheduled:
    """The next tokens of a running request, at most `budget`."""
    start = request.num_computed
    end = min(start + budget, len(request.token_ids))
    chunk = Chunk(
        token_ids=request.token_ids[start:end],
        start=start,
        block_table=list(request.block_table),
        wants_logits=end == len(request.token_ids),
    )
    return Scheduled(request, chunk)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of equal hashes at the start. Equal chain hashes mean equal chains: bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
