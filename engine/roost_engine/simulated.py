"""The engine's twin in virtual time: the same scheduler and pool, a formula instead of a model.

A fleet simulator keeps the clock and an event heap; each replica in it is one of these:

    replica.submit(request, output_ids, now)    starts a step if the replica was idle
    replica.next_event_s()                      when the step under way ends; None: idle
    replica.step(now)                           ends it, starts the next one, returns its tokens

Whatever the scheduler decides here it decides in the engine, given the same step times. Requests
say what they will generate, so that the next turn of a conversation extends this one and hits
the cache as it would. Deterministic: no clock, no randomness.

Step time. Every step reads all weights once; its arithmetic, done meanwhile, grows with its
tokens; attention reads the context of each token that it computes:

    T = overhead + max(read_weights, token · tokens) + context · sum of contexts + pair · pairs

where decodes (chunks of one token) count their contexts and longer chunks their pairs of query
and key: reading keys costs a decode bandwidth, and a prefill arithmetic.

Not here: requests' arrivals and routing (the simulator), fitting the coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from roost_engine.blocks import BlockPool
from roost_engine.scheduler import Output, Scheduler, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from roost_engine.batch import Chunk
    from roost_engine.config import CacheConfig, SchedulerConfig
    from roost_engine.request import Request
    from roost_wire.kv_events import KvEvent

_EOS = -1  # no token id, so no output a request asks for ends it early


class PredictsSteps(Protocol):
    """A formula for how long a step takes: StepTime, or a simulator's own."""

    def predict_s(self, chunks: Iterable[Chunk], num_copies: int = 0) -> float:
        """Seconds a step of these chunks takes."""
        ...


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients of a replica's step time, in seconds; see the module for the formula.

    Copying a block between the tiers takes `copy_block_s`, and nothing overlaps it.
    """

    overhead_s: float
    read_weights_s: float  # the time of a step of one token and no context
    token_s: float  # per token computed, once arithmetic outweighs reading the weights
    context_s: float = 0.0  # per token of context of a decode
    pair_s: float = 0.0  # per (query, key) of a longer chunk
    copy_block_s: float = 0.0

    def predict_s(self, chunks: Iterable[Chunk], num_copies: int = 0) -> float:
        """Seconds a step of these chunks takes. O(chunks)."""
        tokens = contexts = pairs = 0
        for chunk in chunks:
            count, start = len(chunk.token_ids), chunk.start
            tokens += count
            if count == 1:
                contexts += start + 1
            else:
                pairs += count * start + count * (count + 1) // 2
        return (
            self.overhead_s
            + max(self.read_weights_s, self.token_s * tokens)
            + self.context_s * contexts
            + self.pair_s * pairs
            + self.copy_block_s * num_copies
        )


class SimulatedReplica:
    """A replica whose steps take predicted time. Driven by somebody who keeps the clock."""

    def __init__(
        self,
        cache: CacheConfig,
        limits: SchedulerConfig,
        step_time: PredictsSteps,
        *,
        on_event: Callable[[KvEvent], None] | None = None,
    ) -> None:
        """`on_event` hears of each block that is stored or removed."""
        pool = BlockPool(
            cache.num_blocks,
            cache.block_size,
            num_host_blocks=cache.num_host_blocks,
            on_event=on_event,
        )
        self.scheduler = Scheduler(limits, pool, frozenset({_EOS}))
        self.busy_s = 0.0  # total time of the steps that have ended
        self._step_time = step_time
        self._outputs: dict[str, Sequence[int]] = {}  # what each request generates
        self._step: Step | None = None
        self._started_s = self._ends_s = 0.0

    def submit(self, request: Request, output_ids: Sequence[int], now: float) -> None:
        """Take a request that generates `output_ids`, cut at its `max_tokens`, then ends.

        PromptTooLong if it could never run. An empty `output_ids` ends with its first token.
        """
        self.scheduler.add(request)
        self._outputs[request.id] = output_ids
        if self._step is None:
            self._start_step(now)

    def abort(self, request_id: str) -> None:
        """End a request early; without effect on one that has ended."""
        if self.scheduler.abort(request_id) is not None:
            del self._outputs[request_id]

    def next_event_s(self) -> float | None:
        """When `step` is to be called; None while there is nothing to do."""
        return self._ends_s if self._step is not None else None

    def step(self, now: float) -> list[Output]:
        """End the step under way and start the next one; the tokens of the one that ended.

        `now` is `next_event_s()` or later. Outputs without a token are requests whose deadline
        passed while they waited.
        """
        assert self._step is not None, "nothing is under way"
        assert now >= self._ends_s, f"the step ends at {self._ends_s}, not at {now}"
        self.busy_s += self._ends_s - self._started_s
        sampled = [self._next_token(request) for request in self._step.sampling]
        outputs = self.scheduler.update(self._step, sampled)
        self._step = None
        outputs += self.scheduler.expire(now)
        for output in outputs:
            if output.finish_reason is not None:
                del self._outputs[output.request.id]
        self._start_step(now)
        return outputs

    def _start_step(self, now: float) -> None:
        if not self.scheduler.has_work:
            return
        self._step = self.scheduler.schedule()
        num_copies = len(self._step.copies)
        self._started_s = now
        self._ends_s = now + self._step_time.predict_s(self._step.chunks, num_copies)

    def _next_token(self, request: Request) -> int:
        output_ids = self._outputs.get(request.id, ())  # () once it has been aborted
        position = len(request.token_ids) - request.num_prompt_tokens
        return output_ids[position] if position < len(output_ids) else _EOS
