"""The decoder and runner against transformers on tiny random models of each family."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from msgspec import structs
from tiny_models import TINY_MODELS, VOCAB, hf_model, load_saved

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig
from roost_engine.loader import LoadedModel
from roost_engine.runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 4
NUM_BLOCKS = 64


@pytest.fixture(params=TINY_MODELS)
def hf(request: pytest.FixtureRequest) -> PreTrainedModel:
    return hf_model(request.param)


@pytest.fixture
def runner(hf: PreTrainedModel, tmp_path: Path) -> ModelRunner:
    return _runner(load_saved(hf, tmp_path), torch.float32)


def _runner(model: LoadedModel, dtype: torch.dtype) -> ModelRunner:
    cache = CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return ModelRunner(model, cache, dtype)


def _prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def _tables(*lengths: int) -> list[list[int]]:
    """Scattered blocks for requests of these lengths."""
    free = list(range(NUM_BLOCKS))
    random.Random(1).shuffle(free)
    return [[free.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def _hf_logits(hf: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf(torch.tensor([token_ids])).logits[0]
    return logits


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_whole_prompt_gives_transformers_logits(hf: PreTrainedModel, runner: ModelRunner) -> None:
    prompt = _prompt(41)
    [table] = _tables(41)

    actual = runner.forward([Chunk(prompt, 0, table, True)])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_a_prompt_in_chunks_gives_transformers_logits(
    hf: PreTrainedModel, runner: ModelRunner, chunk_size: int
) -> None:
    prompt = _prompt(41)
    [table] = _tables(41)

    rows = [
        runner.forward([Chunk(prompt[start : start + chunk_size], start, table, True)])
        for start in range(0, 41, chunk_size)
    ]

    ends = [min(start + chunk_size, 41) - 1 for start in range(0, 41, chunk_size)]
    _assert_close(torch.cat(rows), _hf_logits(hf, prompt)[ends])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3 rotary", {"rope_divisors": ()}),
        ("linear rotary", {"rope_divisors": ()}),
        ("mistral", {"sliding_layers": ()}),
        ("mistral", {"sliding_window": 10}),
        ("qwen2, sliding", {"sliding_layers": (True, True, True)}),
        ("qwen3", {"qk_norm": False}),
        ("qwen2", {"attention_bias": False}),
        ("gemma3", {"sliding_window": 7}),
        ("gemma3", {"sliding_layers": (True,) * 7}),
        ("gemma3", {"sliding_rope_theta": None}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"embedding_scale": 1.0}),
        ("gemma3", {"attention_scale": None}),
    ],
)
def test_each_setting_makes_a_difference(
    name: str, change: dict[str, object], tmp_path: Path
) -> None:
    """Or the comparisons with transformers would show nothing."""
    model = load_saved(hf_model(name), tmp_path)
    changed = structs.replace(model, config=structs.replace(model.config, **change))
    [table] = _tables(41)
    chunk = Chunk(_prompt(41), 0, table, True)

    one, other = (_runner(each, torch.float32).forward([chunk]) for each in (model, changed))

    assert (one - other).abs().max() > 1e-3


def test_a_mixed_step_gives_each_request_its_own_logits(
    hf: PreTrainedModel, runner: ModelRunner
) -> None:
    """A decode, a chunk with context that wants no logits, and a whole prompt, side by side."""
    prompts = [_prompt(18, 1), _prompt(30, 2), _prompt(9, 3)]
    tables = _tables(18, 30, 9)
    runner.forward([Chunk(prompts[0][:17], 0, tables[0], False)])
    runner.forward([Chunk(prompts[1][:10], 0, tables[1], False)])

    actual = runner.forward(
        [
            Chunk(prompts[0][17:], 17, tables[0], True),
            Chunk(prompts[1][10:20], 10, tables[1], False),
            Chunk(prompts[2], 0, tables[2], True),
        ]
    )
    rest = runner.forward([Chunk(prompts[1][20:], 20, tables[1], True)])

    expected = [_hf_logits(hf, prompts[idx])[-1] for idx in (0, 2, 1)]
    _assert_close(torch.cat((actual, rest)), torch.stack(expected))


def test_a_prefix_computed_by_another_request_is_reused(
    hf: PreTrainedModel, runner: ModelRunner
) -> None:
    prompt = _prompt(24)
    first, second = _tables(24, 24)
    runner.forward([Chunk([*prompt[:16], 5, 6], 0, first, False)])
    shared = first[: 16 // BLOCK_SIZE] + second[16 // BLOCK_SIZE :]

    actual = runner.forward([Chunk(prompt[16:], 16, shared, True)])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


@pytest.mark.parametrize("reader_first", [True, False])
def test_a_prefix_may_be_read_in_the_step_that_fills_it(
    hf: PreTrainedModel, runner: ModelRunner, reader_first: bool
) -> None:
    prompt = _prompt(24)
    writer_table, own = _tables(16, 24)
    reader_table = writer_table + own[16 // BLOCK_SIZE :]
    writer = Chunk(prompt[:16], 0, writer_table, False)
    reader = Chunk(prompt[16:], 16, reader_table, True)

    actual = runner.forward([reader, writer] if reader_first else [writer, reader])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


def test_float32_rows_do_not_depend_on_their_neighbours(runner: ModelRunner) -> None:
    """A decode alone and among others, each of its own length: the same bits."""
    prompts = [_prompt(5 + idx, idx) for idx in range(6)]
    tables = _tables(*map(len, prompts))
    for prompt, table in zip(prompts, tables, strict=True):
        runner.forward([Chunk(prompt[:-1], 0, table, False)])
    decodes = [
        Chunk(prompt[-1:], len(prompt) - 1, table, True)
        for prompt, table in zip(prompts, tables, strict=True)
    ]

    alone = [runner.forward([decode]) for decode in decodes]

    for count in range(1, 7):
        assert torch.equal(torch.cat(alone[:count]), runner.forward(decodes[:count]))


def test_no_logits_are_computed_where_none_are_wanted(runner: ModelRunner) -> None:
    [table] = _tables(4)

    assert tuple(runner.forward([Chunk([1, 2, 3], 0, table, False)]).shape) == (0, VOCAB)
    assert tuple(runner.forward([]).shape) == (0, VOCAB)


def test_what_the_model_or_the_cache_does_not_have_is_refused(runner: ModelRunner) -> None:
    [table] = _tables(4)

    with pytest.raises(IndexError):
        runner.forward([Chunk([VOCAB], 0, table, True)])
    with pytest.raises(IndexError):
        runner.forward([Chunk([1], 0, [NUM_BLOCKS], True)])
    with pytest.raises(IndexError):
        runner.forward([Chunk([1], 200, list(range(NUM_BLOCKS)), True)])
    with pytest.raises(AssertionError, match="block table must cover"):
        runner.forward([Chunk([1, 2, 3, 4, 5], 0, table, True)])
    with pytest.raises(AssertionError, match="at least one token"):
        runner.forward([Chunk([], 0, table, True)])


def test_bf16_stays_close_to_transformers_bf16(tmp_path: Path) -> None:
    hf = hf_model("llama", initializer_range=0.05)
    model = load_saved(hf, tmp_path)
    runner = _runner(model, torch.bfloat16)
    prompt = _prompt(20)
    [table] = _tables(20)

    actual = runner.forward([Chunk(prompt, 0, table, True)])

    expected = _hf_logits(hf.to(torch.bfloat16), prompt)[-1:].float()
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
