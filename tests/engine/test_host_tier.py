"""Host tier: copies in an order that is right, the same tokens with and without it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, hf_model, load_saved

from roost_engine.batch import BlockCopy, Direction
from roost_engine.blocks import BlockPool
from roost_engine.config import CacheConfig, SchedulerConfig
from roost_engine.host_tier import HostTier
from roost_engine.loader import LoadedModel
from roost_engine.models.decoder import LayerCache
from roost_engine.offload import HostSlots
from roost_engine.request import Request, SamplingParams
from roost_engine.runner import ModelRunner
from roost_engine.sampling import sample
from roost_engine.scheduler import Scheduler

BLOCK_SIZE = 4

copies = st.builds(
    BlockCopy,
    block=st.integers(0, 4),
    host_block=st.integers(0, 3),
    direction=st.sampled_from(Direction),
)


def layers_of(num_blocks: int, num_layers: int = 2) -> list[LayerCache]:
    torch.manual_seed(1)
    shape = (num_blocks * BLOCK_SIZE, 2, 3)
    return [LayerCache(torch.randn(shape), torch.randn(shape)) for _ in range(num_layers)]


@given(orders=st.lists(copies, max_size=12))
def test_orders_that_depend_on_each_other_are_executed_in_their_order(
    orders: list[BlockCopy],
) -> None:
    layers = layers_of(5)
    expected = [tensor.view(5, -1).clone() for layer in layers for tensor in (layer.k, layer.v)]
    tier = HostTier(layers, 4, BLOCK_SIZE)
    fill = [BlockCopy(block, block, Direction.OUT) for block in range(4)]
    for device in expected:
        host = device[:4].clone()
        for order in orders:
            if order.direction is Direction.OUT:
                host[order.host_block] = device[order.block]
            else:
                device[order.block] = host[order.host_block]

    tier.execute(fill + orders)

    actual = [tensor.view(5, -1) for layer in layers for tensor in (layer.k, layer.v)]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_block_is_bit_equal(dtype: torch.dtype) -> None:
    layers = [LayerCache(layer.k.to(dtype), layer.v.to(dtype)) for layer in layers_of(6)]
    before = [tensor.clone() for layer in layers for tensor in (layer.k, layer.v)]
    tier = HostTier(layers, 3, BLOCK_SIZE)
    tier.execute([BlockCopy(block, 2 - block, Direction.OUT) for block in range(3)])
    for layer in layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))

    tier.execute([BlockCopy(5 - block, 2 - block, Direction.IN) for block in range(3)])

    after = [tensor for layer in layers for tensor in (layer.k, layer.v)]
    for old, new in zip(before, after, strict=True):
        blocks, restored = old.view(6, -1), new.view(6, -1)
        for block in range(3):
            assert torch.equal(restored[5 - block], blocks[block])
            assert restored[block].isnan().all()


def test_no_orders_and_no_host_memory_are_fine() -> None:
    HostTier(layers_of(2), 0, BLOCK_SIZE).execute([])


def test_slots_are_reused_longest_offloaded_first_and_never_while_taken() -> None:
    pool = BlockPool(1, 1, num_host_blocks=2)
    for token in (1, 2, 3, 4):
        table = pool.allocate(1)
        pool.register(table, 0, [token])
        pool.release(table)
    # 4 is on the device, 3 and 2 on the host, 1 gave way.
    found = {token: len(pool.lookup([token], pool.chain([token]))) for token in (1, 2, 3, 4)}
    assert found == {1: 0, 2: 1, 3: 1, 4: 1}

    slots = HostSlots(1)
    slots.free(slot := slots.try_reserve()[0])  # type: ignore[index]
    assert slot == 0
    slots.try_reserve()
    assert slots.try_reserve() is None


class Replica:
    """Scheduler, runner on a real model, and the tier between them."""

    def __init__(self, model: LoadedModel, num_blocks: int, num_host_blocks: int) -> None:
        cache = CacheConfig(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, num_host_blocks=num_host_blocks
        )
        self.runner = ModelRunner(model, cache, torch.float32)
        self.tier = HostTier(self.runner.cache, num_host_blocks, BLOCK_SIZE)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks)
        limits = SchedulerConfig(max_step_tokens=16, max_running=4, max_model_len=100)
        self.scheduler = Scheduler(limits, self.pool, frozenset())
        self.num_restored_bit_equal = 0
        self._kv: dict[tuple[int, ...], torch.Tensor] = {}  # all tokens up to a block -> its KV

    def run(self, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        """Four prompts at a time, to the end."""
        requests = [
            Request(
                f"{id(self)}-{index}",
                prompt,
                SamplingParams(max_tokens=9, temperature=temperature, seed=index),
                0.0,
            )
            for index, prompt in enumerate(prompts)
        ]
        for start in range(0, len(requests), 4):
            for request in requests[start : start + 4]:
                self.scheduler.add(request)
            while self.scheduler.has_work:
                self._step()
        return [request.token_ids[request.num_prompt_tokens :] for request in requests]

    def _step(self) -> None:
        step = self.scheduler.schedule()
        self.scheduler.check()
        self.tier.execute(step.copies)
        self._compare_restored([copy.block for copy in step.copies if copy.direction.value == "in"])
        logits = self.runner.forward(step.chunks)
        sampled = sample(
            logits,
            [request.sampling for request in step.sampling],
            [len(request.token_ids) for request in step.sampling],
        )
        self._note_full_blocks()
        self.scheduler.update(step, sampled)
        self.scheduler.check()

    def _note_full_blocks(self) -> None:
        for request in self.scheduler.running:
            for index, block in enumerate(request.block_table[: len(request.token_ids) // 4]):
                name = tuple(request.token_ids[: (index + 1) * BLOCK_SIZE])
                if request.num_computed >= len(name):
                    self._kv[name] = self._content(block)

    def _compare_restored(self, blocks: list[int]) -> None:
        for request in self.scheduler.running:
            for index, block in enumerate(request.block_table):
                name = tuple(request.token_ids[: (index + 1) * BLOCK_SIZE])
                if block in blocks and name in self._kv:
                    assert torch.equal(self._kv[name], self._content(block))
                    self.num_restored_bit_equal += 1

    def _content(self, block: int) -> torch.Tensor:
        rows = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        return torch.stack([t[rows] for layer in self.runner.cache for t in (layer.k, layer.v)])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("num_host_blocks", [2, 12, 200])
def test_tokens_are_the_same_with_and_without_the_tier(
    tmp_path: Path, num_host_blocks: int, temperature: float
) -> None:
    """In a pool for one conversation and a half, with six of them taking turns."""
    model = load_saved(hf_model("llama"), tmp_path)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(6)]
    ample = Replica(model, num_blocks=400, num_host_blocks=0)
    tiered = Replica(model, num_blocks=20, num_host_blocks=num_host_blocks)

    for _ in range(3):  # turns: each continues what was said
        rng.shuffle(prompts)
        expected, actual = ample.run(prompts, temperature), tiered.run(prompts, temperature)
        assert actual == expected
        prompts = [prompt + output for prompt, output in zip(prompts, expected, strict=True)]

    if num_host_blocks > 2:
        assert tiered.scheduler.counters.restored_tokens > 0
        assert tiered.num_restored_bit_equal > 0
