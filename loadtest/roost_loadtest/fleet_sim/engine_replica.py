"""A simulated replica that is our engine: its real scheduler and block pool in virtual time.

The engine's own twin (roost_engine.simulated) behind what the event loop asks of a replica. So
what a step holds, who is admitted, preempted and evicted, and which prefixes are found in blocks
of 16 tokens is the engine's doing; only how long a step takes is a formula, the same as that of
the closed-form replica (replica.py).

Where the two differ in what they do:
- Prefixes: in blocks of 16 tokens here, in the trace's there, which find a shared block's end too.
- Answers stay cached here until they are evicted, though no prompt of a trace begins with one.
- A request that needs what another is just computing waits for it here.
- A step's tokens are at most a chunk here, decodes included; there they come on top.
- An answer gets its blocks as it grows here, and is preempted where that was too bold.
What a request will generate is known in advance in both (`ignore_eos`).

It takes each step by itself and hashes each token, so it is slower (docs/benchmarks.md).

Needs nothing that the extra "engine" installs, and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.request import Request, SamplingParams
from roost_engine.simulated import SimulatedReplica
from roost_loadtest.fleet_sim.prompts import canonical_prompt, prompt_tokens
from roost_loadtest.fleet_sim.replica import Happened, Job
from roost_wire.load_report import LoadReport

if TYPE_CHECKING:
    from roost_engine.batch import Chunk
    from roost_loadtest.fleet_sim.model import StepTimes
    from roost_wire.kv_events import KvEvent

#: Tokens a block, as our engine and vLLM have it.
BLOCK_TOKENS = 16


class EngineReplica:
    """One replica; see replica.Replica."""

    def __init__(
        self, times: StepTimes, kv_tokens: int, block_tokens: int, *, tells: bool = False
    ) -> None:
        """`block_tokens`: of the trace. `tells`: keep KV events for `take_news`."""
        self.computed_tokens = 0  # of prompts
        cache = CacheConfig(num_blocks=kv_tokens // BLOCK_TOKENS, block_size=BLOCK_TOKENS)
        limits = SchedulerConfig(
            max_step_tokens=times.chunk_tokens,
            max_running=times.chunk_tokens,  # as many as a step can hold
            max_model_len=cache.num_tokens,
        )
        self._events: list[KvEvent] = []
        self._twin = SimulatedReplica(
            cache, limits, _Steps(times), on_event=self._events.append if tells else None
        )
        self._kv_capacity_tokens = cache.num_tokens
        self._block_tokens = block_tokens
        self._jobs: dict[str, Job] = {}

    @property
    def ends_s(self) -> float | None:
        """When the step under way ends; None: idle."""
        return self._twin.next_event_s()

    @property
    def busy_s(self) -> float:
        """Seconds of all steps that have ended."""
        return self._twin.busy_s

    @property
    def num_requests(self) -> int:
        """Requests here, waiting ones included."""
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Those that are not admitted."""
        return self._twin.scheduler.num_waiting

    def report(self) -> LoadReport:
        """What its metrics page says at this moment."""
        scheduler = self._twin.scheduler
        return LoadReport(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=scheduler.pool.usage,
            kv_capacity_tokens=self._kv_capacity_tokens,
        )

    def queued_tokens(self) -> int:
        """As it tells routers. O(prefills under way)."""
        return self._twin.scheduler.load.queued_tokens

    def take_news(self) -> list[KvEvent]:
        """KV events since this was asked last."""
        events = self._events.copy()
        self._events.clear()
        return events

    def submit(self, job: Job, now: float) -> None:
        """Take a request; it must fit into an empty cache. O(tokens)."""
        asked = job.request
        tokens = prompt_tokens(canonical_prompt(asked, self._block_tokens, job.number))
        sampling = SamplingParams(max_tokens=asked.output_tokens, ignore_eos=True)
        request = Request(str(job.number), tokens, sampling, now)
        self._jobs[request.id] = job
        # Tokens of no other answer, so that its blocks are nobody else's.
        self._twin.submit(request, [job.number] * asked.output_tokens, now)

    def look(self, now: float) -> None:
        """Its memory is its own: nothing to look for."""

    def step(self, now: float) -> list[tuple[Happened, Job]]:
        """End the step under way and begin the next; what happened."""
        happened: list[tuple[Happened, Job]] = []
        for output in self._twin.step(now):
            request = output.request
            job = self._jobs[request.id]
            if job.first_token_s < 0.0:
                job.first_token_s = now
                job.cached_tokens = request.num_cached_tokens or 0
                job.computed_tokens = request.num_prompt_tokens
                happened.append((Happened.FIRST_TOKEN, job))
            if output.finish_reason is not None:
                job.ended_s = now
                del self._jobs[request.id]
                happened.append((Happened.END, job))
        self.computed_tokens = self._twin.scheduler.counters.prefill_tokens
        return happened


class _Steps:
    """The formula of model.py for the engine's chunks."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times

    def predict_s(self, chunks: Iterable[Chunk], num_copies: int = 0) -> float:  # noqa: ARG002
        """Seconds of a step; there is no second tier to copy from. O(chunks).

        Chunks of one token are decodes, as the engine's own formula has it.
        """
        total_s, num_streams, context_tokens = 0.0, 0, 0
        for chunk in chunks:
            num_tokens = len(chunk.token_ids)
            if num_tokens == 1:
                num_streams += 1
                context_tokens += chunk.start + 1
            else:
                total_s += self._times.prefill_s(num_tokens, chunk.start)
        return total_s + self._times.decode_s(1, num_streams, context_tokens)
