"""`roost bench`: benchmarks that need processes or parts of ours around them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from roost.cluster import Cluster, ClusterConfig
from roost_loadtest.bench_schedule import bench_schedule
from roost_loadtest.bench_ttft import bench_ttft


async def run_bench_ttft(config: ClusterConfig, *, rounds: int, num_tokens: int) -> None:
    """Cold and warm TTFT on a cluster started for it. Raises ClusterError or StreamError."""
    async with Cluster(config, _progress) as cluster:
        await cluster.start()
        await bench_ttft(cluster.base_urls[0], cluster.model, rounds=rounds, num_tokens=num_tokens)


def run_bench_schedule(*, rounds: int) -> None:
    """What `schedule` and `update` of the engine cost a step."""
    bench_schedule(_build_decodes, rounds=rounds)


def _build_decodes(num_running: int, context_tokens: int, num_steps: int) -> Callable[[], object]:
    """A scheduler whose requests decode for so many steps, and a function that takes one of them.

    They stand at different places of their last blocks.
    """
    from roost_engine.blocks import BlockPool
    from roost_engine.config import SchedulerConfig
    from roost_engine.request import Request, SamplingParams
    from roost_engine.scheduler import Scheduler

    block_size, max_step_tokens = 16, 8192
    num_prefills = num_running * context_tokens // max_step_tokens + num_running
    max_tokens = num_steps + num_prefills
    num_blocks = num_running * ((context_tokens + max_tokens) // block_size + 1)
    limits = SchedulerConfig(
        max_step_tokens=max_step_tokens,
        max_running=num_running,
        max_model_len=context_tokens + block_size + max_tokens,
    )
    scheduler = Scheduler(limits, BlockPool(num_blocks, block_size), frozenset())
    sampling = SamplingParams(max_tokens=max_tokens)
    for index in range(num_running):
        num_tokens = context_tokens - block_size + index % block_size
        prompt = [index + position for position in range(num_tokens)]
        scheduler.add(Request(str(index), prompt, sampling, 0.0))
    sampled = list(range(num_running))

    def step() -> None:
        scheduled = scheduler.schedule()
        scheduler.update(scheduled, sampled[: len(scheduled.sampling)])

    while scheduler.num_waiting or any(r.num_uncomputed > 1 for r in scheduler.running):
        step()
    return step


def run_bench_quality(
    *,
    model: str,
    formats: Sequence[str],
    num_tokens: int | None,
    rows: int,
    threads: int,
    min_top1: float,
    max_loss: float,
) -> bool:
    """Print what each weight format loses against float32; whether none loses too much.

    The reference is the torch decoder in float32, which the engine's tests hold to
    transformers'. ModelFileError if the model cannot be read.
    """
    import msgspec
    import torch

    from roost_engine.backend import BackendOptions, build_backend
    from roost_engine.config import CacheConfig
    from roost_engine.loader import load_model
    from roost_engine.native_runner import WeightFormat
    from roost_engine.runner import ModelRunner
    from roost_loadtest import quality

    loaded = load_model(model)
    token_ids = loaded.tokenizer.encode(quality.read_text())[:num_tokens]
    cache = CacheConfig(num_blocks=-(-len(token_ids) // 16))
    forced = partial(
        quality.teacher_forced, token_ids=token_ids, block_size=cache.block_size, rows=rows
    )
    # Kept: 0.8 GB for this text and a vocabulary of 49k, computed once for all formats.
    reference = list(forced(ModelRunner(loaded, cache, torch.float32)))
    passed = True
    for name in formats:
        options = BackendOptions(
            weights=msgspec.convert(name, WeightFormat), num_threads=threads, max_step_tokens=rows
        )
        backend = build_backend(loaded, cache, options)
        found = quality.compare(reference, forced(backend.runner), token_ids)
        quality.print_quality(name, found)
        passed &= found.top1 >= min_top1 and found.perplexity_ratio <= 1.0 + max_loss
    return passed


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
