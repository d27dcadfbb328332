"""Token-budget scheduler: which tokens of which requests the next step computes.

There is no prefill phase and no decode phase. A step has a budget of tokens; a request has
tokens whose KV is missing (one while it decodes, many while it prefills) and gets as many of
them computed as the budget allows. `schedule` decides, the shell computes (core.py, or the twin
in simulated.py), `update` takes the sampled tokens in, or `discard` forgets the step.

    waiting --admit: prefix hit, blocks for all its tokens--> running --eos, max_tokens--> out
       ^ its own place                                           |
       +---------------- preempt: give all blocks back ----------+

Decisions worth knowing:
    * Everything goes in order of *place*: priority, then arrival. The request in the last place is
      the one that is preempted, so the first always gets on, and nobody starves within a priority.
    * A request gets blocks for all its known tokens when it is admitted, so a prefill, in
      however many chunks, never fails half way; only decodes ask for more.
    * Admission looks ahead to the moment of most blocks in use (headroom.py). The first request
      that does not fit ends the search: nobody smaller overtakes it.
    * Blocks of a preempted request stay cached, or move to the host, as long as nobody needs
      them, so recomputing is often a prefix hit. A step that preempted admits nothing.
    * A waiting request whose prefix is just being computed waits until that is done (sharing.py).
    * Position-keyed sampling makes a preempted request continue with the same tokens.

Cost: `schedule` and `update` together 0.21 to 0.27 ms for 256 decodes (`roost bench schedule`),
which is why their loops are plain and a chunk refers to the block table instead of copying it.

Invariants: a step never exceeds `max_step_tokens`, never holds more than `max_running`
requests; `running` is in order of place; each request that runs alone fits the pool (checked by
`add`; pins give way), so there is always progress.

Drafts: a chunk of a decode would hold the last token and the drafts after it, ask for logits at
each of them, and `update` would take the longest accepted run. Nothing else would change, since
`num_computed` is only ever set to what was accepted.

Not here: text, stop strings, clocks, threads, tensors.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

import msgspec

from roost_engine.admission import ExpectedOutput
from roost_engine.batch import BlockCopy, Chunk
from roost_engine.headroom import Headroom
from roost_engine.pins import Pins
from roost_engine.request import FinishReason, Request, RequestState
from roost_engine.sharing import PrefixSharing
from roost_engine.waiting import Place, WaitingLine
from roost_wire.told_load import ToldLoad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.blocks import BlockPool
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


class Step(msgspec.Struct, frozen=True):
    """What is computed next; nothing is scheduled if there is nothing to do."""

    scheduled: list[Request]
    chunks: list[Chunk]  # one for each request, in the order in which the runner computes them
    sampling: list[Request]  # those that get a token, in the order of the rows of logits
    copies: list[BlockCopy]  # to be executed before the chunks, in this order

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class Output(msgspec.Struct, frozen=True, gc=False):
    """One generated token; `finish_reason` is set on the last. No token: ERROR."""

    request: Request
    token_id: int | None
    finish_reason: FinishReason | None


class Counters(msgspec.Struct):
    """Totals since the start, for metrics; written by the scheduler only."""

    prefix_queries_tokens: int = 0  # prompt tokens of admitted requests
    prefix_hits_tokens: int = 0  # of those, found in the cache, on the device or on the host
    restored_tokens: int = 0  # copied back from the host at any admission
    prefill_tokens: int = 0  # prompt tokens computed, recomputation included
    generation_tokens: int = 0
    preemptions: int = 0
    expired: int = 0  # requests whose deadline passed while they waited
    pins_broken: int = 0  # because a request could not have run beside them
    interrupted_steps: int = 0  # most of whose tokens nobody waited for any more


class Scheduler:
    """Continuous batching over one block pool. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        eos_token_ids: frozenset[int],
        expected: ExpectedOutput | None = None,
    ) -> None:
        """`eos_token_ids` end a request unless it says `ignore_eos`."""
        self.config = config
        self.pool = pool
        self.pins = Pins(pool)
        self.counters = Counters()
        self._eos_token_ids = eos_token_ids
        self._headroom = Headroom(
            pool, config.max_step_tokens, expected if expected is not None else ExpectedOutput()
        )
        self._waiting = WaitingLine()
        self._running: list[Request] = []
        self._prefilling: list[Request] = []  # as of the last step; some may have ended
        self._requests: dict[str, Request] = {}
        self._places: dict[str, Place] = {}
        self._num_arrivals = 0
        self._sharing = PrefixSharing(pool)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return len(self._running)

    @property
    def load(self) -> ToldLoad:
        """What is to be done and what memory is in use, as told to routers. O(prefills under way).

        May be read from another thread: the numbers may then be a step apart.
        """
        under_way = [
            request.num_uncomputed
            for request in self._prefilling
            if request.state is RequestState.RUNNING and request.num_uncomputed > 1
        ]
        pool = self.pool
        return ToldLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            used_tokens=(pool.num_blocks - pool.num_free) * pool.block_size,
            capacity_tokens=pool.num_blocks * pool.block_size,
            queued_tokens=self._waiting.num_uncached_tokens + sum(under_way),
        )

    @property
    def running(self) -> Sequence[Request]:
        """Requests with blocks, in order of place."""
        return self._running

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
        self._num_arrivals += 1
        self._places[request.id] = (request.priority, self._num_arrivals)
        self._enqueue(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any state and free its blocks; None if it is not here any more."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT)
        return request

    def expire(self, now: float) -> list[Output]:
        """End waiting requests whose deadline has passed with ABORT, and pins whose time has.

        To be called before `schedule`; O(pins) if nothing is due.
        """
        self.pins.expire(now)
        overdue = self._waiting.overdue(now)
        for request in overdue:
            self._finish(request, FinishReason.ABORT)
        self.counters.expired += len(overdue)
        return [Output(request, None, FinishReason.ABORT) for request in overdue]

    def schedule(self) -> Step:
        """Choose what the next step computes, and take the blocks for it.

        O(running + waiting requests looked at + blocks hit).
        """
        step = Step([], [], [], [])
        scheduled, chunks = step.scheduled, step.chunks
        num_preemptions, size = self.counters.preemptions, self.pool.block_size

        # 1. One token for every running request that decodes; they have clients watching.
        # Whoever is preempted is last in `_running`, so the loop neither misses nor repeats anyone.
        prefilling: list[Request] = []
        for request in self._running:
            token_ids, start = request.token_ids, request.num_computed
            if start + 1 < len(token_ids):
                prefilling.append(request)
                continue
            if start == len(request.block_table) * size and not self._try_grow(request):
                continue
            scheduled.append(request)
            chunks.append(Chunk(token_ids[start:], start, request.block_table, True))
        step.sampling.extend(scheduled)
        budget = self.config.max_step_tokens - len(scheduled)

        # 2. Prefills under way, whose blocks are theirs already, and new requests, unless memory
        # was short just now; in order of place.
        under_way = list(prefilling)
        may_admit = self.counters.preemptions == num_preemptions
        self._headroom.note_step(has_preempted=not may_admit, running=self._running)
        for request in under_way:
            if may_admit:
                budget = self._admit(step, budget, prefilling, self._places[request.id])
            if budget > 0:
                budget -= _add_prefill(step, request, budget)
        if may_admit:
            self._admit(step, budget, prefilling, None)

        self._prefilling = prefilling
        step.copies.extend(self.pool.take_copies())
        return step

    def update(self, step: Step, sampled: Sequence[int | None]) -> list[Output]:
        """Take in what a step computed: one sampled token for each of `step.sampling`.

        None stands for logits that are no numbers: the request ends with ERROR. Requests aborted
        since `schedule` are passed over.
        """
        tokens = iter(sampled)
        outputs: list[Output] = []
        size, eos_token_ids = self.pool.block_size, self._eos_token_ids
        is_running, num_failed = RequestState.RUNNING, 0
        for request, chunk in zip(step.scheduled, step.chunks, strict=True):
            token_id = next(tokens) if chunk.wants_logits else None
            if request.state is not is_running:
                continue
            start = chunk.start
            if start < request.num_prompt_tokens:
                self._count_prefill(request, chunk)
            if token_id is None and chunk.wants_logits:
                outputs.append(self._fail(request))
                num_failed += 1
                continue
            request.num_computed = end = start + len(chunk.token_ids)
            if start // size < end // size:
                self._register(request, start // size, end // size)
            if token_id is None:
                continue
            request.token_ids.append(token_id)
            sampling = request.sampling
            reason: FinishReason | None = None
            if token_id in eos_token_ids and not sampling.ignore_eos:
                reason = FinishReason.STOP
            elif len(request.token_ids) - request.num_prompt_tokens >= sampling.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                self._finish(request, reason)
            outputs.append(Output(request, token_id, reason))
        self.counters.generation_tokens += len(outputs) - num_failed
        return outputs

    def discard(self) -> None:
        """Forget the step that `schedule` chose last: it was not computed to its end.

        To be called instead of `update`, after the step's copies were made. Who was scheduled
        keeps its blocks, of which none was registered, and its `num_computed`: the same tokens
        are computed into the same slots by the steps to come.
        """
        self.counters.interrupted_steps += 1

    def __repr__(self) -> str:
        return f"<Scheduler running={self.num_running} waiting={self.num_waiting}>"

    def check(self) -> None:
        """Verify the scheduler's and the pool's invariants; AssertionError if one is broken."""
        tables = [request.block_table for request in self._running]
        self.pool.check([*tables, *self.pins.block_tables])
        assert self.pins.num_blocks <= self.pins.max_blocks
        assert len(self._running) <= self.config.max_running
        assert len(self._requests) == len(self._running) + len(self._waiting)
        assert self._places.keys() == self._requests.keys()
        for line in (list(self._waiting), self._running):
            places = [self._places[request.id] for request in line]
            assert places == sorted(places), "a line is out of order"
        most = sum(request.num_uncomputed for request in self._waiting)
        assert len(self._waiting) <= self._waiting.num_uncached_tokens <= most
        left = [each.num_uncomputed for each in self._running if each.num_uncomputed > 1]
        assert self.load.queued_tokens == self._waiting.num_uncached_tokens + sum(left)
        for request in self._waiting:
            assert request.state is RequestState.WAITING, request
            assert not request.block_table, request
        for request in self._running:
            assert request.state is RequestState.RUNNING, request
            assert 0 <= request.num_computed < len(request.token_ids), request
            covered = len(request.block_table) * self.pool.block_size
            assert request.num_computed <= covered, request

    # -- running requests ---------------------------------------------------------------

    def _try_grow(self, request: Request) -> bool:
        """Give a decode the block it writes to; False if it was preempted for want of one.

        The request in the last place is preempted, this one itself if that is it.
        """
        while not self.pool.num_free:
            if len(self._running) == 1:
                self._break_pin()
                continue
            last = self._running[-1]
            self._preempt(last)
            if last is request:
                return False
        request.block_table += self.pool.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        """Back to its place in line; everything is recomputed, or found in the cache."""
        self._running.remove(request)
        self._release(request)
        request.state = RequestState.WAITING
        self._enqueue(request)
        self.counters.preemptions += 1

    def _break_pin(self) -> None:
        """Free pinned blocks for the only request that could run."""
        broken = self.pins.break_one()
        assert broken, "a request that fits the pool does not fit it alone"
        self.counters.pins_broken += 1

    # -- waiting requests ---------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        self._sharing.add(request)
        hit = self.pool.lookup(request.token_ids, self._sharing.shareable_chain(request))
        num_uncached = len(request.token_ids) - len(hit) * self.pool.block_size
        self._waiting.add(self._places[request.id], request, num_uncached)

    def _admit(
        self, step: Step, budget: int, prefilling: list[Request], before: Place | None
    ) -> int:
        """Start those that wait before this place while budget, slots and blocks last.

        The budget that is left. Only those that wait for a shared prefix are passed over; who is
        started joins `prefilling`.
        """
        num_passed_over = 0
        while budget > 0 and len(self._running) < self.config.max_running:
            request = self._waiting.try_get(num_passed_over)
            if request is None or (before is not None and self._places[request.id] > before):
                break
            if self._sharing.must_wait(request, prefilling):
                num_passed_over += 1
                continue
            if self._headroom.was_refused(request):
                break
            if not self._try_start(request, prefilling):
                self._headroom.refuse(request)
                break
            if request.num_uncomputed > 1:
                prefilling.append(request)
            budget -= _add_prefill(step, request, budget)
        return budget

    def _try_start(self, request: Request, prefilling: Sequence[Request]) -> bool:
        """Admit a request if it fits, now and later; no change otherwise."""
        pool = self.pool
        hit = pool.lookup(request.token_ids, self._sharing.shareable_chain(request))
        num_missing = -(-len(request.token_ids) // pool.block_size) - len(hit.blocks)
        while True:
            num_taken = num_missing + pool.num_free_among(hit.blocks)
            if num_taken <= pool.num_free:
                break
            if self._running:
                return False
            self._break_pin()
        running = self._running
        if running and not self._headroom.fits(request, hit, running, prefilling):
            return False
        pool.acquire(hit.blocks)
        restored = pool.restore(hit.offloaded)
        fresh = pool.allocate(num_missing - len(restored))
        request.block_table = hit.blocks + restored + fresh
        request.num_computed = len(hit) * pool.block_size
        request.state = RequestState.RUNNING
        place = self._places[request.id]
        self._waiting.remove(place)
        insort(self._running, request, key=lambda running: self._places[running.id])
        self.counters.restored_tokens += len(restored) * pool.block_size
        self._count_admission(request)
        return True

    # -- progress -----------------------------------------------------------------------

    def _register(self, request: Request, first: int, end: int) -> None:
        """Cache the blocks of a request that have become full."""
        size = self.pool.block_size
        for index in range(first, end):
            tokens = request.token_ids[index * size : (index + 1) * size]
            self.pool.register(request.block_table, index, tokens)

    def _fail(self, request: Request) -> Output:
        """End a request whose logits are no numbers, and let nobody inherit its KV.

        Finite logits prove the KV before them finite; these leave all of it suspect, also what
        earlier chunks of the prompt put into the cache.
        """
        self.pool.forget(request.block_table)
        self.pins.drop_uncached()
        self._finish(request, FinishReason.ERROR)
        return Output(request, None, FinishReason.ERROR)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        place = self._places.pop(request.id)
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._release(request)
        else:
            self._waiting.remove(place)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self._requests[request.id]
        self._sharing.remove(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        self._headroom.note_release()
        request.block_table = []
        request.num_computed = 0

    def _count_admission(self, request: Request) -> None:
        if request.num_cached_tokens is not None:
            return  # admitted again after a preemption; usage tells of the first time
        # Output from elsewhere may be cached too, but it is nobody's prompt.
        cached = min(request.num_computed, request.num_prompt_tokens)
        request.num_cached_tokens = cached
        self.counters.prefix_queries_tokens += request.num_prompt_tokens
        self.counters.prefix_hits_tokens += cached

    def _count_prefill(self, request: Request, chunk: Chunk) -> None:
        of_prompt = request.num_prompt_tokens - chunk.start
        self.counters.prefill_tokens += max(0, min(len(chunk.token_ids), of_prompt))


def _add_prefill(step: Step, request: Request, budget: int) -> int:
    """Add the next tokens of a running request to a step, at most `budget`; how many."""
    start = request.num_computed
    token_ids = request.token_ids[start : start + budget]
    is_last = start + len(token_ids) == len(request.token_ids)
    step.scheduled.append(request)
    step.chunks.append(Chunk(token_ids, start, request.block_table, is_last))
    if is_last:
        step.sampling.append(request)
    return len(token_ids)
