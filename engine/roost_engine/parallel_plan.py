"""How one model is split over processes: tensor parallel inside a stage, stages in a pipeline.

                 share 0     share 1
    stage 0      rank 0  <-> rank 1       first layers: sums over the shares, twice a layer
                   |           |          hidden states
    stage 1      rank 2  <-> rank 3       last layers and head

    rank = stage · tensor_parallel + share

Rank 0 is the replica itself, the others are its followers. One step is under way at a time, so
stages wait for each other: a pipeline holds models that one process cannot, it is not faster.
"""

from __future__ import annotations

from math import gcd

import msgspec

from roost_engine.config import ModelConfig


class ParallelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of shares and stages; 1 and 1 is no split at all."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_processes(self) -> int:
        """All of them, the replica's own included."""
        return self.tensor_parallel * self.pipeline_parallel

    def stage_of(self, rank: int) -> int:
        """The stage that `rank` computes."""
        return rank // self.tensor_parallel

    def share_of(self, rank: int) -> int:
        """Its share of the stage's heads."""
        return rank % self.tensor_parallel

    def layers_of(self, rank: int, num_layers: int) -> range:
        """The layers of its stage; uneven numbers differ by one."""
        stage, stages = self.stage_of(rank), self.pipeline_parallel
        return range(num_layers * stage // stages, num_layers * (stage + 1) // stages)

    def last_stage(self) -> range:
        """The ranks that compute logits."""
        return range(self.num_processes - self.tensor_parallel, self.num_processes)

    def check(self, config: ModelConfig) -> None:
        """ValueError, naming what would work, for a plan that does not fit the model."""
        if self.tensor_parallel < 1 or self.pipeline_parallel < 1:
            raise ValueError("tensor_parallel and pipeline_parallel must be at least 1")
        if self.pipeline_parallel > config.num_layers:
            raise ValueError(
                f"pipeline_parallel {self.pipeline_parallel} exceeds the model's "
                f"{config.num_layers} layers"
            )
        shared = gcd(config.num_heads, config.num_kv_heads, config.intermediate_size)
        if shared % self.tensor_parallel:
            possible = [str(size) for size in range(1, shared + 1) if shared % size == 0]
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} does not divide the model's "
                f"{config.num_heads} heads, {config.num_kv_heads} key/value heads and MLP of "
                f"{config.intermediate_size}; possible: {', '.join(possible)}"
            )
