"""SmolLM2-135M: our weights are transformers' weights, our greedy tokens are its tokens.

Both run in fp32 on the same token ids (transformers' own GGUF tokenizer lacks the single-digit
split, so ours encodes for both). Requests are laid out by hand: no scheduler here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from roost_engine.batch import Chunk
from roost_engine.chat import ChatTemplate
from roost_engine.config import CacheConfig, ModelConfig
from roost_engine.loader import LoadedModel, load_model
from roost_engine.loader.load import resolve
from roost_engine.runner import ModelRunner

if TYPE_CHECKING:  # imported where they are used: that takes seconds
    from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.model

NUM_NEW_TOKENS = 24
BLOCK_SIZE = 16

_STORY = (
    "The lighthouse keeper climbed the stairs every evening, counting them under his breath, "
    "one hundred and forty-two, and every evening the sea below answered with its own number. "
    "He had been told, when he took the post, that the lamp must never go out, and in thirty "
    "years it never had. Ships passed, some near, some only a light on the horizon. "
)
_CODE = '''def quicksort(items):
    """Sort a list by divide and conquer."""
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
    left = [x for x in items if x < pivot]
'''
COMPLETIONS = [
    "The",
    "Once upon a time, in a small village,",
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7,",
    "2024-01-15: the temperature was 21.5 degrees, the",
    _CODE,
    "SELECT name, COUNT(*) FROM users",
    "#include <stdio.h>\nint main(void) {\n",
    "La capitale de la France est",
    "Der schnelle braune Fuchs springt über den",
    "日本の首都は",
    "Сегодня хорошая погода, и я",
    "🙂 emoji test 🚀:",
    "    \n\n\tindented",
    _STORY * 4,
    "Summary of the following text.\n\n" + _STORY * 3 + "\n\nSummary:",
]
CHATS = [
    "What is the capital of France? Answer in one sentence.",
    "Write a haiku about the sea.",
    "List three prime numbers greater than 100.",
    "Explain what a hash table is to a child.\n" + _STORY * 2,
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: weight.to_torch(torch.float32) for name, weight in model.weights.items()}


@pytest.fixture(scope="module")
def hf_model(model: LoadedModel, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """transformers' Llama on our weights, which test_weights_... shows to be its own."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        hf = LlamaForCausalLM(_hf_config(model.config))
    missing, unexpected = hf.load_state_dict(weights, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    hf.tie_weights()
    # Not a parameter: computed at construction, so it is still on the meta device.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)
    return hf.eval()


@pytest.fixture(scope="module")
def prompts(model: LoadedModel) -> list[list[int]]:
    template = ChatTemplate(model.tokenizer.chat_template, model.tokenizer.special_tokens)
    chats = [template.render([{"role": "user", "content": text}]) for text in CHATS]
    return [model.tokenizer.encode(text) for text in COMPLETIONS + chats]


@pytest.fixture(scope="module")
def expected(hf_model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens, from two left-padded batches: 24 steps each, not 480."""
    by_length = sorted(range(len(prompts)), key=lambda idx: len(prompts[idx]))
    found: dict[int, list[int]] = {}
    for batch in (by_length[:15], by_length[15:]):
        outputs = _generate_hf(hf_model, [prompts[idx] for idx in batch])
        found |= dict(zip(batch, outputs, strict=True))
    return [found[idx] for idx in range(len(prompts))]


@pytest.fixture(scope="module")
def runner(model: LoadedModel) -> ModelRunner:
    return ModelRunner(model, CacheConfig(num_blocks=2048, block_size=BLOCK_SIZE), torch.float32)


@pytest.fixture(scope="module")
def free_blocks() -> Iterator[int]:
    """Blocks in an order that is nowhere consecutive, each given out once."""
    return iter(block * 1031 % 2048 for block in range(2048))


def test_weights_are_bit_identical_to_transformers_own_gguf_loading(
    model: LoadedModel, weights: dict[str, torch.Tensor]
) -> None:
    from transformers import LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        empty = LlamaForCausalLM(_hf_config(model.config))

    loaded = load_gguf_checkpoint(resolve("smollm2"), return_tensors=True, model_to_load=empty)

    assert loaded["tensors"].keys() == weights.keys()
    assert all(torch.equal(weights[name], loaded["tensors"][name]) for name in weights)


def test_prompts_cover_short_and_long(prompts: list[list[int]]) -> None:
    lengths = [len(prompt) for prompt in prompts]

    assert len(prompts) == 20
    assert min(lengths) < 3
    assert max(lengths) > 280


def test_cold_requests_give_the_same_tokens(
    runner: ModelRunner,
    prompts: list[list[int]],
    expected: list[list[int]],
    free_blocks: Iterator[int],
) -> None:
    actual = [_generate(runner, Request(prompt), free_blocks) for prompt in prompts]

    assert expected == actual


def test_warm_requests_give_the_same_tokens(
    runner: ModelRunner,
    prompts: list[list[int]],
    expected: list[list[int]],
    free_blocks: Iterator[int],
) -> None:
    """The full blocks of a prompt were filled by an earlier request that went on differently."""
    requests = []
    for prompt in prompts:
        num_shared = (len(prompt) - 1) // BLOCK_SIZE
        computed = num_shared * BLOCK_SIZE
        earlier = Request([*prompt[:computed], 28, 504, 253])
        _run_step(runner, [(earlier, earlier.num_missing)], free_blocks)
        requests.append(Request(prompt, earlier.block_table[:num_shared], computed))
    while not requests[0].is_done:
        step = [(request, request.num_missing) for request in requests]
        _run_step(runner, step, free_blocks)

    assert expected == [request.output for request in requests]


def test_batched_requests_with_chunked_prefill_give_the_same_tokens(
    runner: ModelRunner,
    prompts: list[list[int]],
    expected: list[list[int]],
    free_blocks: Iterator[int],
) -> None:
    """Decodes first, then prefill in chunks of what is left of 96 tokens, 8 requests at a time."""
    waiting = [Request(prompt) for prompt in prompts]
    requests = list(waiting)
    running: list[Request] = []
    while waiting or running:
        while waiting and len(running) < 8:
            running.append(waiting.pop(0))
        running.sort(key=lambda request: request.num_missing)
        budget, step = 96, []
        for request in running:
            num_tokens = min(budget, request.num_missing)
            if num_tokens:
                step.append((request, num_tokens))
                budget -= num_tokens
        _run_step(runner, step, free_blocks)
        running = [request for request in running if not request.is_done]

    assert expected == [request.output for request in requests]


@dataclass
class Request:
    """A prompt on its way: what has been computed and where."""

    prompt: list[int]
    block_table: list[int] = field(default_factory=list)
    computed: int = 0  # positions whose K and V are in the cache
    output: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_missing(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def is_done(self) -> bool:
        return len(self.output) == NUM_NEW_TOKENS


def _run_step(
    runner: ModelRunner, step: list[tuple[Request, int]], free_blocks: Iterator[int]
) -> None:
    """Compute so many tokens of each request; append a greedy token where the end is reached."""
    chunks = []
    for request, num_tokens in step:
        end = request.computed + num_tokens
        while len(request.block_table) * BLOCK_SIZE < end:
            request.block_table.append(next(free_blocks))
        token_ids = request.tokens[request.computed : end]
        wants_logits = end == len(request.tokens)
        chunks.append(Chunk(token_ids, request.computed, request.block_table, wants_logits))
        request.computed = end
    rows = iter(runner.forward(chunks).argmax(dim=-1).tolist())
    for (request, _), chunk in zip(step, chunks, strict=True):
        if chunk.wants_logits:
            request.output.append(next(rows))


def _generate(runner: ModelRunner, request: Request, free_blocks: Iterator[int]) -> list[int]:
    while not request.is_done:
        _run_step(runner, [(request, request.num_missing)], free_blocks)
    return request.output


def _generate_hf(hf: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = [[0] * num + prompt for num, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * num + [1] * (longest - num) for num in padding]
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.inference_mode():
        ids = hf.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), generation_config=settings
        )
    tokens: list[list[int]] = ids[:, longest:].tolist()
    return tokens


def _hf_config(config: ModelConfig) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        eos_token_id=None,
        bos_token_id=None,
    )
