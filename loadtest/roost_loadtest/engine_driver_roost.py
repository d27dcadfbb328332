"""Our engine under engine_driver.py, in two depths, and the parts both are made of.

    SteppedRunner   the runner alone, as llama-batched-bench drives llama.cpp: what the kernels do
    SteppedEngine   scheduler, runner and sampling, as EngineCore's step does: what vLLM's offline
                    engine is to be compared with

Not here: measuring (engine_driver.py), the server (it is started as users start it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from roost_engine.backend import Backend, BackendOptions, build_backend, weight_bytes
from roost_engine.batch import Chunk
from roost_engine.blocks import BlockPool
from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.loader import LoadedModel, load_model
from roost_engine.request import Request, SamplingParams
from roost_engine.sampling import sample
from roost_engine.scheduler import Scheduler

if TYPE_CHECKING:
    from roost_engine.native_runner import WeightFormat

_CACHE = CacheConfig(num_blocks=1024)
_MAX_STEP_TOKENS = 512  # as `roost serve` has it


class SteppedRunner:
    """Requests laid out by hand; a step is one call of the runner and an argmax a row.

    Prompts are computed before decodes, in chunks of `_MAX_STEP_TOKENS`. Blocks are handed out
    in turn and reused when all requests have ended.
    """

    def __init__(self, model: str, weights: WeightFormat, threads: int) -> None:
        loaded = load_model(model)
        backend = _open_backend(loaded, weights, threads)
        self._info = _info(loaded, backend, weights)
        self._runner = backend.runner
        self._running: dict[str, _Sequence] = {}
        self._next_block = 0

    def info(self) -> dict[str, Any]:
        """See Driven."""
        return self._info

    def add(self, request_id: str, prompt_ids: list[int], max_tokens: int) -> None:
        """See Driven."""
        num_tokens = len(prompt_ids) + max_tokens
        end = self._next_block - (-num_tokens // _CACHE.block_size)
        blocks = list(range(self._next_block, end))
        self._next_block = end
        self._running[request_id] = _Sequence(list(prompt_ids), num_tokens, blocks)

    def step(self) -> list[str]:
        """See Driven."""
        budget, chunks, sampling = _MAX_STEP_TOKENS, [], []
        missing = sorted(self._running.items(), key=lambda item: -item[1].num_uncomputed)
        for request_id, sequence in missing:
            taken = min(budget, sequence.num_uncomputed)
            if taken == 0:
                break
            budget -= taken
            chunk = sequence.next_chunk(taken)
            chunks.append(chunk)
            if chunk.wants_logits:
                sampling.append(request_id)
        tokens = np.asarray(self._runner.forward(chunks)).argmax(axis=1).tolist()
        for request_id, token_id in zip(sampling, tokens, strict=True):
            sequence = self._running[request_id]
            sequence.token_ids.append(token_id)
            if len(sequence.token_ids) == sequence.max_len:
                del self._running[request_id]
        if not self._running:
            self._next_block = 0
        return sampling


class SteppedEngine:
    """Scheduler, block pool, runner and sampling in one thread."""

    def __init__(self, model: str, weights: WeightFormat, threads: int) -> None:
        loaded = load_model(model)
        backend = _open_backend(loaded, weights, threads)
        self._info = _info(loaded, backend, weights)
        self._runner = backend.runner
        self._draw = backend.draw
        limits = SchedulerConfig(max_step_tokens=_MAX_STEP_TOKENS)
        pool = BlockPool(_CACHE.num_blocks, _CACHE.block_size)
        self._scheduler = Scheduler(limits, pool, loaded.config.eos_token_ids)

    def info(self) -> dict[str, Any]:
        """See Driven."""
        return self._info

    def add(self, request_id: str, prompt_ids: list[int], max_tokens: int) -> None:
        """See Driven."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._scheduler.add(Request(request_id, prompt_ids, sampling, 0.0))

    def step(self) -> list[str]:
        """See Driven."""
        step = self._scheduler.schedule()
        logits = self._runner.forward(step.chunks)
        requests = step.sampling
        sampled = sample(
            logits,
            [request.sampling for request in requests],
            [len(request.token_ids) for request in requests],
            draw=self._draw,
        )
        return [output.request.id for output in self._scheduler.update(step, sampled)]


class _Sequence(msgspec.Struct):
    """A request of SteppedRunner."""

    token_ids: list[int]
    max_len: int
    block_table: list[int]
    num_computed: int = 0

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def next_chunk(self, num_tokens: int) -> Chunk:
        """The next tokens, counted as computed from now on."""
        start, end = self.num_computed, self.num_computed + num_tokens
        self.num_computed = end
        return Chunk(
            token_ids=self.token_ids[start:end],
            start=start,
            block_table=self.block_table,
            wants_logits=end == len(self.token_ids),
        )


def _open_backend(model: LoadedModel, weights: WeightFormat, threads: int) -> Backend:
    """What `roost serve` computes with, and a small cache."""
    options = BackendOptions(weights=weights, num_threads=threads, max_step_tokens=_MAX_STEP_TOKENS)
    return build_backend(model, _CACHE, options)


def _info(model: LoadedModel, backend: Backend, weights: WeightFormat) -> dict[str, Any]:
    """What computes, and how many bytes of weights one decoded token reads.

    The embedding counts once: as the output head all of it is read.
    """
    return {"computes_with": backend.description, "weight_bytes": weight_bytes(model, weights)}
