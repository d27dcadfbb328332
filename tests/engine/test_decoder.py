"""The decoder and runner against transformers' Llama on tiny random models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from shapes import SMOLLM2
from transformers import LlamaConfig, LlamaForCausalLM

from roost_engine.batch import Chunk
from roost_engine.chat import ChatTemplate
from roost_engine.config import CacheConfig
from roost_engine.loader import LoadedModel
from roost_engine.loader.hf_folder import _check_supported, _read_config, _read_weights
from roost_engine.loader.json_object import JsonObject
from roost_engine.runner import ModelRunner, kv_bytes_per_token
from roost_engine.tokenizer import Tokenizer

VOCAB = 97
BLOCK_SIZE = 4
NUM_BLOCKS = 64

# Of 8 frequencies 2 stay, 2 are in the passage and 4 are divided.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = [
    pytest.param({"num_key_value_heads": 2, "tie_word_embeddings": True}, id="grouped, tied"),
    pytest.param({"num_key_value_heads": 4, "tie_word_embeddings": False}, id="one to one, untied"),
    pytest.param({"num_key_value_heads": 1, "head_dim": 24}, id="one kv head, wide heads"),
    pytest.param({"num_key_value_heads": 2, "rope_parameters": LLAMA3}, id="llama3 rotary"),
]


def _hf_model(changes: dict[str, object]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 200,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        # Large enough that logits differ clearly, as in a trained model.
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def _load(hf: LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> LoadedModel:
    """Through the files, as a replica would; a tokenizer is not needed here."""
    hf.save_pretrained(folder)
    config_json = JsonObject.read(folder / "config.json")
    _check_supported(config_json)
    config = _read_config(config_json, frozenset())
    weights = _read_weights(folder, config, dtype)
    return LoadedModel("tiny", config, weights, Tokenizer.__new__(Tokenizer), ChatTemplate(None))


@pytest.fixture(params=SHAPES)
def hf(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return _hf_model(request.param)


@pytest.fixture
def runner(hf: LlamaForCausalLM, tmp_path: Path) -> ModelRunner:
    model = _load(hf, tmp_path, torch.float32)
    return ModelRunner(model, CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))


def _prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def _tables(*lengths: int) -> list[list[int]]:
    """Scattered blocks for requests of these lengths."""
    free = list(range(NUM_BLOCKS))
    random.Random(1).shuffle(free)
    return [[free.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def _hf_logits(hf: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf(torch.tensor([token_ids])).logits[0]
    return logits


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_whole_prompt_gives_transformers_logits(
    hf: LlamaForCausalLM, runner: ModelRunner
) -> None:
    prompt = _prompt(41)
    [table] = _tables(41)

    actual = runner.forward([Chunk(prompt, 0, table, True)])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_a_prompt_in_chunks_gives_transformers_logits(
    hf: LlamaForCausalLM, runner: ModelRunner, chunk_size: int
) -> None:
    prompt = _prompt(41)
    [table] = _tables(41)

    rows = [
        runner.forward([Chunk(prompt[start : start + chunk_size], start, table, True)])
        for start in range(0, 41, chunk_size)
    ]

    ends = [min(start + chunk_size, 41) - 1 for start in range(0, 41, chunk_size)]
    _assert_close(torch.cat(rows), _hf_logits(hf, prompt)[ends])


def test_llama3_scaling_makes_a_difference(tmp_path: Path) -> None:
    """Or the comparisons above would show nothing."""
    model = _load(_hf_model({"rope_parameters": LLAMA3}), tmp_path, torch.float32)
    divisors = model.config.rope_divisors

    assert len(divisors) == 8
    assert divisors[0] == 1.0
    assert any(1.0 < divisor < 8.0 for divisor in divisors)
    assert divisors[-1] == 8.0


def test_a_mixed_step_gives_each_request_its_own_logits(
    hf: LlamaForCausalLM, runner: ModelRunner
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
    hf: LlamaForCausalLM, runner: ModelRunner
) -> None:
    prompt = _prompt(24)
    first, second = _tables(24, 24)
    runner.forward([Chunk([*prompt[:16], 5, 6], 0, first, False)])
    shared = first[: 16 // BLOCK_SIZE] + second[16 // BLOCK_SIZE :]

    actual = runner.forward([Chunk(prompt[16:], 16, shared, True)])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


@pytest.mark.parametrize("reader_first", [True, False])
def test_a_prefix_may_be_read_in_the_step_that_fills_it(
    hf: LlamaForCausalLM, runner: ModelRunner, reader_first: bool
) -> None:
    prompt = _prompt(24)
    writer_table, own = _tables(16, 24)
    reader_table = writer_table + own[16 // BLOCK_SIZE :]
    writer = Chunk(prompt[:16], 0, writer_table, False)
    reader = Chunk(prompt[16:], 16, reader_table, True)

    actual = runner.forward([reader, writer] if reader_first else [writer, reader])

    _assert_close(actual, _hf_logits(hf, prompt)[-1:])


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
    hf = _hf_model({"num_key_value_heads": 2, "initializer_range": 0.05})
    model = _load(hf, tmp_path, torch.bfloat16)
    runner = ModelRunner(model, CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))
    prompt = _prompt(20)
    [table] = _tables(20)

    actual = runner.forward([Chunk(prompt, 0, table, True)])

    expected = _hf_logits(hf.to(torch.bfloat16), prompt)[-1:].float()
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_fusing_keeps_the_weights_in_memory_once(tmp_path: Path) -> None:
    model = _load(_hf_model({"num_key_value_heads": 2}), tmp_path, torch.float32)
    before = {name: weight.clone() for name, weight in model.weights.items()}

    ModelRunner(model, CacheConfig(num_blocks=1, block_size=BLOCK_SIZE))

    q, k = (model.weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert all(torch.equal(weight, model.weights[name]) for name, weight in before.items())


def test_kv_bytes_per_token() -> None:

    assert kv_bytes_per_token(SMOLLM2, torch.float32) == 46080
    assert kv_bytes_per_token(SMOLLM2, torch.bfloat16) == 23040
