"""A model split over processes: the tokens of one process, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shapes import SMOLLM2
from tiny_models import VOCAB, hf_model, save_servable

from roost_engine.batch import BlockCopy, Chunk, Direction
from roost_engine.config import CacheConfig
from roost_engine.loader import load_model
from roost_engine.parallel import ParallelError, ParallelRunner
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.runner import ModelRunner

pytestmark = pytest.mark.model  # each starts processes that import torch

CACHE = CacheConfig(num_blocks=64, block_size=4)
NUM_NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For this process too: more threads than cores wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _prompt(length: int, vocab_size: int = VOCAB) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(vocab_size) for _ in range(length)]


@contextlib.contextmanager
def _split(source: str, cache: CacheConfig = CACHE, **numbers: int) -> Iterator[ParallelRunner]:
    runner = ParallelRunner(
        source,
        load_model(source),
        cache,
        "float32",
        plan=ParallelPlan(**numbers),
        num_threads=1,
    )
    try:
        yield runner
    finally:
        runner.close()


def _logits_of(runner: ModelRunner | ParallelRunner) -> torch.Tensor:
    """Of a prompt in chunks of 7, then of two requests side by side, one without logits."""
    tables = [list(range(16)), list(range(16, 32))]
    prompt = _prompt(23)
    rows = [
        runner.forward([Chunk(prompt[start : start + 7], start, tables[0], start == 21)])
        for start in range(0, 23, 7)
    ]
    rows.append(
        runner.forward(
            [Chunk([5], 23, tables[0], True), Chunk(_prompt(9), 0, tables[1], False)]
        ).clone()
    )
    rows.append(runner.forward([Chunk([1], 9, tables[1], True), Chunk([2], 24, tables[0], True)]))
    return torch.cat(rows)


def _greedy(runner: ModelRunner | ParallelRunner, prompt: list[int]) -> list[int]:
    tokens, start = list(prompt), 0
    for _ in range(NUM_NEW_TOKENS):
        chunk = Chunk(tokens[start:], start, list(range(CACHE.num_blocks)), True)
        start = len(tokens)
        tokens.append(int(runner.forward([chunk]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [
        ("llama", 2, 1),
        ("llama, one to one, untied", 2, 2),
        ("qwen2", 2, 1),
        ("gemma3", 1, 3),
    ],
)
def test_a_split_model_gives_the_tokens_of_one_process(
    name: str, tensor: int, pipeline: int, tmp_path: Path
) -> None:
    source = str(save_servable(hf_model(name), tmp_path / "tiny"))
    whole = ModelRunner(load_model(source), CACHE, torch.float32)
    expected_logits, expected = _logits_of(whole), _greedy(whole, _prompt(30))

    with _split(source, tensor_parallel=tensor, pipeline_parallel=pipeline) as runner:
        actual_logits, actual = _logits_of(runner), _greedy(runner, _prompt(30))

        assert tuple(runner.forward([]).shape) == (0, VOCAB)

    torch.testing.assert_close(actual_logits, expected_logits, atol=1e-4, rtol=0)
    assert expected == actual


def test_bfloat16_crosses_between_processes(tmp_path: Path) -> None:
    source = str(save_servable(hf_model("llama"), tmp_path / "tiny"))
    model = load_model(source)
    plan = ParallelPlan(tensor_parallel=2, pipeline_parallel=2)
    expected = _logits_of(ModelRunner(model, CACHE, torch.bfloat16))

    runner = ParallelRunner(source, model, CACHE, "bfloat16", plan=plan, num_threads=1)
    actual = _logits_of(runner)
    runner.close()

    torch.testing.assert_close(actual, expected, atol=0.3, rtol=0.1)


@pytest.mark.model
def test_smollm2_in_two_stages_gives_its_own_tokens() -> None:
    prompt = load_model("smollm2").tokenizer.encode("The capital of France is")
    expected = _greedy(ModelRunner(load_model("smollm2"), CACHE, torch.float32), prompt)

    with _split("smollm2", pipeline_parallel=2) as runner:
        assert expected == _greedy(runner, prompt)


def test_blocks_go_to_host_memory_and_back_in_every_process(tmp_path: Path) -> None:
    """What another request overwrote is restored, each share and stage its part."""
    source = str(save_servable(hf_model("llama"), tmp_path / "tiny"))
    cache = CacheConfig(num_blocks=4, block_size=4, num_host_blocks=2)
    prompt = _prompt(9)
    with _split(source, cache, tensor_parallel=2, pipeline_parallel=2) as runner:
        runner.forward([Chunk(prompt[:8], 0, [0, 1], False)])
        expected = runner.forward([Chunk(prompt[8:], 8, [0, 1, 2], True)]).clone()
        runner.copy_blocks([BlockCopy(0, 1, Direction.OUT), BlockCopy(1, 0, Direction.OUT)])
        runner.forward([Chunk(_prompt(8), 0, [0, 1], False)])
        changed = runner.forward([Chunk(prompt[8:], 8, [0, 1, 2], True)]).clone()
        runner.copy_blocks([BlockCopy(0, 1, Direction.IN), BlockCopy(3, 0, Direction.IN)])
        actual = runner.forward([Chunk(prompt[8:], 8, [0, 3, 2], True)])

    assert torch.equal(expected, actual)
    assert not torch.equal(expected, changed)


def _pids(runner: ParallelRunner) -> list[int]:
    return [follower._process.pid for follower in runner._followers]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_follower_that_ends_ends_the_model_and_is_named(tmp_path: Path) -> None:
    source = str(save_servable(hf_model("llama"), tmp_path / "tiny"))
    with _split(source, pipeline_parallel=3) as runner:
        pids = _pids(runner)
        os.kill(pids[1], signal.SIGKILL)

        for _ in range(2):
            with pytest.raises(ParallelError, match="process 2 of the model ended with status -9"):
                runner.forward([Chunk([1, 2], 0, [0], True)])

        assert not any(map(_is_running, pids))


def test_a_follower_that_fails_in_a_step_ends_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(save_servable(hf_model("llama"), tmp_path / "tiny"))
    with _split(source, pipeline_parallel=2) as runner:
        runner._followers[0].tell(b"not a step")

        with pytest.raises(ParallelError, match="process 1 of the model ended with status 1"):
            runner.forward([Chunk([1, 2], 0, [0], True)])

    assert "ValidationError" in capfd.readouterr().err


def test_a_follower_that_finds_no_model_is_an_error_at_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(save_servable(hf_model("llama"), tmp_path / "tiny"))
    plan = ParallelPlan(pipeline_parallel=2)

    with pytest.raises(ParallelError, match="process 1 of the model ended with status 1"):
        ParallelRunner(str(tmp_path / "gone"), model, CACHE, "float32", plan=plan)

    assert "roost engine, process 1: " in capfd.readouterr().err


_PARENT = """
import sys, time
from roost_engine.config import CacheConfig
from roost_engine.loader import load_model
from roost_engine.parallel import ParallelRunner
from roost_engine.parallel_plan import ParallelPlan
plan = ParallelPlan(tensor_parallel=2, pipeline_parallel=2)
cache = CacheConfig(num_blocks=8)
runner = ParallelRunner(sys.argv[1], load_model(sys.argv[1]), cache, "float32", plan=plan)
print(*[follower._process.pid for follower in runner._followers], flush=True)
time.sleep(600)
"""


def test_no_follower_survives_its_parent(tmp_path: Path) -> None:
    source = str(save_servable(hf_model("llama"), tmp_path / "tiny"))
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, source], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(_is_running, pids))

    parent.kill()
    parent.wait()
    parent.stdout.close()

    deadline = time.monotonic() + 60
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"tensor_parallel": 0}, "must be at least 1"),
        ({"pipeline_parallel": 0}, "must be at least 1"),
        ({"pipeline_parallel": 31}, "pipeline_parallel 31 exceeds the model's 30 layers"),
        (
            {"tensor_parallel": 2},
            "2 does not divide the model's 9 heads, 3 key/value heads and MLP of 1536; .*: 1, 3",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(numbers: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ParallelPlan(**numbers).check(SMOLLM2)


@pytest.mark.parametrize("tensor", [1, 3])
@pytest.mark.parametrize("pipeline", [1, 2, 7, 30])
def test_every_layer_is_computed_once_in_order(tensor: int, pipeline: int) -> None:
    plan = ParallelPlan(tensor_parallel=tensor, pipeline_parallel=pipeline)
    plan.check(SMOLLM2)

    for share in range(tensor):
        ranks = [rank for rank in range(plan.num_processes) if plan.share_of(rank) == share]
        layers = [layer for rank in ranks for layer in plan.layers_of(rank, 30)]
        assert layers == list(range(30))
        assert all(
            len(plan.layers_of(rank, 30)) in (30 // pipeline, -(-30 // pipeline)) for rank in ranks
        )
    assert len(plan.last_stage()) == tensor
