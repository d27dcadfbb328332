"""The torch decoder on another device: nothing is left behind on the CPU, and on a GPU the tokens
are those of the CPU. The latter needs a GPU, and is skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import META, MixedDevicesError, Watch
from shapes import SMOLLM2
from tiny_models import TINY_MODELS, VOCAB, hf_model, load_saved

from roost_engine.backend import BackendError, BackendOptions, build_backend
from roost_engine.batch import BlockCopy, Chunk, Direction
from roost_engine.chat import ChatTemplate
from roost_engine.config import CacheConfig
from roost_engine.device import DeviceError, check_gpu_memory, find_device
from roost_engine.host_tier import HostTier
from roost_engine.loader import LoadedModel
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.runner import ModelRunner
from roost_engine.tokenizer import Tokenizer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with CUDA here")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

CACHE = CacheConfig(num_blocks=32, block_size=4, num_host_blocks=8)
TABLE = [3, 9, 1, 30, 12, 7, 5, 20, 21, 2]
PROMPT = [(7 * i + i * i) % VOCAB for i in range(21)]
GPU = torch.device("cuda", 0)


def greedy(runner: ModelRunner, num_tokens: int) -> list[int]:
    """In three chunks, then token by token, beside another request."""
    other = Chunk(
        token_ids=PROMPT[::-1], start=0, block_table=list(range(22, 30)), wants_logits=True
    )
    for start in (0, 7, 14):
        chunk = Chunk(PROMPT[start : start + 7], start, TABLE, wants_logits=start == 14)
        logits = runner.forward([chunk, other])
    tokens = list(PROMPT)
    for _ in range(num_tokens):
        tokens.append(int(logits[0].argmax()))
        logits = runner.forward([Chunk(tokens[-1:], len(tokens) - 1, TABLE, True), other])
    return tokens[len(PROMPT) :]


def test_an_operation_on_two_devices_is_noticed() -> None:
    table = torch.empty(4, 2, device=META)

    with pytest.raises(MixedDevicesError), Watch():
        table.index_select(0, torch.tensor([1]))


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_goes_to_the_device_in_one_copy_and_comes_back_in_one(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    runner = ModelRunner(load_saved(hf_model(name), tmp_path), CACHE, dtype, META)
    chunks = [
        Chunk(PROMPT[:9], 0, TABLE, wants_logits=False),
        Chunk(PROMPT[9:], 9, TABLE, wants_logits=True),
        Chunk([5], 30, list(range(8)), wants_logits=True),
    ]

    with Watch() as watch:
        logits = runner.forward(chunks)

    assert (logits.device.type, logits.dtype, tuple(logits.shape)) == (
        "cpu",
        torch.float32,
        (2, VOCAB),
    )
    assert watch.copies == {("cpu", "meta"): 1, ("meta", "cpu"): 1}


def test_what_a_gpu_would_stumble_over_is_refused_before_it_gets_there(tmp_path: Path) -> None:
    runner = ModelRunner(load_saved(hf_model("llama"), tmp_path), CACHE, torch.float32, META)

    for chunk, problem in [
        (Chunk([VOCAB], 0, TABLE, True), "token 97 of 97"),
        (Chunk([-1], 0, TABLE, True), "token -1"),
        (Chunk([1], 0, [32], True), "block 32 of 32"),
        (Chunk([1], 0, [-1], True), "block -1"),
        (Chunk([1], 128, [0] * 40, True), "position 128 of 128"),
        (Chunk([1], -1, TABLE, True), "position -1"),
    ]:
        with pytest.raises(IndexError, match=problem), Watch() as watch:
            runner.forward([chunk])
        assert not watch.copies


def test_blocks_are_copied_between_device_and_host_and_nothing_else_is(tmp_path: Path) -> None:
    model = load_saved(hf_model("llama"), tmp_path)  # 3 layers
    runner = ModelRunner(model, CACHE, torch.float32, META)
    tier = HostTier(runner.cache, CACHE.num_host_blocks, CACHE.block_size)

    with Watch() as watch:
        tier.execute([BlockCopy(4, 1, Direction.OUT), BlockCopy(5, 1, Direction.IN)])

    assert watch.copies == {("meta", "cpu"): 2 * 3, ("cpu", "meta"): 2 * 3}


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda 1", "CUDA", "mps"])
def test_a_device_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(DeviceError, match="it is auto, cpu, cuda or cuda:N"):
        find_device(name)


@without_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(DeviceError, match=f"device {name}: torch finds no GPU"):
            find_device(name)


def test_the_first_gpu_is_the_default_and_one_beyond_the_last_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert find_device("auto") == find_device("cuda") == torch.device("cuda:0")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="device cuda:2: there are 2 GPUs here"):
        find_device("cuda:2")


def test_cache_and_weights_must_fit_what_is_free_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 10**9, 80 * 10**9))

    check_gpu_memory(GPU, 8 * 10**9, 2 * 10**9)
    with pytest.raises(DeviceError, match=r"8\.0 GB beside .* cuda:0 has 10\.0 GB free; lower kv"):
        check_gpu_memory(GPU, 8 * 10**9, 2 * 10**9 + 1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (BackendOptions(device="cuda", kernels="native"), "native kernels compute on the CPU only"),
        (
            BackendOptions(device="cuda", plan=ParallelPlan(tensor_parallel=3)),
            "split over processes computes on the CPU only",
        ),
        (BackendOptions(device="tpu"), "device 'tpu' is not known"),
        pytest.param(BackendOptions(device="cuda"), "torch finds no GPU", marks=without_gpu),
    ],
)
def test_what_cannot_compute_on_a_gpu_says_so(options: BackendOptions, problem: str) -> None:
    model = LoadedModel("tiny", SMOLLM2, {}, Tokenizer.__new__(Tokenizer), ChatTemplate(None))

    with pytest.raises(BackendError, match=problem):
        build_backend(model, CACHE, options)


@needs_gpu
@pytest.mark.parametrize("name", TINY_MODELS)
def test_tokens_on_a_gpu_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    model = load_saved(hf_model(name), tmp_path)
    options = BackendOptions(device="cuda", weights="float32")
    backend = build_backend(model, CACHE, options)
    assert backend.description == "torch on cuda:0, float32"
    assert isinstance(backend.runner, ModelRunner)

    expected = greedy(ModelRunner(model, CACHE, torch.float32), 16)

    assert greedy(backend.runner, 16) == expected


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_survives_a_stay_in_pinned_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_saved(hf_model("llama"), tmp_path)
    runner = ModelRunner(model, CACHE, dtype, GPU)
    tier = HostTier(runner.cache, CACHE.num_host_blocks, CACHE.block_size)
    runner.forward([Chunk(PROMPT, 0, TABLE, wants_logits=False)])
    expected = runner.forward([Chunk([1], len(PROMPT), TABLE, True)])

    tier.execute([BlockCopy(block, index, Direction.OUT) for index, block in enumerate(TABLE[:6])])
    for layer in runner.cache:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    tier.execute([BlockCopy(10 + index, index, Direction.IN) for index in range(6)])

    restored = Chunk([1], len(PROMPT), list(range(10, 16)), True)
    assert torch.equal(runner.forward([restored]), expected)
