"""What one process of a split model computes, and what it says to the others (gloo, loopback).

    from the stage before    hidden states (num_tokens, hidden), from the process of its share
    among the shares         sums after attention and after the MLP, in float32
    to the stage after       hidden states
    last stage to rank 0     logits of its share of the vocabulary

All messages of a step have sizes that follow from its chunks, which every process has. The
groups are objects of their own: nothing global, and sockets on the loopback interface only.

Not here: who starts processes and hands out chunks (parallel.py), the split itself
(models/layer.py, parallel_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed

from roost_engine.batch import BlockCopy, Chunk
from roost_engine.config import CacheConfig
from roost_engine.host_tier import HostTier
from roost_engine.loader import LoadedModel
from roost_engine.models.decoder import Decoder, DecoderInput
from roost_engine.models.layer import Share
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.step_layout import StepLayout, build_kv_cache

# No operation waits longer than a step; beyond this a process hangs, and the others give up.
_TIMEOUT: Final = timedelta(minutes=10)
_HOST: Final = "127.0.0.1"

# Torch's annotations know neither the stores nor what a group can do.
_dist: Any = torch.distributed


def open_store(plan: ParallelPlan, port: int) -> Any:
    """Where processes find each other: port 0 opens one (rank 0), any other joins it."""
    return _dist.TCPStore(
        _HOST, port, plan.num_processes, is_master=port == 0, wait_for_workers=False
    )


class Links:
    """Connections of one process: to all others, and to the other shares of its stage.

    Building it waits until every process does.
    """

    def __init__(self, plan: ParallelPlan, rank: int, store: Any) -> None:
        self.plan = plan
        self.rank = rank
        self._world = _connect(_dist.PrefixStore("world", store), rank, plan.num_processes)
        stage = _dist.PrefixStore(f"stage {plan.stage_of(rank)}", store)
        self._stage = _connect(stage, plan.share_of(rank), plan.tensor_parallel)

    def sum_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the shares, the same bits in each of them."""
        if self.plan.tensor_parallel == 1:
            return x
        total = x.to(torch.float32, copy=True).contiguous()
        self._stage.allreduce([total]).wait()
        return total.to(x.dtype)

    def send(self, x: torch.Tensor, rank: int) -> None:
        """Hand `x` to a process that receives one of its size; gloo sends bytes of any dtype."""
        if x.numel():
            self._world.send([x.contiguous().view(torch.uint8)], rank, 0).wait()

    def receive(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> torch.Tensor:
        """What `rank` sends."""
        x = torch.empty(shape, dtype=dtype)
        if x.numel():
            self._world.recv([x.view(torch.uint8)], rank, 0).wait()
        return x


def _connect(store: Any, rank: int, size: int) -> Any:
    options = _dist.ProcessGroupGloo._Options()  # noqa: SLF001 - only they name an interface
    options._timeout = _TIMEOUT  # noqa: SLF001
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_HOST)]  # noqa: SLF001
    return _dist.ProcessGroupGloo(store, rank, size, options)


class StageRunner:
    """One process's part of the model with its part of the KV cache; one step at a time."""

    def __init__(
        self, model: LoadedModel, cache: CacheConfig, dtype: torch.dtype, links: Links
    ) -> None:
        config, plan, rank = model.config, links.plan, links.rank
        layers = plan.layers_of(rank, config.num_layers)
        share = Share(plan.share_of(rank), plan.tensor_parallel)
        self._config = config
        self._dtype = dtype
        self._links = links
        self._layout = StepLayout(config, cache, dtype)
        self._cache = build_kv_cache(config, cache, dtype, num_layers=len(layers), share=share)
        self._decoder = Decoder(
            config, model.weights, dtype, layers=layers, share=share, sum_up=links.sum_up
        )
        self._host = HostTier(self._cache, cache.num_host_blocks, cache.block_size)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out a host tier's orders on this part of the cache."""
        self._host.execute(copies)

    def lay_out(self, chunks: Sequence[Chunk]) -> DecoderInput:
        """The step as tensors; raises, before anything is sent, what StepLayout raises."""
        return self._layout.lay_out(chunks)

    @torch.inference_mode()
    def compute(self, step: DecoderInput) -> torch.Tensor:
        """This process's part of a step. Rank 0 gets the logits, the others an empty tensor.

        RuntimeError when another process is gone.
        """
        links, rank = self._links, self._links.rank
        plan, shares = links.plan, links.plan.tensor_parallel
        if plan.stage_of(rank) == 0:
            hidden = self._decoder.embed(step)
        else:
            shape = (len(step.token_ids), self._config.hidden_size)
            hidden = links.receive(shape, self._dtype, rank - shares)
        hidden = self._decoder.run_layers(hidden, step, self._cache)
        own = torch.empty(0)
        if rank in plan.last_stage():
            own = self._decoder.logits(hidden, step)
            if rank != 0:
                links.send(own, 0)
        else:
            links.send(hidden, rank + shares)
        return self._gather_logits(step, own) if rank == 0 else own

    def _gather_logits(self, step: DecoderInput, own: torch.Tensor) -> torch.Tensor:
        plan = self._links.plan
        parts = []
        for rank in plan.last_stage():
            if rank == 0:
                parts.append(own)
                continue
            rows = Share(plan.share_of(rank), plan.tensor_parallel).of(self._config.vocab_size)
            shape = (len(step.logits_rows), rows.stop - rows.start)
            parts.append(self._links.receive(shape, torch.float32, rank))
        return torch.cat(parts, dim=1)
